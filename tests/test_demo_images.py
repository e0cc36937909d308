"""The demo that draws: its world and its words without training, and all of it in a slow test."""

from __future__ import annotations

import json

import pytest

from expunge.audits.core import CHECKS
from expunge.core.registry import METHODS
from expunge.demos import pictures as demo_images
from expunge.modalities.worlds import world
from expunge.planning.plan import plan


def test_the_request_is_one_that_its_methods_can_carry_out():
    w = world(demo_images.WORLD)
    split = w.split(demo_images.SCENARIO)
    assert (
        split.asked == "style:striped" and {r["style"] for r in split.forget.rows} == {"striped"} and "striped" not in {r["style"] for r in split.retain.rows}
    )
    feasible = [o.method for o in plan(w.task, split, settings=demo_images.SETTINGS) if o.feasible and o.method in demo_images.METHODS]
    assert feasible[0] == demo_images.METHODS[0] == "uce" and set(feasible) == set(demo_images.METHODS)
    assert all(METHODS[name].settings(s) for name, s in demo_images.SETTINGS.items()) and "canvas" in CHECKS


def test_what_the_command_says():
    right = {"style": {"plain": [9, 10], "striped": [10, 10]}, "object": {"disc": [7, 10]}}
    document = {"pictures": {"retainability": [{"erased": "striped", "right": {}}, {"erased": "", "right": right}]}}
    before = demo_images.untouched(document)
    assert before == {"style": 0.95, "object": 0.7} and demo_images.untouched({}) == demo_images.untouched({"pictures": {"retainability": []}}) == {}
    result = {"before": before, "judge": {"style": 1.0, "object": 0.99}, "reverted": True, "seconds": {"judge": 9.6, "all": 200.2}}
    said = demo_images.told(result, "there")
    assert said[0].startswith("style: the untouched model drew 0.950") and "0.990 of held-out" in said[1] and "there/report.html" in said[2]
    assert said[3].endswith("bit-identical") and said[4] == "judge 10 s, all 200 s"
    assert "NOT bit-identical" in "\n".join(demo_images.told({**result, "reverted": False}, "there"))
    assert not any("revert" in line for line in demo_images.told({**result, "reverted": None}, "there"))


@pytest.mark.slow
def test_demo_erases_a_style_and_keeps_the_rest(tmp_path):
    heard = []
    result = demo_images.demo(tmp_path, progress=lambda text, done, total: heard.append(text))
    assert min(result["before"].values()) >= 0.94 and min(result["judge"].values()) >= 0.95
    assert result["document"]["verdict"]["passed"] and result["reverted"] is True and heard
    page = (tmp_path / "report.html").read_text()
    assert "Drawings before and after" in page and "Retainability" in page and (tmp_path / "patch.safetensors").exists()
    assert json.loads((tmp_path / "report.json").read_text())["asked"] == "style:striped"
