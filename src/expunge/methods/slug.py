"""SLUG: one gradient step on one layer, the layer from a Pareto front and the step length from a search.

Paper    Cai et al., "Targeted Unlearning with Single Layer Unlearning Gradient", ICML 2025, arXiv:2407.11867.
Forgets  records, class.          Needs    forget, retain.
Scope    one weight matrix: large ||g_f|| / ||theta||, small |cos(g_f, g_r)|.   Forget  theta + s * grad CE_forget.   Retain  by choice of layer and s.
Update   search of s, at most 10 evaluations.   Leaves  Replace of one matrix.
Settings
    evaluations  how many step lengths are tried per layer
    layers       how many layers of the front are tried
    drop         largest loss of accuracy on retain that a step may cost
    sample       most retain examples for the gradient and the evaluations
    batch_size   examples per step
    buffers      move, freeze or recompute: what happens to batch-norm statistics
Differs  Classifiers use cross-entropy and the classifier's own accuracy instead of zero-shot CLIP accuracy. The gradient of +CE is stored and added.
Check
    >>> from expunge.scopes.pareto import front
    >>> front({"A": (0.10, 5), "B": (0.05, 1), "C": (0.20, 6), "D": (0.15, 4)})
    ['C', 'A', 'B']
    >>> -(5 / 2) / 10                                   # first step for theta = (3, 4), g = (0, 2)
    -0.25
"""

from __future__ import annotations

import torch
from torch import nn

from expunge.guard import quiet
from expunge.patch import Patch
from expunge.registry import method
from expunge.scopes.layers import match
from expunge.scopes.pareto import front, layer_points
from expunge.scopes.saliency import gradient_sum
from expunge.session import edit
from expunge.types import Split, Task
from expunge.updates.oneshot import search


@method(paper="arXiv:2407.11867", tasks=("classification",), needs=("forget", "retain"),
    cost=lambda n, s: (n["forget"] + min(s["sample"], n["retain"]) + 2 * s["layers"] * (s["evaluations"] + 1) * (n["forget"] + min(s["sample"], n["retain"])),
        n["forget"] + min(s["sample"], n["retain"])), toy={"drop": 0.3})  # fmt: skip
def slug(
    model: nn.Module,
    task: Task,
    split: Split,
    *,
    evaluations: int = 10,
    layers: int = 2,
    drop: float = 0.05,
    sample: int = 1000,
    batch_size: int = 64,
    buffers: str = "freeze",
    seed: int = 0,
) -> Patch:
    """See the module's docstring."""
    rows = torch.randperm(len(split.retain), generator=torch.Generator().manual_seed(seed))[:sample]
    kept = split.retain.take(rows)
    gone, held = (gradient_sum(model, task, task.batches(data, batch_size)) for data in (split.forget, kept))
    named = dict(model.named_parameters())
    names = front(layer_points({n: named[n] for n in gone}, gone, held))[:layers]

    def accuracy(data) -> float:
        batches = task.batches(data, 256)
        with quiet(model):
            outs = [task.forward(model, batches[k]) for k in range(len(batches))]
        return float(torch.cat([(o.logits.argmax(-1) == o.labels).float() for o in outs]).mean())

    removed = not set(split.forget.y.tolist()) & set(split.retain.y.tolist())
    goal = 0.0 if removed else accuracy(split.validation if split.validation is not None else split.forget) - 0.01
    start = accuracy(kept)
    best: tuple[float, Patch] | None = None
    for name in names:
        with edit(model, match(model, name, buffers=buffers), stats=task.batches(kept, 256)) as e:
            p, base = e.params[name], e.params[name].detach().clone()

            def put(s: float, p=p, base=base, g=gone[name]) -> None:
                with torch.no_grad():
                    p.copy_(base + s * g)

            def forgets(s: float, put=put) -> bool:
                put(s)
                return accuracy(split.forget) <= goal

            def harms(s: float, put=put) -> bool:
                put(s)
                return accuracy(kept) < start - drop

            put(search(float(base.norm() / gone[name].norm()) / 10, forgets, harms, evaluations=evaluations))
            left = accuracy(split.forget) + max(0.0, start - accuracy(kept))
        if best is None or left < best[0]:
            best = (left, e.patch)
    return best[1] if best else Patch(())
