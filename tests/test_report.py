"""The report: cells and their numbers, strict JSON, and a page that is inert, self-contained, honest and the same twice."""

from __future__ import annotations

import copy
import io
import json
import math
import re
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expunge.core.errors import PatchError
from expunge.report import html, plots, table

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'`${7*7}{{ 7*7 }}-->"
NAN, INF = float("nan"), float("inf")


def row(name: str, value: float, low: float, high: float, n: int = 100, **more) -> dict:
    return {"name": name, "value": value, "low": low, "high": high, "n": n, "note": "", "indicative": False, "at": None, **more}


def attempt(method: str, seed: int, forget: float, **more) -> dict:
    return {
        "method": method, "settings": {"lr": 0.01, "epochs": 2}, "seed": seed, "outcome": "ok", "reason": "", "passed": forget < 0.1, "reasons": [],
        "cost": {"forward": 300, "backward": 300, "seconds": 1.5, "share": 0.02},
        "rows": [
            row("accuracy.forget", forget, forget - 0.02, forget + 0.02), row("accuracy.test", 0.97, 0.95, 0.98, 500), row("gap_closed.klom", NAN, -INF, INF),
        ],
        **more,
    }  # fmt: skip


def document() -> dict:
    curve = {"fpr": [0.0, 0.5, 1.0], "tpr": [0.0, 0.6, 1.0], "auc": 0.55}
    losses = {"before": [1e-9, 0.1, 2.0], "after": [1.0, 2.0, 3.0], "retrained": [1.5, 2.5]}
    return {
        "title": "Forget class 3", "asked": "class:3", "created": "2026-01-02T03:04:05+00:00", "version": "0.1", "machine": "one", "task": "classification",
        "parts": {"forget": 109, "retain": 891, "test": 500, "validation": 297}, "references": 3, "assurance": "approximate",
        "verdict": {"passed": True, "reasons": []},
        "chosen": {
            "method": "salun", "settings": {"lr": 0.01, "epochs": 2}, "seed": 0, "patch": "patch.safetensors", "digest": "ab" * 32, "places": 4321,
            "cost": {"forward": 300, "backward": 300, "seconds": 1.5, "share": 0.02},
        },
        "rules": {"accuracy.forget": "<= 0.1", "membership.excess": "-0.1..0.1"},
        "tries": [
            attempt("salun", 0, 0.02), attempt("salun", 1, 0.04), attempt("ssd", 0, 0.5, reasons=["accuracy.forget is 0.5"]),
            attempt("duck", 0, 0.0, rows=[], passed=False, outcome="diverged", reason="loss is inf at step 3"),
        ],
        "baselines": {"original": [row("accuracy.forget", 1.0, 0.97, 1.0)], "retrained": [row("accuracy.forget", 0.0, 0.0, 0.03)]},
        "selftest": [
            {"name": "accuracy.forget", "rule": "<= 0.1", "original": "1 (0.97 to 1)", "retrained": "0 (0 to 0.03)", "usable": True},
            {"name": "membership.excess", "rule": "-0.1..0.1", "original": "0 (0 to 0)", "retrained": "0 (0 to 0)", "usable": False},
        ],
        "notes": ["one note"], "near": {"n": 1, "pairs": [[17, 42, 0.994]], "compared": {"forget": 109, "retain": 891}},
        "identity": {"patch": "ab" * 32, "before": "cd" * 32, "after": "ef" * 32, "parts": {"forget": {"n": 109, "digest": "01" * 32}}, "seed": 0},
        "sha256": "23" * 32,
        "pictures": {
            "loss": {"forget": losses, "retain": losses, "test": losses}, "roc": {"before": curve, "after": curve, "retrained": curve},
            "confusion": {"before": [[5, 1], [0, 6]], "after": [[5, 1], [6, 0]]},
            "offenders": [{"id": 7, "label": 3, "before": 0.1, "after": 0.2, "retrained": NAN}],
            "scatter": [{"method": m, "seed": 0, "forgetting": f, "utility": 0.97, "cost": 600, "passed": f > 0.9} for m, f in (("salun", 0.98), ("ssd", 0.5))],
        },
    }  # fmt: skip


def unpictured() -> dict:
    """The document without pictures, which take most of the time."""
    return {**document(), "pictures": {}}


class Tags(HTMLParser):
    """Collects tags and attributes as a browser would see them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def poisoned(value):
    """The same structure with every text and key replaced by a payload; the keys of the schema stay."""
    if isinstance(value, str):
        return EVIL
    if isinstance(value, dict):
        return {k: poisoned(v) for k, v in value.items()}
    return [poisoned(v) for v in value] if isinstance(value, list) else value


def test_number_and_interval():
    assert table.interval(row("a", 0.97, 0.95, 0.98, 500)) == "0.97 (0.95 to 0.98, n = 500)"
    assert table.interval({"value": 0.97, "low": 0.95, "high": 0.98}) == "0.97 (0.95 to 0.98)"
    assert table.interval(row("a", NAN, 0.0, 1.0)) == table.interval(row("a", 1.0, 0, 0) | {"value": None}) == "not measurable"
    assert table.interval(row("a", 0.5, -INF, 1.0, 3)) == "0.5 (no interval, n = 3)"
    assert table.interval(row("cost.forward", 327.0, 327.0, 327.0, 1)) == "327"
    assert table.interval(None) == "-"
    assert [table.number(v) for v in (True, "x", -0.0, 12345.6, INF)] == ["not measurable", "not measurable", "0", "12,346", "not measurable"]


def test_one_line_per_method_with_mean_and_spread_over_seeds():
    lines = {line.method: line for line in table.columns(document())}
    assert list(lines) == ["original, untouched", "retrained, held out", "salun", "ssd", "duck"]
    assert [c.name for c in table.figures(document())] == ["accuracy.forget", "accuracy.test", "gap_closed.klom"]
    assert lines["salun"].cells == ("0.03 (0.02 to 0.04, 2 runs)", "0.97 (0.97 to 0.97, 2 runs)", "not measurable")
    assert lines["salun"].outcome == "2 passed" and lines["salun"].cost == "2 %"
    assert lines["ssd"].cells[0] == "0.5 (0.48 to 0.52, n = 100)" and lines["ssd"].outcome == "not passed"
    assert lines["duck"].outcome == "diverged" and set(lines["duck"].cells) == {"-"}


def test_a_run_without_a_figure_is_counted_and_not_averaged():
    one = document()
    one["tries"][1]["rows"][0].update(value=NAN)
    assert next(line for line in table.columns(one) if line.method == "salun").cells[0] == "0.02 (0.02 to 0.02, 1 of 2 runs)"


def test_a_tuning_run_that_was_not_audited_is_no_pass():
    one = document()
    one["tries"] = [attempt("salun", 0, 0.02, rows=[], passed=False), attempt("salun", 0, 0.02)]
    line = table.columns(one)[-1]
    assert line.outcome == "1 passed, 1 not audited" and line.runs == "1"


def test_terminal_and_markdown_hold_the_same_cells():
    from rich.console import Console

    one = document()
    one["tries"][2]["method"] = "ss|d [bold]<b>\x1b[31m"
    text = table.markdown(one)
    assert len({line.count("|") - line.count("\\|") for line in text.splitlines()}) == 1
    assert "ss\\|d \\[bold\\]&lt;b&gt; \\[31m" in text and "\x1b" not in text
    console = Console(file=io.StringIO(), width=200)
    console.print(table.show(one))
    printed = console.file.getvalue()
    assert "[bold]" in printed and "\x1b" not in printed and "PASS" in printed and "NOT PASSED" not in printed
    cells = [part for line in table.columns(one) for cell in line.cells for part in re.split(r" \(|, |\)", cell) if part]
    assert all(part in printed for part in cells)
    console.print(table.show({"title": "t"}))
    assert "NOT PASSED" in console.file.getvalue()


def test_json_is_strict():
    given_values = {"a": NAN, "b": [INF, -INF, 1.5], "c": np.float32("nan"), "d": np.int64(3), "e": (1, 2), "f": True, 4: None}
    read = json.loads(table.dump(given_values), parse_constant=lambda c: pytest.fail(f"{c} in JSON"))
    assert read == {"a": None, "b": [None, None, 1.5], "c": None, "d": 3, "e": [1, 2], "f": True, "4": None}
    assert math.isnan(given_values["a"])


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x), max_leaves=12))
@settings(max_examples=50, deadline=None)
def test_json_is_strict_for_anything(value):
    json.loads(table.dump({"v": value}), parse_constant=lambda c: pytest.fail(f"{c} in JSON"))


def test_every_text_is_escaped():
    one = document()
    one["chosen"]["settings"] = {EVIL: EVIL}
    one["rules"], one["baselines"][EVIL], one["parts"][EVIL] = {EVIL: EVIL}, one["baselines"]["original"], 3
    one["gates"] = {EVIL: {"passed": False, "chosen": EVIL, "reasons": [EVIL]}, "b": {}}
    pictures = one["pictures"]
    pictures["loss"][EVIL], pictures["roc"][EVIL], pictures["confusion"][EVIL] = pictures["loss"]["test"], pictures["roc"]["after"], [[1]]
    bad = poisoned(one)
    bad["rules"], bad["chosen"]["digest"] = {EVIL: EVIL}, EVIL
    bad["tries"][0]["outcome"] = "ok"
    page = html.render(bad)
    parsed = Tags(page)
    assert not {tag for tag, _ in parsed.tags} & {"script", "img", "iframe", "object", "link", "base", "form", "a"}
    assert not [name for _, attributes in parsed.tags for name in attributes if name.startswith("on")]
    assert parsed.text.count("alert(1)") > 20 and "7*7" in parsed.text and "49" not in parsed.text


def test_page_needs_nothing_from_outside():
    page = html.render(document())
    parsed = Tags(page)
    assert "http:" not in page and "https:" not in page and "@import" not in page and "//cdn" not in page
    links = [value for _, attributes in parsed.tags for name, value in attributes.items() if name in ("src", "href", "xlink:href", "action", "data")]
    assert links and all(value.startswith(("#", "data:")) for value in links)
    assert all(value.startswith(("#", "data:")) for value in re.findall(r"url\(['\"]?([^)'\"]*)", page))
    policy = [a["content"] for t, a in parsed.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
    assert len([t for t, _ in parsed.tags if t == "svg"]) == 4


@pytest.mark.slow
def test_same_bytes_twice_whatever_the_users_settings_are():
    first = html.render(document())
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black", "svg.fonttype": "path", "svg.hashsalt": "other"}):
        assert html.render(copy.deepcopy(document())) == first
        assert matplotlib.rcParams["font.size"] == 30
    assert not re.search(r"\b(nan|NaN|inf|Infinity|None|undefined)\b", Tags(first).text.replace("loss is inf at step 3", ""))
    assert "not measurable" in first


def test_page_of_a_pass():
    text = Tags(html.render(unpictured())).text
    assert "Passed Every usable rule holds" in text and "Not passed This result" not in text
    assert "1 of 2 rules could be used" in text and "4,321 values written" in text and "ab" * 32 in text
    assert "accuracy.forget how often the model still gives a forgotten record its label <= 0.1 0.02 (0 to 0.04, n = 100) holds" in text
    assert "membership.excess how much better" in text and "-0.1..0.1 - unusable" in text
    assert "loss is inf at step 3" in text and "No retrained reference" not in text


@pytest.mark.parametrize("verdict", [None, {}, {"passed": False}, {"passed": "true"}, {"passed": 1}, {"passed": None, "reasons": None}])
def test_what_is_not_exactly_a_pass_is_none(verdict):
    text = Tags(html.render({**unpictured(), "verdict": verdict})).text
    assert "Not passed This result must not be relied on" in text and "Passed Every" not in text and "do not use it" in text


def test_a_failed_verdict_shows_at_the_top_with_its_reasons():
    one = {**unpictured(), "chosen": None, "verdict": {"passed": False, "reasons": ["salun: accuracy.forget is 0.5"]}}
    text = Tags(html.render(one)).text
    assert text.index("Not passed") < text.index("salun: accuracy.forget is 0.5") < text.index("What was asked")
    assert "No change to the model is put forward" in text and "nothing was applied" in text and "Every measurement of the audited tries" in text


def test_assurance_and_references_in_plain_words():
    words = {
        "exact": "trained again without",
        "approximate": "not by proof",
        "suppression": "This is not a deletion",
        "certified": "A proven bound",
        "": "Not stated",
    }
    for assurance, said in words.items():
        assert said in Tags(html.render({**unpictured(), "assurance": assurance})).text
    assert "Answers are filtered by salun" in Tags(html.render({**unpictured(), "assurance": "suppression"})).text
    none = Tags(html.render({**unpictured(), "references": 0})).text
    assert none.index("No retrained reference was at hand") < none.index("All methods and baselines")
    assert all(claim in none for claim in html.UNREFERENCED)
    assert "Only one retrained reference" in Tags(html.render({**unpictured(), "references": 1})).text


def test_indicative_rows_that_decide_alone_are_named():
    one = unpictured()
    assert "judged by indicative measurements alone" not in html.render(one)
    for t in one["tries"]:
        for r in t["rows"]:
            r["indicative"] = True
    assert "judged by indicative measurements alone" in html.render(one)


@pytest.mark.parametrize(
    ("rule", "changed", "said"),
    [("<= 0.03", {}, "broken"), ("0..0.05", {}, "holds"), ("< 1", {}, "rule not readable"), ("<= 1", {"high": INF}, "broken"), (">= 0", {"high": INF}, "holds"),
     ("<= 1", {"value": NAN}, "broken")],
)  # fmt: skip
def test_rules_are_read_at_the_worse_end(rule, changed, said):
    one = {**unpictured(), "rules": {"accuracy.forget": rule}}
    one["tries"][0]["rows"][0].update(changed)
    state = html.view(table.strict(one))["required"][0]["state"]
    assert state == said


@pytest.mark.parametrize("key", [k for k in document() if k != "title"])
@pytest.mark.parametrize("empty", ["absent", None, {}, [], ""])
def test_any_key_may_be_missing_or_empty(key, empty):
    one = {**document(), "pictures": {}} if key != "pictures" else document()
    if empty == "absent":
        del one[key]
    else:
        one[key] = empty
    page = html.render(one)
    assert "Forget class 3" in page and page.endswith("</html>\n")
    assert ("Passed</strong>" in page) == (key != "verdict")
    assert table.markdown(one) and table.show(one) and json.loads(table.dump(one))


def test_records_inside_may_be_bare():
    bare = {"tries": [{}], "chosen": {"method": "m"}, "selftest": [{}], "baselines": {"original": [{}]}, "rules": {"a": "<= 1"}}
    drawn = {"offenders": [{}], "scatter": [{}], "loss": {"forget": {"before": []}}, "roc": {"after": {}}, "confusion": {"before": [[1], [1, 2]]}}
    for one in ({"title": "t"}, {"title": "t", **bare, "pictures": drawn}):
        page = html.render(one)
        assert "Not passed" in page and "<svg" not in page


def test_plots_leave_out_what_is_not_finite():
    assert plots.losses({"forget": {"before": [NAN, None]}}) == plots.roc({}) == plots.scatter(None) == plots.confusion({"after": []}) == ""
    for drawn in (
        plots.losses({"forget": {"before": [0.0, 0.0], "after": [NAN, 1e6]}}),
        plots.losses({"forget": {"before": [-1.0]}}),
        plots.roc({"after": {"fpr": [0.0, NAN, 1.0], "tpr": [0.0, 0.5, 1.0], "auc": None}}),
        plots.scatter([{"method": "$a_{", "forgetting": 9.0, "utility": 0.5, "cost": None, "passed": True}, {"method": "名", "forgetting": 0, "utility": 0.5}]),
        plots.confusion({"after": [[0] * 30] * 30}),
    ):
        assert drawn.startswith("<svg") and drawn.endswith("</svg>\n") and "xmlns" not in drawn and not re.search(r"[ \"M](nan|inf)", drawn)
    assert "AUC not measurable" in plots.roc({"after": {"fpr": [0.0, 1.0], "tpr": [0.0, 1.0]}})


def test_labels_of_crowded_points_do_not_cover_each_other():
    names = [f"method_{k}" for k in range(12)]
    drawn = plots.scatter([{"method": n, "seed": 0, "forgetting": 0.9 + k / 100, "utility": 0.97, "cost": 10, "passed": True} for k, n in enumerate(names)])
    assert all(f">{n}</text>" in drawn for n in names)
    found = re.findall(r'<text style="[^"]*" (?:x="[^"]*" y="[^"]*" )?transform="[^"]*?(?:translate\()?([-\d.]+)[ ,]+([-\d.]+)[^"]*"[^>]*>method_\d+<', drawn)
    assert len(found) == 12 and len({(round(float(x) / 4), round(float(y) / 4)) for x, y in found}) == 12


def test_write_is_whole_or_not_at_all(tmp_path):
    path = html.write(unpictured(), tmp_path / "deep" / "report.html")
    assert path.read_bytes().decode("utf-8") == html.render(unpictured())
    assert json.loads(table.write(unpictured(), tmp_path / "report.json").read_text())["title"] == "Forget class 3"
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["report.html"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(PatchError, match="cannot write"):
        html.write(unpictured(), tmp_path / "file" / "report.html")
    assert html.write({"title": "\ud800"}, tmp_path / "odd.html").exists()


def test_named_checks_are_shown_weakest_first():
    """Sections as the audit orders them: all in the page, in the terminal what passed only as a count; text from a document stays text."""
    checks = [
        {"id": "B3", "statement": "relearning", "verdict": "FAIL", "why": "relearning.area 0.4 <b>", "p": 0.001, "row": "relearning.area"},
        {"id": "B2", "statement": "kept records", "verdict": "PASS", "why": "fine", "p": 1.0, "row": "restore.retain"},
    ]
    sections = [
        {"id": "B", "title": "Robustness", "verdict": "FAIL", "count": {"FAIL": 1, "UNKNOWN": 0, "PASS": 1}, "checks": checks},
        {"id": "D", "title": "Process", "verdict": "PASS", "count": {"FAIL": 0, "UNKNOWN": 0, "PASS": 1}, "checks": []},
    ]
    document = {"title": "t", "verdict": {"passed": False, "reasons": []}, "sections": sections}
    page = html.render(document)
    assert page.index("B Robustness: 1 FAIL, 1 PASS") < page.index("B3 relearning") < page.index("B2 kept records") < page.index("D Process: 1 PASS")
    assert "0.4 &lt;b&gt;" in page
    from rich.console import Console

    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table.show(document, 120))
    text = console.export_text()
    assert "B3 relearning" in text and "B2 kept records" not in text and "D Process: 1 PASS" in text
    assert html.render({**document, "sections": [3, {"checks": "x"}, None]})  # a damaged document still renders
