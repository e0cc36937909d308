"""The demo in small: one seed, both scenarios, each in a process of its own."""

from __future__ import annotations

import json

import pytest

from expunge.demos.digits import METHODS, demo


@pytest.mark.slow
def test_demo_leaves_reports_and_a_patch_that_was_undone(tmp_path):
    heard = []
    result = demo(tmp_path, seeds=1, progress=lambda text, done, total: heard.append(text))
    assert set(result["scenarios"]) == {"class", "random"} and result["reverted"] == {"class": True}
    assert {text.split(":")[0] for text in heard} == {"class", "random"}
    for name, document in result["scenarios"].items():
        assert (tmp_path / name / "report.html").exists()
        assert json.loads((tmp_path / name / "report.json").read_text())["title"] == document["title"]
        assert {t["method"] for t in document["tries"]} == set(METHODS)
    assert (tmp_path / "class" / "patch.safetensors").exists()
    assert not result["scenarios"]["random"]["verdict"]["passed"]  # no check can tell there, and the reasons say so
