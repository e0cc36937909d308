"""Page one: losses, weakest link, how good the model is, what is not known, in terminal and page; checks that do not exist; narrow terminals."""

from __future__ import annotations

import copy
import io
import json
import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console
from test_report import Tags, attempt, document, row
from torch import nn
from worlds import digits, retrained, small

from expunge.audits.core import Probe, Row
from expunge.audits.grade import Finding
from expunge.audits.named import Named, grouped, named
from expunge.audits.references import Refusal
from expunge.core.modality import MODALITIES, of
from expunge.planning.outcome import audited
from expunge.report import front, glance, html, layout, plots, table
from expunge.report.words import WORDS


def fronted() -> dict[str, Any]:
    """A document with a page one."""
    before, after = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2], [0.5, 1.0, 2.0, 3.0, 4.0]
    rows = [
        {"records": g, "model": m, "n": 100, "at": at} for g in ("forget", "unseen") for m, at in (("before", before), ("after", after), ("retrained", after))
    ]
    level = {"part": "retain", "what": "accuracy", "before": 0.99, "after": 0.97, "chance": 0.11, "above": 0.98, "n": 891}
    weak = {"name": "repair.free", "words": WORDS["repair.free"], "rule": "<= 0.5", "asked": "it must be at most 0.5", "state": "thin"}
    weak |= {"value": 0.4, "low": 0.2, "high": 0.6, "n": 148}
    return {
        **document(), "pictures": {}, "verdict": {"passed": False, "grade": "inconclusive", "reasons": ["one reason"]},
        "front": {"losses": rows, "unseen": "39 drawn from test", "levels": [level], "weakest": weak, "unknown": ["how it answers in Latin"],
                  "of": {"method": "ssd", "seed": 0, "passed": False}},
    }  # fmt: skip


def printed(one: dict[str, Any], width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table.show(one, width))
    return console.file.getvalue()


# numbers


def test_losses_of_forget_and_of_unseen_records_of_the_same_kind():
    """Of a class: quantiles of all its forget records and of those of test that show it; references together; nothing after where nothing is shown."""
    model, task, split = digits()
    refs = tuple(retrained("digits", "class", k) for k in range(2))
    after = retrained("digits", "class", 3)
    p = Probe(model, after, task, split, refs)
    found, note = front.losses(p)
    assert [(r["records"], r["model"]) for r in found] == [(g, m) for g in ("forget", "unseen") for m in ("before", "after", "retrained")]
    threes = split.test.y == 3
    assert [r["n"] for r in found] == [109, 109, 218, int(threes.sum()), int(threes.sum()), 2 * int(threes.sum())] and note.startswith("39 ")
    mine = p.seen(model, "test").nll[threes].double().quantile(torch.tensor(front.AT, dtype=torch.double))
    assert found[3]["at"] == pytest.approx(mine.tolist()) and found[1]["at"][2] > 100 * found[0]["at"][2]
    alone, note = front.losses(replace(p, after=model, references=(), split=replace(split, test=None), cache={}))
    assert {r["model"] for r in alone} == {"before"} and "from validation" in note
    none, note = front.losses(replace(p, split=replace(split, test=None, validation=None), cache={}))
    assert {r["records"] for r in none} == {"forget"} and "was given" in note


@pytest.mark.parametrize(("kind", "what"), [
    ("classification", "accuracy"), ("regression", "share of the targets' variance explained"), ("multilabel", "share of right answers"),
    ("causal_lm", "probability per token"), ("text_classification", "accuracy"), ("contrastive", "accuracy"), ("gan", ""), ("image_to_image", ""),
])  # fmt: skip
def test_every_modality_says_how_good_its_models_are_or_nothing(kind, what):
    model, task, split = small(kind)
    found = front.levels(Probe(model, model, task, split))
    assert {r["what"] for r in found} == ({what} if what else set())
    assert all(r["after"] is None and math.isfinite(r["before"]) and r["above"] <= 1 for r in found)
    assert not what or {r["part"] for r in found} >= {"retain", "test"}


def test_levels_leave_out_the_removed_class():
    """A model that lost the class alone is as good as before; one that is wrong elsewhere is not."""
    model, task, split = digits()
    lost = copy.deepcopy(model)
    with torch.no_grad():
        list(lost.modules())[-1].bias[3] = -1e4
    rows = {r["part"]: r for r in front.levels(Probe(model, lost, task, split))}
    assert rows["test"]["after"] >= rows["test"]["before"] > 0.97 and rows["test"]["n"] == int((split.test.y != 3).sum())
    counts = split.retain.y.bincount()
    assert rows["retain"]["chance"] == pytest.approx(int(counts.max()) / len(split.retain))
    assert rows["retain"]["above"] == pytest.approx((rows["retain"]["before"] - rows["retain"]["chance"]) / (1 - rows["retain"]["chance"]))


def test_levels_of_constants_are_at_chance():
    """The best constant: 0 above chance for targets; for texts, a model that says each token by its share is at 0."""
    model, task, split = small("regression")
    with torch.no_grad():
        model[-1].weight.zero_()
        model[-1].bias.fill_(float(split.retain.y.mean()))
    level = of(task).level(Probe(model, model, task, split), model, "retain")
    assert level is not None and level.value == pytest.approx(0, abs=1e-5)
    model, task, split = small("causal_lm")
    said = torch.cat([t[where] for t, where in zip(split.retain.tokens, split.retain.targets, strict=True)])
    p = Probe(model, model, task, split)
    level = of(task).level(p, model, "retain")
    shares = said.bincount(minlength=model.config.vocab_size).double() / len(said)
    constant = [-float(shares[t[where]].log().mean()) for t, where in zip(split.retain.tokens, split.retain.targets, strict=True)]
    assert level is not None and level.chance == pytest.approx(sum(math.exp(-c) for c in constant) / len(constant)) and level.above < 0.1


def finding(name: str, rule: str, state: str) -> Finding:
    return Finding("output", name, rule, state, "why")


def test_the_weakest_link():
    rows = [Row("a", 0.2, 0.1, 0.3, 50), Row("b", 0.9, 0.8, 1.0, 50), Row("c", 0.5, 0.4, 0.6, 50), Row("d", 0.02, 0.01, 0.04, 50)]
    holds = [finding("b", ">= 0.5", "holds"), finding("d", "<= 0.05", "holds")]
    fails = [Named("B4", "averaging does not bring it back", "FAIL", "restore 0.65"), Named("D5", "x", "FAIL", "y")]
    assert front.weakest([], rows, []) == front.weakest([finding("z", "<= 1", "missing")], rows, []) == {}
    found = front.weakest(holds, rows, fails[1:])
    assert (found["name"], found["state"], found["value"]) == ("d", "holds", 0.02) and found["room"] == pytest.approx(0.2)
    thin = [*holds, finding("c", "0.45..0.55", "thin")]
    assert front.weakest(thin, rows, [])["name"] == "c"
    assert front.weakest(thin, rows, fails)["name"] == "B4" and front.weakest(thin, rows, fails)["state"] == "failed"
    worst = front.weakest([*thin, finding("a", "<= 0.15", "broken"), finding("c", "<= 0.1", "broken")], rows, fails)
    assert (worst["name"], worst["low"], worst["high"], worst["n"]) == ("c", 0.4, 0.6, 50)
    assert (
        glance.weakest({"front": {"weakest": front.weakest(thin, rows, fails)}})
        == "The weakest link: averaging does not bring it back (B4): restore 0.65. It failed."
    )
    assert "20 % of what the rule allows is left" in glance.weakest({"front": {"weakest": found}})


def test_what_is_not_known():
    model, task, split = small("classification")
    p = Probe(model, model, task, split)
    findings = [finding("accuracy.forget", "<= 1", "missing"), finding("x.y", "<= 1", "unusable"), finding("z", "<= 1", "holds")]
    checks = [Named("A1", "s", "UNKNOWN", "w"), Named("A8", "s", "UNKNOWN", "w", absent=True), Named("B2", "s", "PASS", "w")]
    said = front.unknown(p, findings, checks, [Refusal("r", "why")])
    assert said[0] == f"what was not measured: {WORDS['accuracy.forget']} (accuracy.forget)" and said[1].endswith("model and data: x.y (x.y)")
    assert [s.rpartition("(")[2] for s in said[2:5]] == ["closeness)", "return)", "utility)"]
    assert said[5].endswith("no reference was at hand, or none was believed") and said[6] == "1 named check that could not be decided: A1"
    with_reference = front.unknown(replace(p, references=(model,)), (), (), [Refusal("r", "why")])
    assert with_reference == ["1 of 2 references were not believed"]


def test_rows_that_default_gates_read_have_words():
    """All modalities, with and without references; what a modality asks for besides is named in words, too."""
    for name in MODALITIES:
        if name in ("diffusion", "image_to_image"):
            continue
        model, task, split = small(name)
        for refs in ((), (model,), (model, model), (model, model, model)):
            if refs and name in ("causal_lm", "gan", "contrastive") and len(refs) > 1:
                continue
            rules = of(task).rules(Probe(model, model, task, split, refs))
            assert rules and set(rules) <= WORDS.keys(), (name, set(rules) - WORDS.keys())


# page and terminal


def test_page_one_in_the_terminal_and_on_the_page():
    one = fronted()
    text = printed(one, 100)
    flat = " ".join(text.split())
    order = ["Forget class 3", "NOT PASSED INCONCLUSIVE", "losses, on a logarithmic scale", "forgotten before", "The weakest link", "On kept records",
             "near copy", "Not known: how it answers in Latin.", "share of", "ssd: accuracy.forget is 0.5"]  # fmt: skip
    assert [flat.index(part) for part in order] == sorted(flat.index(part) for part in order)
    assert (
        "accuracy 0.99 before, 0.97 after; chance is 0.11" in flat
        and "reads 0.4 (0.2 to 0.6, n = 148); it must be at most 0.5. The interval reaches over" in flat
    )
    assert "After: ssd, seed 0, which did not pass. Bars" in flat and glance.about({"front": {"of": {"method": "ssd", "passed": True}}}) == ""
    page = html.render(one)
    words = Tags(page).text
    assert "After: ssd, seed 0, which did not pass. Bars" in words
    order = [
        "Not passed: inconclusive",
        "Losses of forgotten",
        "Weakest link",
        "How good it is",
        "Near copies",
        "Not known",
        "Why",
        "one reason",
        "What was asked",
    ]
    assert [words.index(part) for part in order] == sorted(words.index(part) for part in order)
    assert "forgotten records, before" in page and "39 drawn from test" in words and "how it answers in Latin" in words and page.count("<svg") == 1
    assert "BEWARE" not in text and "BEWARE" not in page


@pytest.mark.parametrize("low", [["retain"], ["retain", "test"], ["test"], ["general"]])
def test_a_model_that_is_no_better_than_chance_leaps_to_the_eye(low):
    one = fronted()
    levels = [{**one["front"]["levels"][0], "part": part} for part in ("retain", "test", "general")]
    one["front"]["levels"] = [{**level, "before": 0.12, "above": 0.01} if level["part"] in low else level for level in levels]
    said = glance.warnings(one)
    (text,) = said
    assert text.startswith("BEWARE") == (low != ["test"]) and "accuracy 0.12 where chance is 0.11" in text
    assert all(glance.PARTS[part] in text for part in low)
    flat, page = " ".join(printed(one, 100).split()), html.render(one)
    assert text in flat and flat.index(text) < flat.index("losses, on") and f'<div class="{"caution" if low == ["test"] else "beware"} prose">' in page
    one["front"]["levels"][0]["above"] = None
    assert any(t.startswith("BEWARE") for t in glance.warnings(one)), "what cannot be read is no proof of health"


def test_a_model_fed_wrongly_is_seen_by_an_audit():
    """Digits upside down in brightness: the report of an audit says so, that of the same audit as it should be does not."""
    model, task, split = digits()
    wrong = replace(split, **{n: replace(getattr(split, n), x=-40 * getattr(split, n).x) for n in ("forget", "retain", "test", "validation")})
    after = copy.deepcopy(model)
    with torch.no_grad():
        list(after.modules())[-1].bias[3] -= 5
    for data, expected in ((split, []), (wrong, ["BEWARE"])):
        made = audited(model, after, task, data, slow=False).document(pictures=False)
        assert [said.split(":")[0] for said in glance.warnings(made)] == expected
        assert json.loads(table.dump(made))["front"]["levels"]


def test_pictures_of_losses():
    assert layout.bars([], 80) == [] and plots.bands([]) == ""
    for at in ([0.0, 0.0, 0.0, 0.0, 0.0], [-1.0, 0.0, 0.5, 1.0, 2.0], [1e-9, 1.0, 10.0, 100.0, 1e6]):
        rows = [("forget", "before", at), ("planted", "after", at)]
        for width in (40, 60, 200):
            lines = [line.plain for line in layout.bars(rows, width)[:-1]]
            assert all(len(line) <= width for line in lines) and lines[1].count("┃") == lines[2].count("┃") == 1 and lines[2].startswith("  planted")
        assert plots.bands(rows).startswith("<svg") and not re.search(r"[ \"M](nan|inf)", plots.bands(rows))
    damaged = [{"records": "forget", "model": "m", "at": at} for at in (None, [1, 2], [1, 2, 3, 4, math.nan], "12345")]
    assert glance.losses({"front": {"losses": damaged}}) == []


@pytest.mark.parametrize("key", ["losses", "unseen", "levels", "weakest", "unknown", "of"])
@pytest.mark.parametrize("value", [None, {}, [], "", [3, None, {}], {"a": 1}, 7])
def test_any_part_of_page_one_may_be_damaged(key, value):
    one = fronted()
    one["front"][key] = value
    assert "Not passed" in html.render(one) and printed(one, 80)
    one["front"] = value
    assert "Not passed" in html.render(one) and printed(one, 80)


def test_what_page_one_says_is_not_said_again_among_notes():
    one = fronted()
    own = ["accuracy.forget: unusable here (the model ...)", "No retrained reference was at hand: nothing is claimed.", "accuracy.forget fell", "one note"]
    one["notes"] = own
    assert glance.notes(one) == own[2:] and glance.notes({**one, "front": {}}) == own


def test_reasons_of_a_search_are_two_for_each_method():
    tries = [attempt("salun", s, 0.5, reasons=[f"r{k}" for k in range(5)]) for s in (0, 1)]
    lost = attempt("duck", 0, 0.5, rows=[], outcome="diverged", reason="loss is inf")
    one = {"verdict": {"passed": False, "reasons": ["all of it"]}, "tries": [*tries, lost, attempt("ssd", 0, 0.5, rows=[])]}
    assert glance.reasons(one) == ["salun: r0; r1; and 3 more, in the report", "duck: diverged: loss is inf"]
    assert glance.reasons({**one, "tries": tries[:1]}) == glance.reasons({**one, "verdict": {"passed": True, "reasons": ["all of it"]}}) == ["all of it"]


# checks that do not exist


def test_checks_that_do_not_exist_are_one_line():
    model, task, split = small("regression")
    found = named(Probe(model, model, task, split), [])
    away = sorted(n.id for n in found if n.absent)
    assert "A8" in away and "A1" not in away and all(n.verdict == "UNKNOWN" for n in found if n.absent)
    sections = grouped(found)
    counted = sum(n for s in sections for n in s["count"].values())
    assert sorted(i for s in sections for i in s["absent"]) == away and counted == len(found) - len(away) == sum(len(s["checks"]) for s in sections)
    one = {**fronted(), "task": "regression", "sections": sections}
    line = f"{len(away)} named checks do not exist for regression: {', '.join(away)}"
    flat, words = " ".join(printed(one, 100).split()), Tags(html.render(one)).text
    assert flat.count(line) == 1 and words.count(line) == 1 and glance.absent(one) == line
    assert "nothing measures this" not in flat and "nothing measures this" not in words
    empty = {**one, "sections": [{"id": "B", "title": "Robustness", "verdict": "UNKNOWN", "count": {}, "checks": [], "absent": ["B2"]}]}
    assert "Robustness" not in printed(empty, 100) and "1 named check does not exist for regression: B2" in Tags(html.render(empty)).text
    assert glance.absent({"sections": [{"absent": []}, {}]}) == ""


# width


def wide() -> dict[str, Any]:
    one = fronted()
    names = ("klom_ratio.forget", "gap_closed.relearning", "repair.free", "drop.test", "memorised.extraction_strength.forget")
    one["rules"] = {"accuracy.forget": "<= 0.1", **dict.fromkeys(names, "<= 1")}
    for t in one["tries"]:
        t["rows"] = [*t["rows"], *(row(name, 0.123, 0.0459, 0.101) for name in names)] if t["rows"] else []
    one["tries"] += [attempt("knowledge_unlearning", 0, 0.5)]
    one["baselines"]["reset_last"] = [row("accuracy.forget", 1.0, 0.97, 1.0)]
    return one


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_narrow_terminals_show_fewer_columns_and_no_broken_word(width):
    one = wide()
    text = printed(one, width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    heads, rows = [h for h in table.headings(one) if h != "runs"], [(r.method, *r.cells, r.cost, r.outcome) for r in table.columns(one)]
    start = next(k for k, line in enumerate(lines) if line.startswith(" method"))
    body = "\n".join(lines[start - 3 :])
    shown = [k for k, head in enumerate(heads) if all(re.search(rf"(?<!\S){re.escape(word)}(?!\S)", body) for word in head.split())]
    assert {0, 1, len(heads) - 1} <= set(shown) and len(shown) >= {60: 3, 80: 4, 100: 5, 200: 8}[width]
    for k in shown:
        for cells in rows:
            for part in layout.broken(cells[k]).split("\n"):
                if re.search(r"\d", part):
                    assert part in body, "figures stand on one line"
                assert all(re.search(rf"(?<!\S){re.escape(word)}(?!\S)", body) for word in part.split()), part
    hidden = len(heads) - len(shown)
    assert (f"{hidden} more columns are in the report" in " ".join(body.split())) == (hidden > 0)


def test_more_width_never_shows_less():
    widths = [20, 12, 11, 30, 9, 12, 10, 8]
    counts = [len(layout.fitting(widths, w)) for w in range(30, 200)]
    assert counts == sorted(counts) and counts[0] == 2 and counts[-1] == len(widths)
    for w in range(30, 200):
        shown = layout.fitting(widths, w)
        assert len(shown) == 2 or 2 + sum(widths[k] for k in shown) + layout.GAP * (len(shown) - 1) <= w


def test_a_name_wider_than_the_terminal_still_prints():
    one = wide()
    one["tries"][0]["method"] = "m" * 90
    assert "mmm" in printed(one, 60)


def test_modules_without_a_last_layer_do_not_matter():
    """`front` reads any module of the task, whatever it is made of."""
    _, task, split = small("classification")

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(64, 10))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1) @ self.w

    found = front.front(Probe(Flat(), Flat(), task, split), None, (), ())
    assert found["losses"][0]["at"] == pytest.approx([math.log(10)] * 5) and found["weakest"] == {} and "BEWARE" in glance.warnings({"front": found})[0]
