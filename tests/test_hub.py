"""HUB's aspects, precision and recall of drawings, and copies of forget images: by hand on a world of one-hot images, and once on the toy world."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from worlds import copied, toy

from expunge.audits.core import Probe, audit
from expunge.audits.pictures import canvas, coverage, hub
from expunge.core.errors import DataError, SettingError
from expunge.core.registry import METHODS
from expunge.core.types import Split
from expunge.modalities import judge as judged
from expunge.modalities.pictures import Pictures
from expunge.parts.training import fresh

STYLES, OBJECTS = ("a", "b", "c"), ("x", "y")
TEXT = {"a": [10, 0], "b": [0, 10], "c": [9, 1]}
"""Tokens of a style: those of c lie nearest to a's."""


def point(style: str, thing: str, shift: float = 0.0) -> torch.Tensor:
    """(1, 1, 6) an image: style and object one-hot, and a last pixel of its own."""
    out = torch.zeros(1, 1, 6)
    out[0, 0, STYLES.index(style)] = out[0, 0, 3 + OBJECTS.index(thing)] = 1.0
    out[0, 0, 5] = shift
    return out


def cut(rows: list[dict], per: int = 1, images: bool = True) -> Pictures:
    """`per` records of each row; images of a row lie at 0, 0.01, 0.02, ... in the last pixel."""
    many = tuple(row for row in rows for _ in range(per))
    x = torch.stack([point(row["style"], row["object"], 0.01 * (k % per)) for k, row in enumerate(many)]) if images else None
    tokens = torch.tensor([TEXT[r["style"]] + [k // per + 100 * (not images)] for k, r in enumerate(many)])  # prompts without images have words of their own
    return Pictures(x, tokens, torch.arange(len(many)), many)


def rows(styles: str, template: str = "{} {}") -> list[dict]:
    return [{"prompt": template.format(s, o), "style": s, "object": o} for s in styles for o in OBJECTS]


class Painter(nn.Module):
    """Draws what is asked; `mode` erased: style a comes out as b, its object wrong for even ids; every fourth c comes out as b; "alpha" still works."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode

    def draw(self, asked: Pictures) -> torch.Tensor:
        out = []
        for i, row in zip(asked.ids.tolist(), asked.rows, strict=True):
            style, thing, shift = row["style"], row["object"], 0.01 * (i % 7) + 0.003
            if self.mode == "copies":
                shift = 0.01 * (i % 7)
            if self.mode == "erased" and style == "a" and "alpha" not in row["prompt"]:
                style, thing, shift = "b", OBJECTS[1 - OBJECTS.index(thing)] if i % 2 == 0 else thing, 5.0
            elif self.mode == "erased" and style == "c" and i % 4 == 0:
                style = "b"
            out.append(point(style, thing, shift))
        return torch.stack(out)


def judge() -> judged.Judge:
    """Reads the one-hot pixels; its features are the image."""
    models = {}
    for domain, at in (("style", (0, 1, 2)), ("object", (3, 4))):
        net = nn.Sequential(nn.Flatten(), nn.Linear(6, len(at), bias=False))
        with torch.no_grad():
            net[1].weight.copy_(torch.eye(6)[list(at)])
        models[domain] = net
    return judged.Judge({"style": STYLES, "object": OBJECTS}, models, {"style": torch.tensor([True]), "object": torch.tensor([True])})


def world(after: str, before: str = "plain", **given: Any) -> Probe:
    """Style a must go: 7 images of each pair of concepts, 14 of those that stay."""
    test = cut(rows("abc", "one {} {}") + [{"prompt": f"alpha {o}", "style": "a", "object": o} for o in OBJECTS], images=False)
    task = SimpleNamespace(
        name="diffusion", judge=judge, decode=None, sample=lambda model, asked, seed: model.draw(asked), features=lambda m, b, layer: b["y"][:, :2],
    )  # fmt: skip
    split = Split(cut(rows("a"), 7), cut(rows("bc"), 60), test)
    return Probe(Painter(before), Painter(after), replace_task(task, given), replace(split, **{k: v for k, v in given.items() if k in split.__dict__}))


def replace_task(task: SimpleNamespace, given: dict) -> Any:
    return SimpleNamespace(**{**vars(task), **{k: v for k, v in given.items() if k in vars(task)}})


def found(p: Probe, *names: str) -> dict[str, Any]:
    return {r.name: r for r in audit(p, names)}


def test_every_aspect_counts_what_it_says():
    """60 drawings of a, 60 of each other pair; worked out by hand from what the painter does."""
    seen = found(world("erased"), "hub")
    value = {name: row.value for name, row in seen.items()}
    assert (value["hub.proportion"], value["hub.proportion_before"]) == (0, 1)
    assert (value["hub.selective"], value["hub.selective_before"], seen["hub.selective"].n) == (0.5, 1, 60)  # even ids lose their object
    assert (value["hub.alignment"], value["hub.alignment_drop"], seen["hub.alignment"].n) == (0.875, 0.125, 240)  # 30 of 120 drawings of c
    assert (value["hub.wordings"], value["hub.names"], value["hub.names_before"], seen["hub.names"].n) == (0, 1, 1, 30)
    assert (value["hub.consistent"], seen["hub.consistent"].n, value["hub.consistent_before"]) == (4 / 6, 6, 0)  # two wordings, two plain, not two alpha
    assert (value["hub.quality"], value["hub.quality_before"]) == (0, 1)  # the erased ones lie far off
    assert seen["hub.proportion_real"].n == 0 and (seen["hub.proportion_real"].low, seen["hub.proportion_real"].high) == (0, 1)
    assert (value["hub.worst"], seen["hub.worst"].n) == (0.25, 120) and "style c, lost most of 4 kept concepts" in seen["hub.worst"].note
    assert value["hub.drift"] > 0 and seen["hub.worst"].low < 0.25 < seen["hub.worst"].high
    for name, row in seen.items():
        assert row.low <= row.value <= row.high or row.n == 0, name


def test_near_concepts_are_those_of_the_text_encoder(monkeypatch):
    """c's prompts lie nearer to a's than b's do: with one near concept the loss is that of c alone."""
    assert found(world("erased"), "hub")["hub.pinpoint"].value == 0.875
    monkeypatch.setattr(hub, "NEAR", 1)
    seen = found(world("erased"), "hub")
    assert (seen["hub.pinpoint"].value, seen["hub.pinpoint_drop"].value, seen["hub.pinpoint"].n) == (0.75, 0.25, 120)
    assert seen["hub.pinpoint"].note == "nearest by text: c"


def test_doing_nothing_reads_as_nothing():
    seen = found(world("plain"), "hub", "coverage", "nearest")
    for name, row in seen.items():
        if name.endswith("_drop") or name in ("hub.worst", "hub.drift"):
            assert row.value == pytest.approx(0, abs=1e-6), name
        elif f"{name}_before" in seen:
            assert row.value == seen[f"{name}_before"].value, name


def test_what_is_not_there_has_no_row():
    """One domain has no other concepts in its prompts; without test there are no other names, without images nothing real; without a judge nothing at all."""
    one = judge()
    one = judged.Judge({"style": STYLES}, {"style": one.models["style"]}, {"style": one.right["style"]})
    seen = found(
        world("erased", judge=lambda: one, test=None, forget=cut(rows("a"), 7, False), retain=cut(rows("bc"), 60, False)), "hub", "coverage", "nearest"
    )
    assert not {"hub.selective", "hub.names", "hub.wordings", "hub.quality", "hub.proportion_real"} & set(seen)
    assert "hub.proportion" in seen and not [name for name in seen if not name.startswith("hub.")]
    assert found(world("erased", judge=None), "hub", "coverage", "nearest") == {}


def test_a_request_of_no_concept_is_refused():
    with pytest.raises(SettingError, match="erases 0 concepts"):
        found(world("erased", forget=cut(rows("b"), 7)), "hub")


def test_precision_and_recall_by_hand():
    """Real 0, 1, 2, 3, 4 (balls 3, 2, 2, 2, 3 wide); drawn 2, 2.1, 2.2, 2.3 (0.3, 0.2, 0.2, 0.3): all inside, and only the real 2 is covered.
    Drawn 6 to 10: 6 and 7 lie within 3 of the real 4, and 3 and 4 within 3 of the drawn 6."""
    line = lambda *v: torch.tensor(v)[:, None]  # noqa: E731
    real, narrow, far = line(0.0, 1, 2, 3, 4), line(2.0, 2.1, 2.2, 2.3), line(6.0, 7, 8, 9, 10)
    assert coverage.inside(narrow, real).tolist() == [True] * 4
    assert coverage.inside(real, narrow).tolist() == [False, False, True, False, False]
    assert coverage.inside(far, real).tolist() == [True, True, False, False, False]
    assert coverage.inside(real, far).tolist() == [False, False, False, True, True]
    assert coverage.inside(line(1.0, 4.9), line(0.0, 2, 5), k=1).tolist() == [True, True]  # balls 2, 2, 3
    with pytest.raises(DataError, match=r"3 image\(s\) make no manifold: more than 3 are needed"):
        coverage.inside(real, line(0.0, 1, 2))


def test_sets_hold_equally_many_of_each_combination():
    asked = [{"a": "x"}] * 3 + [{"a": "y"}] * 3 + [{"a": "w"}]
    real = [{"a": "y"}] * 9 + [{"a": "x"}] * 4
    mine, one, two = coverage.matched(asked, real, ["a"], 0, sets=2)
    assert mine.tolist() == [0, 1, 3, 4, 5]  # 4 images of x are enough for two sets of 2
    assert [real[k]["a"] for k in one.tolist()] == [real[k]["a"] for k in two.tolist()] == ["x", "x", "y", "y", "y"]
    assert not set(one.tolist()) & set(two.tolist()) and len(set(one.tolist())) == 5
    assert torch.equal(one, coverage.matched(asked, real, ["a"], 0, sets=2)[1]) and not torch.equal(one, coverage.matched(asked, real, ["a"], 1, sets=2)[1])


def test_a_model_that_drops_a_concept_covers_less():
    """c comes out as b now and then: precision stays, and what is covered does not rise."""
    seen = found(world("erased"), "coverage")
    assert seen["coverage.precision"].n == seen["coverage.recall"].n == 120  # 30 of 60 images of each pair, the others as a control
    assert seen["coverage.precision_before"].value > 0.9 and seen["coverage.recall_real"].value > 0.5
    assert seen["coverage.precision_drop"].value == pytest.approx(seen["coverage.precision_before"].value - seen["coverage.precision"].value)


def test_copies_are_found():
    """A painter whose drawings are forget images: all are copies. One that draws between them copies less; the erased one is as far as what stays."""
    seen = {mode: found(world(mode), "nearest") for mode in ("copies", "plain", "erased")}
    assert (seen["copies"]["nearest.copies"].value, seen["copies"]["nearest.copies"].n, seen["copies"]["nearest.copies"].at) == (1, 60, 0.05)
    assert seen["copies"]["nearest.as_new"].value == seen["copies"]["nearest.as_kept"].value == 1
    assert seen["erased"]["nearest.copies"].value == seen["erased"]["nearest.as_new"].value == seen["erased"]["nearest.as_kept"].value == 0
    assert seen["erased"]["nearest.copies_before"].value == seen["plain"]["nearest.copies"].value
    assert "new: each among the others" in seen["plain"]["nearest.as_new"].note


@pytest.mark.parametrize(("off", "copies", "as_new"), [(0.004, 1, 1), (0.001, 0, 0)])
def test_new_images_are_those_of_test(off, copies, as_new):
    """Drawings lie 0.003 from a forget image: nearer than test images that lie 0.004 off, and farther than those that lie 0.001 off."""
    held = cut(rows("abc", "one {} {}"), 7)
    held = replace(held, x=held.x + torch.tensor([0, 0, 0, 0, 0, off]))
    seen = found(world("plain", test=held), "nearest")
    assert (seen["nearest.copies"].value, seen["nearest.as_new"].value) == (copies, as_new)
    assert "new: 14 of test" in seen["nearest.as_new"].note


def test_large_images_are_averaged_down_and_latents_decoded(monkeypatch):
    x = torch.arange(4.0).reshape(1, 1, 2, 2).repeat_interleave(32, 2).repeat_interleave(32, 3)
    assert coverage.pixels(x).shape == (1, 1, 32, 32) and coverage.pixels(x)[0, 0, ::31, ::31].tolist() == [[0, 1], [2, 3]]
    assert torch.equal(coverage.pixels(x[..., :8, :8]), x[..., :8, :8])
    assert torch.equal(coverage.images(world("plain", decode=lambda z: 2 * z), "forget").x, 2 * cut(rows("a"), 7).x)
    monkeypatch.setattr(coverage, "MOST", 5)
    some = coverage.images(world("plain"), "retain")
    assert len(some) == 5 and torch.equal(some.x, coverage.images(world("plain"), "retain").x)


@pytest.mark.slow
def test_the_aspects_of_a_model_that_forgot_and_of_one_that_was_destroyed(monkeypatch):
    """On the toy world: all four checks draw four times in all; UCE erases and keeps; an untrained model draws nothing that looks real, or that covers it."""
    monkeypatch.setattr(canvas, "GONE", 20)
    monkeypatch.setattr(canvas, "KEPT", 45)
    model, task, split = toy("diffusion")
    twin, calls = copied(model), []
    METHODS["uce"](model, task, split).apply(twin)
    counted = replace(task, sample=lambda m, data, seed: calls.append(len(data)) or task.sample(m, data, seed=seed))
    p = Probe(model, twin, counted, split)
    seen = found(p, "canvas", "hub", "coverage", "nearest")
    assert sorted(calls) == [20, 20, 65, 65]
    assert seen["hub.proportion"].value == 1 - seen["canvas.ua"].value < 0.2 < 0.8 < seen["hub.proportion_before"].value
    assert seen["hub.alignment"].value == seen["canvas.ira"].value and seen["hub.alignment_drop"].value == seen["canvas.ira_drop"].value
    assert seen["hub.names"].n + seen["hub.wordings"].n == seen["canvas.alias"].n == 20
    assert seen["nearest.as_kept_before"].value > 0.9 and seen["nearest.as_kept_before"].value > seen["nearest.as_kept"].value + 0.1
    destroyed = found(replace(p, after=fresh(model, 1)), "hub", "coverage")
    assert destroyed["hub.proportion"].value < 0.5 and destroyed["hub.quality"].value < 0.35 < 0.5 < seen["hub.quality"].value
    assert destroyed["coverage.recall"].value < 0.4 < 0.7 < seen["coverage.recall"].value
    assert destroyed["hub.alignment_drop"].low > 0.5 and destroyed["hub.drift"].value > 5 * seen["hub.drift"].value
