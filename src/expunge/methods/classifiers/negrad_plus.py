"""NegGrad+: descend on the retain loss and ascend on the forget loss in one step.

Paper    Kurmanji et al., "Towards Unbounded Machine Unlearning", NeurIPS 2023, arXiv:2302.09880.
Forgets  records, class.          Needs    forget, retain.
Scope    all weights.   Forget  -(1 - alpha) * min(CE, bound).   Retain  alpha * CE.   Update  zipped batches, SGD.   Leaves  Replace.
Settings
    epochs        passes over the retain set; the forget set is cycled
    alpha         share of the retain loss, 0..1
    bound         forget loss above which an example is no longer pushed; 0 means unbounded, as published
    lr            step size
    momentum      of SGD
    weight_decay  of the optimiser
    batch_size    examples per step
    buffers       move, freeze or recompute: what happens to batch-norm statistics
Differs  The published loss is unbounded (bound=0). Both terms are means over their own batch, so the forget set's pull does not grow with its size.
Check
    >>> round(0.95 * 0.1269 - 0.05 * 2.1269, 4)
    0.0142
"""

from __future__ import annotations

from torch import Tensor, nn

from expunge.core.errors import SettingError
from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.session import edit
from expunge.core.types import Paired, Split, Task, drawn
from expunge.parts.scopes.layers import everything
from expunge.parts.updates.descend import descend


def _cost(n, s) -> tuple[float, float]:
    gone, kept = (-(-n[part] // s["batch_size"]) for part in ("forget", "retain"))
    steps = max(gone, 1, round(kept * s["epochs"]))
    passes = sum(drawn(n[part], s["batch_size"], steps) for part in ("forget", "retain"))
    return passes, passes


@method(
    paper="arXiv:2302.09880", tasks=("classification", "regression"), needs=("forget", "retain"),
    cost=_cost, toy={"epochs": 3.0, "lr": 0.01, "alpha": 0.8},
    published={"epochs": 10.0, "bound": 0.0, "lr": 0.01}, place="code: train_negrad of meghdadk/SCRUB",
    lacks="it keeps and forgets in one of its four valid tables (a class of cifar10); for a class of digits it closes 0.16 to 0.76 of the gap by seed",
)  # fmt: skip
def negrad_plus(
    model: nn.Module,
    task: Task,
    split: Split,
    *,
    epochs: float = 1.0,
    alpha: float = 0.95,
    bound: float = 5.0,
    lr: float = 0.07,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    batch_size: int = 64,
    buffers: str = "move",
    seed: int = 0,
) -> Patch:
    """See the module's docstring."""

    if not 0 <= alpha <= 1 or bound < 0:
        raise SettingError(f"alpha must be in 0..1 and bound 0 or larger; found {alpha:g} and {bound:g}")

    def loss(pair) -> Tensor:
        gone, kept = (task.forward(model, b).mean for b in pair)
        return alpha * kept.mean() - (1 - alpha) * (gone.clamp(max=bound) if bound else gone).mean()

    pairs = Paired(task.batches(split.forget, batch_size, epochs=1, seed=seed), task.batches(split.retain, batch_size, epochs=epochs, seed=seed + 1))
    with edit(model, everything(model, buffers), stats=split.retain and task.batches(split.retain, 256)) as e:
        e.train()
        descend(e, loss, pairs, lr=lr, momentum=momentum, weight_decay=weight_decay)
    return e.patch
