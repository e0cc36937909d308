"""SLUG: one gradient step on one layer, the layer from a Pareto front and the step length from a search.

Paper    Cai et al., "Targeted Unlearning with Single Layer Unlearning Gradient", ICML 2025, arXiv:2407.11867.          Code     CSIPlab/SLUG, no licence.
Forgets  records, class.          Needs    forget, retain.
Scope    one weight matrix from the front of large ||g_f|| / ||theta|| and small |cos(g_f, g_r)|.   Forget  theta + s * grad CE_forget, s > 0.
Retain   by choice of layer and s.   Update  search of s by doubling and halving.   Leaves  Replace of one matrix.
Settings
    evaluations  how many step lengths are tried per layer
    layers       how many layers of the front are tried, most important first
    drop         largest loss of accuracy on kept data that a step may cost
    sample       most retain examples for the gradient, and for the evaluations when there is no validation part
    batch_size   examples per step of the two gradient passes
    buffers      move, freeze or recompute: what happens to batch-norm statistics
Differs  Classifiers use cross-entropy and the classifier's own accuracy instead of zero-shot CLIP accuracy. The script and the notebook
         store gradients of opposite sign; here the gradient of +CE is stored and added. The published search evaluates on test-like
         data; here on validation, without the classes that are removed, or on the retain sample, never on test. Gradients are taken in
         eval mode. A step has forgotten when accuracy on forget is at most 0 for removed classes and, for other records, the model's
         accuracy on validation (without validation: on the retain sample, less `drop`).
Check
    >>> from expunge.scopes.pareto import front
    >>> front({"A": (0.10, 5), "B": (0.05, 1), "C": (0.20, 6), "D": (0.15, 4)})
    ['C', 'A', 'B']
    >>> import torch; from expunge.updates.oneshot import first_step
    >>> first_step(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0]))      # -0.25 along the script's gradient of -CE
    0.25
"""

from __future__ import annotations

import torch
from torch import nn

from expunge.audits.core import score
from expunge.errors import SettingError
from expunge.patch import Patch
from expunge.registry import method
from expunge.scopes.layers import match
from expunge.scopes.pareto import front, layer_points, matrices
from expunge.scopes.saliency import gradient_sum
from expunge.session import edit
from expunge.types import Split, Task, absent
from expunge.updates.oneshot import first_step, search


def _cost(n, s) -> tuple[float, float]:
    """An upper bound: the front may hold fewer than `layers` layers."""
    sample = min(s["sample"], n["retain"])
    probe = n.get("validation", sample)
    return n["forget"] + sample + probe + s["layers"] * s["evaluations"] * (n["forget"] + probe), n["forget"] + sample


@method(paper="arXiv:2407.11867", tasks=("classification",), needs=("forget", "retain"), cost=_cost, toy={"drop": 0.1})
def slug(
    model: nn.Module, task: Task, split: Split, *, evaluations: int = 10, layers: int = 2, drop: float = 0.05, sample: int = 1000, batch_size: int = 64,
    buffers: str = "freeze", seed: int = 0,
) -> Patch:  # fmt: skip
    """See the module's docstring."""
    if evaluations < 1 or layers < 1 or sample < 1:
        raise SettingError(f"evaluations, layers and sample must be at least 1; found {evaluations}, {layers} and {sample}")
    kept = split.retain.take(torch.randperm(len(split.retain), generator=torch.Generator().manual_seed(seed))[:sample])
    gone, held = (gradient_sum(model, task, task.batches(data, batch_size)) for data in (split.forget, kept))
    weights = matrices(model)
    names = front(layer_points(weights, gone, held))[:layers]
    if not names:
        return Patch(())
    removed = absent(split.forget.y, split.retain.y)
    seen = split.validation is not None and bool((~torch.isin(split.validation.y, removed)).any())
    probe = split.validation if seen else kept
    counts = ~torch.isin(probe.y, removed)

    def keeps() -> float:
        return float(score(model, task, probe).correct[counts].float().mean())

    start = keeps()
    goal = float((~torch.isin(split.forget.y, removed)).float().mean()) * (start if seen else start - drop)
    trials: dict[tuple[str, float], tuple[float, float]] = {}
    with edit(model, match(model, *names, buffers=buffers), stats=task.batches(split.retain, 256)) as e:
        base = {n: p.detach().clone() for n, p in e.params.items()}

        def put(name: str, s: float) -> None:
            with torch.no_grad():
                e.params[name].copy_(base[name] + s * gone[name])

        def judge(name: str, s: float) -> tuple[bool, bool]:
            put(name, s)
            trials[name, s] = float(score(model, task, split.forget).correct.float().mean()), keeps()
            return trials[name, s][0] <= goal, trials[name, s][1] < start - drop

        chosen = []
        for name in names:
            s = search(first_step(base[name], gone[name]), lambda s, name=name: judge(name, s), evaluations=evaluations)
            put(name, 0.0)
            if s > 0:
                forget, utility = trials[name, s]
                chosen.append((max(0.0, forget - goal) + max(0.0, start - utility), name, s))
        if chosen:
            _, name, s = min(chosen, key=lambda c: c[0])
            put(name, s)
    return e.patch
