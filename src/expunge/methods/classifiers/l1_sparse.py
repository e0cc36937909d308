"""l1-sparse: fine-tune on retain with a decaying l1 penalty on the weights.

Paper    Jia et al., "Model Sparsity Can Simplify Machine Unlearning", NeurIPS 2023, arXiv:2304.04934.          Code     OPTML-Group/Unlearn-Sparse, MIT.
Forgets  records, class.          Needs    retain.
Scope    all weights, biases and normalisation included.   Forget  none.   Retain  CE + gamma_e * ||theta||_1, gamma_e = alpha * (1 - e / (T - T0))
         in epoch e < T - T0, then 0.   Update  SGD.   Leaves  Replace.
Settings
    epochs         T, passes over the retain set
    alpha          weight of the l1 norm in the first epoch
    no_l1_epochs   T0, how many of the last epochs go without the penalty
    proximal       soft-threshold by lr / (1 - momentum) * gamma_e after each step, which gives true zeros, instead of the subgradient
    lr             step size
    momentum       of SGD
    weight_decay   of SGD
    batch_size     examples per step
    buffers        move, freeze or recompute: what happens to batch-norm statistics
Differs  The paper also compares constant and growing weights; this is the decaying one of the code. The published penalty is a subgradient,
         which shrinks weights and never makes one zero; proximal=true does, by the threshold that
         the subgradient adds up to under momentum. The default alpha is larger than the published 1e-4 to 5e-4,
         which are for 10 epochs of some 200 steps each.
Check
    >>> from expunge.parts.losses.sparse import decaying
    >>> [round(decaying(1.0, e, 10), 1) for e in range(10)]
    [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
"""

from __future__ import annotations

from torch import Tensor, nn

from expunge.core.errors import SettingError
from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.session import edit
from expunge.core.types import Paired, Split, Task
from expunge.parts.losses import nll
from expunge.parts.losses.sparse import decaying, l1, shrink
from expunge.parts.scopes.layers import everything
from expunge.parts.updates.descend import descend


@method(
    paper="arXiv:2304.04934",
    tasks=("classification", "regression"),
    needs=("retain",),
    cost=lambda n, s: (s["epochs"] * n["retain"], s["epochs"] * n["retain"]),
    toy={"epochs": 4.0, "lr": 0.1, "alpha": 0.003},
    published={"epochs": 10.0, "alpha": 0.0005, "lr": 0.01, "batch_size": 256},
    place="code: OPTML-Group/Unlearn-Sparse; alpha is 1e-4 to 5e-4",
    lacks="it costs 6 to 25 points of retain accuracy in all of its valid tables",
)
def l1_sparse(
    model: nn.Module, task: Task, split: Split, *, epochs: float = 4.0, alpha: float = 0.002, no_l1_epochs: int = 0, proximal: bool = False, lr: float = 0.1,
    momentum: float = 0.9, weight_decay: float = 5e-4, batch_size: int = 64, buffers: str = "move", seed: int = 0,
) -> Patch:  # fmt: skip
    """See the module's docstring."""
    if alpha < 0 or no_l1_epochs < 0:
        raise SettingError(f"alpha and no_l1_epochs must be 0 or larger; found {alpha} and {no_l1_epochs}")
    if not 0 <= momentum < 1:
        raise SettingError(f"momentum must be in [0, 1), not {momentum}")
    batches = task.batches(split.retain, batch_size, epochs=epochs, seed=seed)

    def weight(step: int) -> float:
        return decaying(alpha, step // batches.per_epoch, epochs, no_l1_epochs)

    with edit(model, everything(model, buffers), stats=task.batches(split.retain, 256)) as e:

        def loss(pair) -> Tensor:
            value = nll(task.forward(model, pair[0])).mean()
            return value if proximal else value + weight(pair[1]) * l1(e.params.values())

        def after(step: int) -> None:
            shrink(e.params.values(), lr / (1 - momentum) * weight(step))

        e.train()
        descend(
            e, loss, Paired(batches, range(len(batches))), lr=lr, momentum=momentum, weight_decay=weight_decay, after=after if proximal else None
        )  # fmt: skip
    return e.patch
