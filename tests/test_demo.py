"""The demo in small: one seed, both scenarios, each in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from expunge.audits.grade import GRADES
from expunge.demos.digits import METHODS, SCENARIOS, demo, told
from expunge.report import glance


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tuple[Any, dict[str, Any], list[str]]:
    folder, heard = tmp_path_factory.mktemp("demo"), []
    return folder, demo(folder, seeds=1, progress=lambda text, done, total: heard.append(text)), heard


@pytest.mark.slow
def test_demo_leaves_reports_and_a_patch_that_was_undone(done):
    folder, result, heard = done
    assert set(result["scenarios"]) == {"class", "wrong"} == set(SCENARIOS) and result["reverted"] == {"class": True, "wrong": True}
    assert {text.split(":")[0] for text in heard} == {"class", "wrong"}
    for name, document in result["scenarios"].items():
        assert (folder / name / "report.html").exists()
        assert json.loads((folder / name / "report.json").read_text())["title"] == document["title"]
        assert {t["method"] for t in document["tries"]} == set(METHODS[name])
        passed = document["verdict"]["passed"]
        assert (folder / name / "patch.safetensors").exists() == passed == (document["chosen"] is not None)
        assert passed or (folder / name / "candidate" / "NOT-PASSED.txt").exists()


@pytest.mark.slow
def test_forgetting_can_be_measured_in_both_scenarios(done):
    """Every rule passes its self-test, and the losses of what had to go tell the original from models that never saw it."""
    _, result, _ = done
    for document in result["scenarios"].values():
        assert document["references"] == 3 and document["selftest"] and all(t["usable"] for t in document["selftest"])
        losses: Mapping[tuple[str, str], list[float]] = {(r["records"], r["model"]): r["at"] for r in document["front"]["losses"]}
        assert losses["forget", "before"][-1] < losses["forget", "retrained"][0] and len(losses) == 6
        assert glance.warnings(document) == [] and glance.weakest(document)
        assert {t["grade"] for t in document["tries"] if t["rows"]} <= set(GRADES)


@pytest.mark.slow
def test_what_the_terminal_says_after_it(done):
    _, result, _ = done
    lines = told(result, "here")
    text = "\n".join(lines)
    assert "class: forget class:3 (109 of 1000 records). 8 methods, 8 audited runs:" in text and "wrong: forget 50 records with wrong labels" in text
    assert text.count("Median loss of what had to go") == 2 and text.count("the model is bit-identical") == 2 and "here/wrong/report.html" in text
