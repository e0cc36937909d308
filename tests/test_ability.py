"""Result files of lm-evaluation-harness: differences and bounds by hand, files that cannot be compared, hostile files, and the way into a report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from worlds import small

from expunge.audits.core import gate
from expunge.audits.grade import Grade
from expunge.audits.language import ability
from expunge.core.errors import DataError, SettingError
from expunge.core.stats import Z
from expunge.planning import outcome


def results(acc: float = 0.6, error: Any = 0.03, **more: Any) -> dict[str, Any]:
    """A file as lm_eval 0.4 writes it, cut to what matters."""
    return {
        "results": {
            "hellaswag": {"alias": "hellaswag", "acc,none": acc, "acc_stderr,none": error, "acc_norm,none": 0.7, "acc_norm_stderr,none": 0.01},
            "gsm8k": {"alias": "gsm8k", "exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": 0.0, "exact_match,flexible-extract": 0.5,
                      "exact_match_stderr,flexible-extract": 0.0},
            "wikitext": {"alias": "wikitext", "word_perplexity,none": 12.0, "word_perplexity_stderr,none": "N/A"},
            "group": {"alias": "group", " ": " "},
        },
        "versions": {"hellaswag": 1.0}, "n-shot": {"hellaswag": 0}, "n-samples": {"hellaswag": {"original": 10042, "effective": 200}},
        "higher_is_better": {"hellaswag": {"acc": True}, "wikitext": {"word_perplexity": False}}, "git_hash": "abc", **more,
    }  # fmt: skip


def put(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_after_minus_before_by_hand(tmp_path):
    """0.56 (0.04) after and 0.60 (0.03) before: -0.04 with a standard error of 0.05."""
    a, b = put(tmp_path / "a.json", results()), put(tmp_path / "b.json", results(0.56, 0.04))
    rows = {r.name: r for r in ability.read(a, b)}
    assert list(rows) == ["ability.hellaswag.acc", "ability.hellaswag.acc_norm", "ability.gsm8k.exact_match.strict-match",
                          "ability.gsm8k.exact_match.flexible-extract", "ability.wikitext.word_perplexity"]  # fmt: skip
    acc = rows["ability.hellaswag.acc"]
    assert (acc.value, acc.low, acc.high) == pytest.approx((-0.04, -0.04 - Z * 0.05, -0.04 + Z * 0.05)) and acc.n == 200
    assert acc.note == "0.56 after, 0.6 before"
    sure = rows["ability.gsm8k.exact_match.strict-match"]
    assert (sure.value, sure.low, sure.high, sure.n) == (0, 0, 0, 0)
    wide = rows["ability.wikitext.word_perplexity"]
    assert wide.value == 0 and (wide.low, wide.high) == (-math.inf, math.inf) and wide.note.endswith("lower is better; a standard error is missing")
    assert gate([acc], {"ability.hellaswag.acc": ">= -0.2"}) == [] and "too few records" in gate([acc], {"ability.hellaswag.acc": ">= -0.05"})[0]
    assert gate([wide], {"ability.wikitext.word_perplexity": "<= 1"})
    back = ability.read(b, a)[0]
    assert (back.value, back.low, back.high) == pytest.approx((-acc.value, -acc.high, -acc.low))


def test_a_folder_with_one_file(tmp_path):
    """As --output_path leaves it: a folder named after the model, in it the results and the samples."""
    put(tmp_path / "before" / "model" / "results_2026-11-21T10-00-00.json", results())
    put(tmp_path / "before" / "model" / "samples_hellaswag_2026.jsonl", "{}")
    after = put(tmp_path / "after" / "model" / "results_2026-11-21T11-00-00.json", results(0.5))
    assert ability.read(tmp_path / "before", tmp_path / "after")[0].value == pytest.approx(-0.1)
    put(after.with_name("results_2026-11-21T12-00-00.json"), results())
    with pytest.raises(DataError, match=r"after holds 2 files results_\*.json: name the one"):
        ability.read(tmp_path / "before", tmp_path / "after")
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="holds no files"):
        ability.read(tmp_path / "none", after)


def test_broken_values_are_never_a_pass(tmp_path):
    a = put(tmp_path / "a.json", results())
    for value, error in ((math.nan, 0.1), (math.inf, 0.1), (0.5, math.nan), (0.5, math.inf), (0.5, None)):
        row = ability.read(a, put(tmp_path / "b.json", results(value, error)))[0]
        assert (row.low, row.high) == (-math.inf, math.inf) and gate([row], {row.name: ">= -1"})


def swapped(**values: Any) -> dict[str, Any]:
    return {"results": {"hellaswag": values}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not JSON"),
        ("[" * 200_000, "nested too deeply"),
        ('{"results": {"t": {"acc,none": ' + "9" * 5000 + "}}}", "is not JSON"),
        ("[]", "holds no 'results'"),
        ({"results": [1]}, "holds no 'results'"),
        ({"results": {}}, "holds no metric such as 'acc,none'"),
        ({"results": {"t": {"acc": 1.0}}}, "holds no metric"),
        ({"results": {"t": 1}}, "the results of task 't' are no object"),
        (swapped(**{"acc,none": "0.5"}), "'acc,none' of task 'hellaswag' is '0.5', not a number"),
        (swapped(**{"acc,none": True}), "is True, not a number"),
        (swapped(**{"acc,none": [1]}), "not a number"),
        (swapped(**{"acc,none": 10**400}), "not a number"),
        (swapped(**{"acc,none": 0.5, "acc_stderr,none": -0.1}), "standard error of 'acc,none' of task 'hellaswag' is -0.1"),
        (swapped(**{"acc,none": 0.5, "acc_stderr,none": "much"}), "is 'much', not a number of at least 0"),
        (swapped(**{"acc,none": 0.5}), "lacks 'acc_norm,none' of task 'hellaswag' and 1 more|lacks 'exact_match,flexible-extract' of task 'gsm8k' and 3 more"),
        (results(versions={"hellaswag": 2.0}), "task 'hellaswag' has another version in .*a.json .1.0. than in .*b.json .2.0.: these are not comparable"),
        (results(**{"n-shot": {"hellaswag": 5}}), "another number of shots"),
        (results(**{"n-samples": {"hellaswag": {"effective": 100}}}), "another number of samples"),
    ],
)
def test_files_that_cannot_be_read_or_compared(tmp_path, content, message):
    a, b = put(tmp_path / "a.json", results()), put(tmp_path / "b.json", content)
    with pytest.raises(DataError, match=message) as error:
        ability.read(a, b)
    assert "\n" not in str(error.value) and len(str(error.value)) < 700


def test_files_that_are_not_there_too_large_or_not_text(tmp_path, monkeypatch):
    a = put(tmp_path / "a.json", results())
    with pytest.raises(DataError, match=r"cannot read .*gone.json: No such file"):
        ability.read(a, tmp_path / "gone.json")
    (tmp_path / "raw.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(DataError, match="is not JSON"):
        ability.read(a, tmp_path / "raw.json")
    monkeypatch.setattr(ability, "MAX_BYTES", 100)
    with pytest.raises(DataError, match=r"a\.json is larger than 100 bytes"):
        ability.read(a, a)


def test_names_from_a_file_stay_on_one_line(tmp_path):
    odd = {"results": {"a\n\x1b[31mb" + "c" * 500: {"acc,none": 0.5, "acc_stderr,none": 0.1}}}
    (row,) = ability.read(put(tmp_path / "a.json", odd), put(tmp_path / "b.json", odd))
    assert row.name.isprintable() and len(row.name) == 200
    odd["results"]["x\ny"] = {"acc,none": "\n\n"}
    with pytest.raises(DataError) as error:
        ability.read(put(tmp_path / "a.json", odd), put(tmp_path / "b.json", odd))
    assert str(error.value).isprintable()


def test_rows_reach_the_report(tmp_path):
    model, task, split = small("causal_lm")
    verdict = outcome.audited(model, model, task, split, rules={"drop.retain": "<= 0.5"}, slow=False)
    rows = ability.read(put(tmp_path / "a.json", results()), put(tmp_path / "b.json", results(0.2)))
    shown = ability.added(verdict, rows)
    assert not verdict.passed and shown.passed is verdict.passed and len(shown.tries[0].rows) == len(verdict.tries[0].rows) + len(rows)
    document = shown.save(tmp_path / "out")
    assert {r["name"] for r in document["tries"][0]["rows"]} >= {r.name for r in rows}
    assert "ability.hellaswag.acc" in (tmp_path / "out" / "report.html").read_text() and json.loads((tmp_path / "out" / "report.json").read_text())
    with pytest.raises(SettingError, match=r"the rule on ability\.mmlu\.acc reads no row; there are: ability\.hellaswag\.acc"):
        ability.added(verdict, rows, {"ability.mmlu.acc": ">= 0"})
    with pytest.raises(SettingError, match="no try was audited"):
        ability.added(outcome.replace(verdict, tries=(), chosen=None), rows)


def test_a_broken_rule_refuses_what_passed(tmp_path):
    model, task, split = small("causal_lm")
    tried = outcome.Try(outcome.Attempt("npo", {}, 0, "ok", "", None), (), grade=Grade("verified"))
    good = outcome.Verdict(True, [], tried, (tried,), {}, (), outcome.Probe(model, model, task, split))
    rows = ability.read(put(tmp_path / "a.json", results()), put(tmp_path / "b.json", results(0.2)))
    kept = ability.added(good, rows, {"ability.hellaswag.acc": ">= -0.6"})
    assert kept.passed and kept.chosen is kept.tries[0] and kept.chosen.passed and "No self-test: ability.hellaswag.acc" in kept.notes[-1]
    lost = ability.added(good, rows, {"ability.hellaswag.acc": ">= -0.1"})
    assert not lost.passed and lost.chosen is None and lost.reasons == list(lost.tries[0].reasons) and "ability.hellaswag.acc is -0.4" in lost.reasons[0]
    assert good.passed and good.rules == {} and lost.rules == {"ability.hellaswag.acc": ">= -0.1"}
