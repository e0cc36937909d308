"""Law 13, the pretend device: a method or check on a model that lives elsewhere runs there and finds what it finds on the CPU."""

from __future__ import annotations

import pytest
import torch
from away import DEVICE, Away
from test_laws import CASES, asked, quick
from torch.nn.attention import SDPBackend, sdpa_kernel
from worlds import copied, same, small, state

from expunge.core.edits import LowRank, Replace
from expunge.core.patch import Patch
from expunge.core.registry import METHODS
from expunge.planning.outcome import audited

QUICK = {
    "salun-classification", "ssd-classification", "scrub-classification", "gradient_ascent-regression", "influence-classification", "npo-causal_lm",
    "rmu-causal_lm", "esd-diffusion", "concept_ablation-diffusion", "uce-diffusion", "fine_tune-text_classification", "fine_tune-multilabel",
}  # fmt: skip
"""Those that `make test` runs; `make test-slow` runs all."""
LOOSE = {"sfd", "adapt_then_unlearn", "salun_diffusion", "slug"}
"""Long or thresholded runs, whose last digits grow: only that they run there and can be undone."""
LAW = [pytest.param(*c.values, id=c.id, marks=() if c.id in QUICK else pytest.mark.slow) for c in CASES]


def moved(patch: Patch, name: str) -> list[torch.Tensor]:
    """What the patch's edits of that tensor add to it, or put into it, on the CPU."""
    return [e.scale * (e.up.cpu() @ e.down.cpu()) if isinstance(e, LowRank) else e.values.cpu() for e in patch.edits
            if e.name == name and isinstance(e, LowRank | Replace)]  # fmt: skip


def at_home(kept: dict) -> dict:
    """A `state` on the CPU, so that two can be compared outside the device."""
    return {**kept, "tensors": {n: t.cpu() for n, t in kept["tensors"].items()}, "flags": [(r, None if g is None else g.cpu()) for r, g in kept["flags"]]}


@pytest.mark.parametrize(("name", "task_name"), LAW)
def test_law_13_device(name, task_name, tmp_path):
    """The same patch as on the CPU; the model stays where and as it was; undo is exact; the file reads back as the same patch."""
    model, task, split = small(task_name, METHODS[name].twin == "moe", asked(name))
    with sdpa_kernel(SDPBackend.MATH):  # the form that attention takes on devices without a kernel of their own
        here = METHODS[name](copied(model), task, split, seed=3, **quick(name))
    with Away():
        model = model.to(DEVICE)
        before = at_home(state(model))
        there = METHODS[name](model, task, split, seed=3, **quick(name))
        assert all(p.device == DEVICE for p in model.parameters()), "the model was moved"
        assert same(before, at_home(state(model))), "the model was changed"
        twin = copied(model)
        there.apply(twin).apply(twin)
        assert same(at_home(state(model)), at_home(state(twin))), "undo is not exact"
        there.save(tmp_path / "p.safetensors")
        digest = there.digest
    assert Patch.load(tmp_path / "p.safetensors").digest == digest
    assert {e.name for e in here.edits} == {e.name for e in there.edits}
    if name not in LOOSE:
        for e in here.edits:
            for a, b in zip(moved(here, e.name), moved(there, e.name), strict=True):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


HEAVY = ("gan", "image_to_image", "text_classification")
KINDS = ("classification", "regression", "multilabel", "contrastive", "causal_lm", *HEAVY)


@pytest.mark.parametrize("task_name", [pytest.param(k, marks=pytest.mark.slow if k in HEAVY else ()) for k in KINDS])
def test_quick_checks_run_elsewhere(task_name):
    """All quick checks of a kind of model read two models that live elsewhere, and leave them there."""
    model, task, split = small(task_name)
    with Away():
        before, after = copied(model).to(DEVICE), copied(model).to(DEVICE)
        with torch.no_grad():
            for p in after.parameters():
                p.mul_(1.01)
        verdict = audited(before, after, task, split, slow=False)
        assert all(p.device == DEVICE for p in after.parameters())
    assert len(verdict.tries[0].rows) > 10
