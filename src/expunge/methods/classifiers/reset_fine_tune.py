"""Reset and fine-tune: weaken all weights, re-initialise the last layers, then train briefly on the retain set.

Paper    Ash and Adams, "On Warm-Starting Neural Network Training", NeurIPS 2020, arXiv:1910.08475 (shrink and perturb); EU-k of Goel et al. 2022,
         arXiv:2201.06640 (re-initialised last layers). The combination as an unlearning preset is this project's.
Forgets  records, class.          Needs    retain.
Scope    all weights.   Forget  theta <- shrink * theta + noise * theta_fresh; the last k layers theta_fresh.
Retain   CE + distil * mean (z - z0)^2 / max(mean z0^2, 1), z the logits (or predictions), z0 those of the original.
Update   SGD with a one-cycle schedule.   Leaves  Replace.
Settings
    shrink        factor on the trained weights, 0..1; 1 keeps them
    noise         factor on freshly initialised weights that are added
    k             how many of the last linear or convolution layers start afresh; 0 for none
    distil        weight of the relative squared distance of logits to the original's on retain: keeps their scale, which short training does not reach
    sharpen       logits are divided by this inside the loss (classification): above 1, margins grow to what a longer training would reach
    doubt         the original is doubted, and not distilled, where its mean log-odds of forget's labels are below this share of those of retain's
                  labels, as when forget holds wrong labels: see DOUBTED for what is done instead; 0 never doubts
    epochs        passes over the retain set
    lr            largest step size of the one-cycle schedule
    momentum      of SGD (Nesterov)
    weight_decay  of SGD
    batch_size    examples per step
    buffers       move, freeze or recompute: what happens to batch-norm statistics
Differs  Shrink and perturb was published for continued training, not for unlearning.
Check
    >>> import torch; w, fresh = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 0.5])
    >>> 0.4 * w + 0.1 * fresh
    tensor([ 0.4500, -0.7500])
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.session import NORMS, edit
from expunge.core.types import Split, Task
from expunge.parts.reading import margin, outputs
from expunge.parts.scopes.layers import everything, last
from expunge.parts.training import fresh
from expunge.parts.updates.descend import descend

DOUBTED = {"shrink": 0.6, "noise": 0.0, "distil": 0.0, "sharpen": 1.25, "weight_decay": 0.0}
"""What replaces the settings of those names where the original is doubted: its scale is that of a model taught wrong, so it is shrunk and not copied."""


def doubted(model: nn.Module, task: Task, split: Split, teacher: Tensor, share: float) -> bool:
    """Whether mean phi(forget) < share * mean phi(retain), phi = log p_y - log sum_{j != y} p_j by the model; `teacher` holds its logits on retain."""
    if not share or teacher.ndim != 2 or split.forget.y.is_floating_point():
        return False
    gone, kept = margin(outputs(model, task, split.forget).cpu(), split.forget.y), margin(teacher.cpu(), split.retain.y)
    return bool(gone.mean() < share * kept.mean())


@method(
    paper="arXiv:1910.08475",
    tasks=("classification", "regression"),
    needs=("retain",),
    cost=lambda n, s: ((s["epochs"] + (s["distil"] > 0)) * n["retain"] + (s["distil"] > 0 and s["doubt"] > 0) * n["forget"], s["epochs"] * n["retain"]),
    toy={"epochs": 6.0, "shrink": 0.3, "noise": 0.1, "k": 1, "distil": 0.0, "lr": 0.05},
    place="it has no card: the combination is this project's",
    lacks="it has no card: the combination is this project's own; random records of cifar10 it forgets, classes it does not",
)
def reset_fine_tune(
    model: nn.Module,
    task: Task,
    split: Split,
    *,
    shrink: float = 1.0,
    noise: float = 0.0,
    k: int = 0,
    distil: float = 5.0,
    sharpen: float = 1.0,
    doubt: float = 0.5,
    epochs: float = 2.4,
    lr: float = 0.05,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    batch_size: int = 50,
    buffers: str = "move",
    seed: int = 0,
) -> Patch:
    """See the module's docstring."""
    teacher = outputs(model, task, split.retain) if distil else torch.ones(1)
    if distil and doubted(model, task, split, teacher, doubt):
        shrink, noise, distil, sharpen, weight_decay = (DOUBTED[name] for name in ("shrink", "noise", "distil", "sharpen", "weight_decay"))
    unit = teacher.square().mean().clamp(min=1)
    new = dict(fresh(model, seed).named_parameters())
    afresh = set(last(model, k).masks) if k else set()
    norms = {f"{n}.{p}" for n, m in model.named_modules() if isinstance(m, NORMS) for p, _ in m.named_parameters(recurse=False)}
    with edit(model, everything(model, buffers), stats=task.batches(split.retain, 256)) as e:
        with torch.no_grad():
            for name, p in e.params.items():
                if name in afresh:
                    p.copy_(new[name])
                elif name not in norms:
                    p.mul_(shrink).add_(new[name], alpha=noise)
        e.train()
        batches = task.batches(split.retain, batch_size, epochs=epochs, seed=seed)

        def loss(batch) -> Tensor:
            out = task.forward(model, batch)
            value = out.mean.mean() if out.logits is None or sharpen == 1 else F.cross_entropy(out.logits / sharpen, out.labels)
            if distil:
                now = out.pred if out.logits is None else out.logits
                value = value + distil * (now - teacher[batch["i"]].to(now)).square().mean() / unit.to(now)
            return value

        descend(e, loss, batches, lr=lr, optimizer="nesterov", momentum=momentum, weight_decay=weight_decay, schedule="onecycle")
    return e.patch
