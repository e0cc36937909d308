"""Prune, then unlearn: set the least important weights to zero for good, then fine-tune on retain, or ascend on forget after that.

Paper    Jia et al., "Model Sparsity Can Simplify Machine Unlearning", NeurIPS 2023, arXiv:2304.04934.          Code     OPTML-Group/Unlearn-Sparse, MIT.
Forgets  records, class.          Needs    retain.
Scope    all weights; pruned ones are zero and stay zero.   Forget  by pruning; -CE up to `bound` with unlearner=ascent.   Retain  CE.   Update  SGD
         with pruned places set to zero again after each step.   Leaves  Replace.
Settings
    rate           share of the prunable weights that are pruned, 0..1
    pruner         omp (global magnitude in one shot) or synflow (100 rounds of synaptic flow)
    linear         prune linear layers as well as convolutions
    unlearner      fine_tune: on retain alone; ascent: the same, then gradient ascent on forget
    epochs         passes over the retain set
    ascent_epochs  passes over the forget set with unlearner=ascent
    ascent_lr      step size of the ascent
    bound          stop pushing an example once its loss is above this; 0 means unbounded, as published
    lr             step size on retain
    momentum       of SGD
    weight_decay   of SGD
    batch_size     examples per step
    buffers        move, freeze or recompute: what happens to batch-norm statistics
Differs  The published OMP sets the remaining weights back to those of epoch 8 and trains again on all data, and IMP repeats that: both need
         a checkpoint from training, which a given model does not have. Here the remaining weights go on from where they are. SynFlow is
         published as pruning before training; here it prunes the trained weights. Published pruning is of convolutions alone
         (linear=false); the default also prunes linear layers, never the last one.
Check
    >>> import torch; from expunge.methods.classifiers.prune_unlearn import lowest
    >>> lowest({"w": torch.tensor([0.1, 3.0, 0.2, 4.0])}, 0.5)["w"]
    tensor([ True, False,  True, False])
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from expunge.core import guard
from expunge.core.errors import ScopeError, SettingError
from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.session import edit
from expunge.core.types import Split, Task
from expunge.modalities.classification.task import inputs
from expunge.parts.losses import ascent, nll
from expunge.parts.scopes.layers import everything
from expunge.parts.updates.descend import descend

PRUNERS = ("omp", "synflow")
UNLEARNERS = ("fine_tune", "ascent")
ROUNDS = 100


def _cost(n, s) -> tuple[float, float]:
    passes = s["epochs"] * n["retain"] + (s["ascent_epochs"] * n["forget"] if s["unlearner"] == "ascent" else 0)
    rounds = ROUNDS if s["pruner"] == "synflow" else 0
    return passes + rounds, passes + rounds


@method(
    paper="arXiv:2304.04934",
    tasks=("classification", "regression"),
    needs=("retain",),
    cost=_cost,
    toy={"rate": 0.95, "epochs": 4.0, "lr": 0.05},
    published={"linear": False, "epochs": 10.0, "ascent_epochs": 5.0, "ascent_lr": 0.0001, "bound": 0.0, "lr": 0.01, "batch_size": 256},
    place="code: OPTML-Group/Unlearn-Sparse; 95 % pruned in the paper",
    lacks="it keeps and forgets in one of its four valid tables; on cifar10 it costs 17 to 21 points of retain accuracy",
)
def prune_unlearn(
    model: nn.Module, task: Task, split: Split, *, rate: float = 0.95, pruner: str = "omp", linear: bool = True, unlearner: str = "fine_tune",
    epochs: float = 4.0, ascent_epochs: float = 1.0, ascent_lr: float = 0.005, bound: float = 5.0, lr: float = 0.05, momentum: float = 0.9,
    weight_decay: float = 5e-4, batch_size: int = 64, buffers: str = "move", seed: int = 0,
) -> Patch:  # fmt: skip
    """See the module's docstring."""
    for name, value, known in (("pruner", pruner, PRUNERS), ("unlearner", unlearner, UNLEARNERS)):
        if value not in known:
            raise SettingError(f"{name} must be one of {', '.join(known)}, not '{value}'")
    if not 0 <= rate < 1:
        raise SettingError(f"rate must be in [0, 1), not {rate}")
    weights = prunable(model, linear)
    if pruner == "omp":
        gone = lowest({n: p.detach().abs() for n, p in weights.items()}, rate)
    else:
        gone = synflow(model, inputs(model, task.batches(split.retain, 1)[0]).shape[1:], rate, linear)

    def push(batch) -> Tensor:
        value = ascent(task.forward(model, batch))
        return value.mean() if bound == 0 else value.clamp(min=-bound).mean()

    with edit(model, everything(model, buffers), stats=task.batches(split.retain, 256)) as e:

        def zero(_: int = 0) -> None:
            with torch.no_grad():
                for name, mask in gone.items():
                    e.params[name].masked_fill_(mask, 0)

        zero()
        e.train()
        options = {"momentum": momentum, "weight_decay": weight_decay, "after": zero}
        descend(e, lambda b: nll(task.forward(model, b)).mean(), task.batches(split.retain, batch_size, epochs=epochs, seed=seed), lr=lr, **options)
        if unlearner == "ascent":
            descend(e, push, task.batches(split.forget, batch_size, epochs=ascent_epochs, seed=seed + 1), lr=ascent_lr, **options)
    return e.patch


def prunable(model: nn.Module, linear: bool = True) -> dict[str, Tensor]:
    """Trainable weights of convolutions and, if `linear`, of linear layers but the last. Raises ScopeError if there are none."""
    lines = [m for m in model.modules() if isinstance(m, nn.Linear)]
    kinds = (nn.Linear, nn.modules.conv._ConvNd) if linear else nn.modules.conv._ConvNd
    found = {f"{n}.weight" if n else "weight": m.weight for n, m in model.named_modules() if isinstance(m, kinds) and m.weight.requires_grad}
    found = {n: w for n, w in found.items() if not lines or w is not lines[-1].weight}
    if not found:
        raise ScopeError(f"nothing to prune: no trainable convolution{' or hidden linear layer' if linear else '; set linear=true'}")
    return found


def lowest(scores: dict[str, Tensor], rate: float) -> dict[str, Tensor]:
    """Masks of the int(N * rate) lowest scores over all tensors together; of equal scores the first in order go."""
    flat = torch.cat([s.reshape(-1) for s in scores.values()])
    mask = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    mask[flat.argsort(stable=True)[: int(len(flat) * rate)]] = True
    parts = mask.split([s.numel() for s in scores.values()])
    return {n: m.view_as(s) for (n, s), m in zip(scores.items(), parts, strict=True)}


def synflow(model: nn.Module, shape: torch.Size, rate: float, linear: bool = True, rounds: int = ROUNDS) -> dict[str, Tensor]:
    """Masks of the weights that SynFlow prunes; inputs have the given shape (without B).

    In round k all but the share (1 - rate)^(k / rounds) of the weights with the largest |w dR/dw| go, R = sum f(1; |theta|), an input of
    ones, eval mode. It works on a float64 copy; each round counts as one example forward and backward.
    """
    twin = copy.deepcopy(model).double().eval()
    weights = prunable(twin, linear)
    with torch.no_grad():
        for p in twin.parameters():
            p.abs_()
    first = next(iter(weights.values()))
    ones = torch.ones((1, *shape), dtype=first.dtype, device=first.device)
    gone = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in weights.items()}
    for k in range(1, rounds + 1):
        grads = torch.autograd.grad(twin(ones).sum(), list(weights.values()))
        guard.current().meter.add(forward=1, backward=1)
        scores = {n: (p * g).abs().detach().masked_fill(gone[n], -1) for (n, p), g in zip(weights.items(), grads, strict=True)}
        gone = lowest(scores, 1 - (1 - rate) ** (k / rounds))
        with torch.no_grad():
            for name, p in weights.items():
                p.masked_fill_(gone[name], 0)
    return gone
