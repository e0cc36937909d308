"""Whether a model moved by rounding alone: then nothing was unlearned, whatever the audit reads.

moved by rounding   no weight or buffer by more than ULPS units in the last place (of the weight, or of its tensor's root mean square where it is smaller),
                    and no forget record's loss by more than STILL
or, of two models   the one is the other rounded to float32, bfloat16 or float16, bit for bit
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from expunge.core.edits import Hook, LowRank
from expunge.core.guard import quiet
from expunge.core.hooks import guards
from expunge.core.patch import Patch
from expunge.core.types import Split, Task

ULPS = 4
"""Units in the last place within which a weight counts as moved by rounding."""
STILL = 1e-3
"""Most that the loss of a forget record may change, in its own units, where weights moved by rounding alone."""
MOST = 64
"""Most forget records on which that is read."""
NARROW = (torch.float32, torch.bfloat16, torch.float16)
"""Types that weights are stored in."""


def rounded(model: nn.Module, task: Task, split: Split, patch: Patch) -> bool:
    """Whether a patch moves the model by rounding alone."""
    tensors = _tensors(model)
    for edit in patch.edits:
        if isinstance(edit, Hook):
            return False
        w = tensors[edit.name].detach()
        if not w.is_floating_point():
            continue
        if isinstance(edit, LowRank):
            old, new = w, (w + (edit.scale * (edit.up.to(w) @ edit.down.to(w))).view_as(w))
        else:
            old, new = w if edit.mask is None else w[edit.mask.to(w.device)], edit.values.to(w.device)
        if not _within(old, new, w):
            return False
    if getattr(split.forget, "bare", False):  # prompts alone have no loss
        return _fine([tensors[e.name] for e in patch.edits])
    before = _losses(model, task, split)
    with patch.tried(model):
        return _still(before, _losses(model, task, split))


def alike(before: nn.Module, after: nn.Module, task: Task, split: Split) -> str:
    """How little separates two models, to stand behind "the model after"; empty where they differ by more than rounding, in their weights or beside them."""
    old, new = _tensors(before), _tensors(after)
    if old.keys() != new.keys() or any(t.shape != new[n].shape for n, t in old.items()) or guards(before).keys() != guards(after).keys():
        return ""
    pairs = [(t.detach(), new[n].detach().to(t.device)) for n, t in old.items()]
    bare = getattr(split.forget, "bare", False)
    if all(torch.equal(a.double(), b.double()) for a, b in pairs):
        same = bare or _still(_losses(before, task, split), _losses(after, task, split))
        return "has the weights of the model before, bit for bit" if same else ""
    for kind in NARROW:
        if all(torch.equal(a.to(kind).double() if a.is_floating_point() else a.double(), b.double()) for a, b in pairs):
            twin = copy.deepcopy(before)
            with torch.no_grad():
                for name, t in _tensors(twin).items():
                    t.copy_(new[name])
            same = bare or _still(_losses(twin, task, split), _losses(after, task, split))
            return f"is the model before, rounded to {str(kind).removeprefix('torch.')}" if same else ""
    floats = [(a, b) for a, b in pairs if a.is_floating_point()]
    if not all(_within(a, b, a) for a, b in floats) or not all(torch.equal(a, b) for a, b in pairs if not a.is_floating_point()):
        return ""
    same = _fine([a for a, _ in floats]) if bare else _still(_losses(before, task, split), _losses(after, task, split))
    return f"differs from the model before by rounding alone, at most {ULPS} units in the last place" if same else ""


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _within(old: Tensor, new: Tensor, whole: Tensor) -> bool:
    """Whether no value moved by more than ULPS units in the last place, of a tensor `whole` of which `old` may be a part."""
    scale = float(whole.double().square().mean().sqrt())
    reach = ULPS * torch.finfo(whole.dtype).eps * old.double().abs().clamp(min=scale)
    return not bool(((new.double() - old.double()).abs() > reach).any())


def _fine(tensors: list[Tensor]) -> bool:
    """Whether units in the last place of all of these are too small to say anything."""
    return all(torch.finfo(t.dtype).eps < 1e-6 for t in tensors if t.is_floating_point())


def _still(before: Tensor, after: Tensor) -> bool:
    return bool(((after - before).abs() <= STILL).all())


def _losses(model: nn.Module, task: Task, split: Split) -> Tensor:
    """(N,) losses of the first MOST forget records."""
    batches = task.batches(split.forget, min(MOST, len(split.forget)))
    with quiet(model):
        return task.forward(model, batches[0]).mean.detach().double().cpu()
