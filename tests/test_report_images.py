"""Drawings in the report: grids from the same noise, heat maps of what a judge names them, and nothing drawn twice."""

from __future__ import annotations

import base64
import copy
import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from worlds import small

from expunge.audits.core import Probe, audit
from expunge.audits.pictures import canvas
from expunge.audits.pictures import drawn as shown
from expunge.core.types import Split
from expunge.modalities import judge as judged
from expunge.modalities.diffusion.worlds import DIGITS
from expunge.report import html, images
from expunge.report.pictures import pictures


class Brightness(nn.Module):
    """Names an image by its mean brightness; the layers are there to have features."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.pool, self.out = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()), nn.Linear(4, classes)
        with torch.no_grad():
            self.out.weight.copy_(torch.linspace(-1, 1, classes)[:, None].expand(-1, 4))
            self.out.bias.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.pool(x))


TONES = ("light", "dark")
JUDGE = judged.Judge(
    {"object": DIGITS, "tone": TONES}, {"object": Brightness(10), "tone": Brightness(2)}, {d: torch.ones(4, dtype=torch.bool) for d in ("object", "tone")}
)


@pytest.fixture
def world(monkeypatch):
    """A model, its task with a judge of two domains, the split, and what was drawn: (model, drawings, steps)."""
    monkeypatch.setattr(canvas, "GONE", 6)
    monkeypatch.setattr(canvas, "KEPT", 36)
    model, task, split = small("diffusion")
    with torch.no_grad():  # an untrained model draws little else than noise: let prompts matter
        for name, p in model.named_parameters():
            if "conv_out" in name or "conv2.weight" in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    both = {"forget": split.forget, "retain": split.retain}
    toned = {n: replace(d, rows=tuple({**r, "tone": TONES[k % 2]} for k, r in enumerate(d.rows))) for n, d in both.items()}
    drawn: list[tuple[nn.Module, int, dict]] = []
    base: Any = task.sample

    def sample(model, data, **options):
        drawn.append((model, len(data), options))
        return base(model, data, **{"steps": 3, **options})

    judged = replace(task, judge=lambda: JUDGE, sample=sample)
    return model, judged, replace(split, **toned), drawn


def moved(model: nn.Module, split: Split, word: str = "seven") -> nn.Module:
    """A copy that reads the word as another one: all else is as it was."""
    twin = copy.deepcopy(model)
    token = split.forget.encode([word])[0, 0]
    with torch.no_grad():
        twin.text_encoder.embedding.weight[token] = 5 * torch.randn(16, generator=torch.Generator().manual_seed(0))  # pyright: ignore
    return twin


def decoded(text: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(text))) as image:
        assert image.format == "PNG" and image.mode == "RGB"
        return np.asarray(image)


def test_one_row_per_concept_and_only_what_the_model_changed_differs(world):
    model, task, split, _ = world
    found = shown.collect(Probe(model, moved(model, split), task, split))
    rows = found["grid"]
    assert [(r["name"], r["side"]) for r in rows] == [
        ("seven", "erased"), *((d, "near") for d in DIGITS if d != "seven"), *((t, "far") for t in TONES)
    ]  # fmt: skip
    for row in rows:
        before, after = decoded(row["before"]), decoded(row["after"])
        assert before.shape == after.shape and len(before) == 8 and 0 < len(before[0]) // 9 <= shown.COLUMNS and len(before[0]) % 9 == 0
        assert (before[:, 8::9] == 255).all() and before.std() > 1
        assert np.array_equal(before, after) == (row["side"] != "erased"), row["name"]


def test_heat_maps_hold_the_judges_counts(world):
    model, task, split, _ = world
    after = moved(model, split)
    p = Probe(model, after, task, split)
    found, seen = shown.collect(p), {row.name: row for row in audit(p, ["canvas"])}
    (untouched, erased), objects = found["retainability"], found["named"]["object"]
    assert (untouched["erased"], erased["erased"], erased["domain"]) == ("", "seven", "object")
    hits, n = erased["right"]["object"]["seven"]
    assert 1 - hits / n == pytest.approx(seen["canvas.ua"].value)
    others = [cell for c, cell in erased["right"]["object"].items() if c != "seven"]
    assert sum(h for h, _ in others) / sum(n for _, n in others) == pytest.approx(seen["canvas.ira"].value)
    assert untouched["right"]["object"] | {"seven": 0} == erased["right"]["object"] | {"seven": 0}
    for which, table in (("before", untouched), ("after", erased)):
        counts = np.array(objects[which])
        assert [int(v) for v in counts.diagonal()] == [table["right"]["object"][c][0] for c in DIGITS]
        assert counts.sum(1).tolist() == [table["right"]["object"][c][1] for c in DIGITS]


def test_nothing_is_drawn_twice(world):
    model, task, split, drawn = world
    p = Probe(model, moved(model, split), task, split)
    audit(p, ["canvas"])
    made = len(drawn)
    assert made >= 2
    again = replace(p, after=copy.deepcopy(p.after), cache=dict(p.cache))  # as a verdict's document asks: the audit's model is gone, its drawings are not
    first = shown.collect(again)
    assert len(drawn) == made and first == shown.collect(p)
    shown.collect(replace(again, after=moved(model, split, "three")))
    assert len(drawn) == made + 1 and drawn[-1][0] is not p.after


@pytest.mark.parametrize("kept", [True, False])
def test_without_a_judge_a_few_prompts_are_drawn(world, kept):
    model, task, split, drawn = world
    split = split if kept else replace(split, retain=None)
    after = moved(model, split)
    found = shown.collect(Probe(model, after, replace(task, judge=None), split))
    assert list(found) == ["grid"] and [(n, o["steps"]) for _, n, o in drawn] == [(shown.PROMPTS, shown.STEPS)] * 2
    assert [r["side"] for r in found["grid"]] == (["erased"] * 2 + ["kept"] * 2 if kept else ["erased"] * 4)
    for row in found["grid"]:
        before, later = decoded(row["before"]), decoded(row["after"])
        assert before.shape == (8, 9, 3) and np.array_equal(before, later) == (row["side"] == "kept")
    ours, theirs = Probe(model, model, replace(task, judge=None, null=None), split), Probe(model, model, replace(task, judge=None, shape=()), split)
    assert shown.collect(ours)["grid"] and drawn[-1][2]["guidance"] == 1.0  # no empty prompt: no guidance
    prompts = {n: replace(d, x=None) for n, d in split.parts().items()}
    assert shown.collect(replace(theirs, split=replace(split, **prompts)))["grid"] == []  # nothing says what shape is drawn


def test_a_request_of_several_concepts_has_a_grid_alone(world):
    model, task, split, _ = world
    mixed = replace(split, forget=replace(split.forget, rows=tuple({**r, "object": DIGITS[k % 3]} for k, r in enumerate(split.forget.rows))))
    assert list(shown.collect(Probe(model, model, task, mixed))) == ["grid"]


def test_other_tasks_draw_nothing():
    model, task, split = small("classification")
    p = Probe(model, model, task, split)
    assert shown.collect(p) == {} and not {"grid", "named", "retainability"} & set(pictures(p, []))


def test_large_and_broken_images_are_made_fit():
    wide = decoded(shown.png(torch.zeros(2, 3, 512, 256)))
    assert wide.shape == (128, 2 * (64 + shown.gap(128)), 3) and (wide[:, :64] == 128).all()
    odd = decoded(shown.png(torch.tensor([float("nan"), 9.0, -9.0, 1.0]).view(1, 1, 2, 2)))
    assert odd[:, :2, 0].tolist() == [[128, 255], [0, 255]]
    assert shown.strips([("a", "near", [0])], {"before": torch.zeros(1, 4, 8, 8), "after": torch.zeros(1, 4, 8, 8)}) == []  # latents are no images


def test_the_page_shows_them_and_opens_without(world):
    model, task, split, _ = world
    found = pictures(Probe(model, moved(model, split), task, split), [])
    shown = {k: found[k] for k in ("grid", "named", "retainability")}
    page = html.render({"title": "t", "task": "diffusion", "pictures": shown})
    assert page.count("<svg") == 4 and page.count("data:image/png;base64,") >= 6  # a grid, two pairs of maps, one map
    for text in ("Drawings before and after", "What the judge names the drawings", "Retainability", "seven (erased)", "three (near)", "dark (far)"):
        assert text in page
    assert html.render({"title": "t", "task": "diffusion", "pictures": shown}) == page
    for empty in ({}, {"grid": []}, {"grid": None, "named": {}, "retainability": []}):
        assert "<svg" not in html.render({"title": "t", "task": "diffusion", "pictures": empty})


def test_what_cannot_be_read_is_left_out():
    good = shown.png(torch.zeros(2, 1, 8, 8))
    evil = "<script>alert(1)</script>"
    assert images.grid([{"name": "a", "before": good, "after": t} for t in (None, 7, evil, good[:40], base64.b64encode(b"GIF89a").decode())]) == ""
    painted = images.grid([{"name": evil, "side": "near", "before": good, "after": good}, {"before": good}])
    assert painted.startswith("<svg") and "<script" not in painted and "&lt;script&gt;" in painted
    assert images.grid(None) == images.named({"a": {"names": ["x"], "before": [[1, 2]]}}) == images.named([]) == images.retainability("") == ""
    assert images.named({"a": {"names": [evil], "before": [[None]], "after": [[float("nan")]]}}).count("<svg") == 1


def test_requests_on_one_model_stand_in_one_map():
    def document(erased: str, share: int) -> dict:
        own = {"style": {"a": [10, 10], "b": [9, 10]}}
        return {"pictures": {"retainability": [
            {"erased": "", "domain": "", "right": own}, {"erased": erased, "domain": "style", "right": {"style": {**own["style"], erased: [share, 10]}}}
        ]}}  # fmt: skip

    rows = images.requests([document("a", 0), document("b", 1), {"title": "no pictures"}])
    assert [r["erased"] for r in rows] == ["", "a", "b"] and images.requests([]) == []
    drawn = images.retainability(rows)
    assert drawn.count("<svg") == 1 and all(f">{t}</text>" in drawn for t in ("nothing", "a", "b", "90", "10"))
    assert drawn.count(images.COLOURS["retrained"]) == 2  # a frame for each request
    many = [{"erased": "", "right": {"style": {f"c{k}": [1, 1] for k in range(60)}}}]
    assert "c59" not in images.retainability(many)
