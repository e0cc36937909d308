"""Prune, then unlearn: set the least important weights to zero for good, then fine-tune on retain.

Paper    Jia et al., "Model Sparsity Can Simplify Machine Unlearning", NeurIPS 2023, arXiv:2304.04934.
Forgets  records, class.          Needs    retain.
Scope    all weights; pruned ones stay zero.   Forget  by pruning.   Retain  CE.   Update  SGD with the mask kept.   Leaves  Replace.
Settings
    rate          share of convolution and linear weights that are pruned, 0..1
    pruner        omp (global magnitude) or synflow (100 rounds of synaptic flow)
    epochs        passes over the retain set
    lr            step size
    momentum      of SGD
    weight_decay  of the optimiser
    batch_size    examples per step
    buffers       move, freeze or recompute: what happens to batch-norm statistics
Differs  The published OMP rewinds to epoch 8 and trains again, which needs a checkpoint from training; here the remaining weights go on
         from where they are. The output layer is never pruned.
Check
    >>> import torch; from expunge.methods.prune_unlearn import lowest
    >>> lowest({"w": torch.tensor([0.1, 3.0, 0.2, 4.0])}, 0.5)["w"]
    tensor([ True, False,  True, False])
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from expunge.errors import SettingError
from expunge.patch import Patch
from expunge.registry import method
from expunge.scopes.layers import everything
from expunge.session import edit
from expunge.tasks.classification import head, inputs
from expunge.types import Split, Task
from expunge.updates.descend import descend


@method(paper="arXiv:2304.04934", tasks=("classification", "regression"), needs=("retain",),
    cost=lambda n, s: (s["epochs"] * n["retain"], s["epochs"] * n["retain"]), toy={"rate": 0.95, "epochs": 4.0, "lr": 0.05})  # fmt: skip
def prune_unlearn(
    model: nn.Module,
    task: Task,
    split: Split,
    *,
    rate: float = 0.9,
    pruner: str = "omp",
    epochs: float = 3.0,
    lr: float = 0.05,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    batch_size: int = 64,
    buffers: str = "move",
    seed: int = 0,
) -> Patch:
    """See the module's docstring."""
    if pruner not in ("omp", "synflow") or not 0 <= rate < 1:
        raise SettingError(f"pruner must be omp or synflow and rate in [0, 1); found '{pruner}' and {rate}")
    weights = prunable(model)
    gone = lowest({n: p.detach().abs() for n, p in weights.items()}, rate) if pruner == "omp" else synflow(model, task.batches(split.retain, 2)[0], rate)
    with edit(model, everything(model, buffers), stats=split.retain and task.batches(split.retain, 256)) as e:

        def zero(_: int = 0) -> None:
            with torch.no_grad():
                for name, mask in gone.items():
                    e.params[name].masked_fill_(mask, 0)

        zero()
        e.train()
        descend(
            e, lambda b: task.forward(model, b).mean.mean(), task.batches(split.retain, batch_size, epochs=epochs, seed=seed),
            lr=lr, momentum=momentum, weight_decay=weight_decay, after=zero,
        )  # fmt: skip
    return e.patch


def prunable(model: nn.Module) -> dict[str, Tensor]:
    """Weights of convolution and linear layers, the last linear layer left out."""
    last = head(model)[1]
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    return {f"{n}.weight" if n else "weight": m.weight for n, m in model.named_modules() if isinstance(m, kinds) and m is not last and m.weight.requires_grad}


def lowest(scores: dict[str, Tensor], rate: float) -> dict[str, Tensor]:
    """Masks of the int(N * rate) lowest scores over all tensors together."""
    flat = torch.cat([s.reshape(-1) for s in scores.values()])
    mask = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    mask[flat.argsort(stable=True)[: int(len(flat) * rate)]] = True
    parts = mask.split([s.numel() for s in scores.values()])
    return {n: m.view_as(s) for (n, s), m in zip(scores.items(), parts, strict=True)}


def synflow(model: nn.Module, batch, rate: float, rounds: int = 100) -> dict[str, Tensor]:
    """SynFlow: in each round keep (1 - rate)^(round / rounds) of the weights with the largest |w dR/dw|, R = sum f(1; |theta|), eval mode."""
    twin = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for p in twin.parameters():
            p.abs_()
    weights = prunable(twin)
    ones = torch.ones_like(inputs(twin, batch)[:1])
    gone = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in weights.items()}
    for k in range(1, rounds + 1):
        grads = torch.autograd.grad(twin(ones).sum(), list(weights.values()))
        scores = {n: (p * g).abs().detach().masked_fill(gone[n], -1) for (n, p), g in zip(weights.items(), grads, strict=True)}
        gone = lowest(scores, 1 - (1 - rate) ** (k / rounds))
        with torch.no_grad():
            for name, p in weights.items():
                p.masked_fill_(gone[name], 0)
    return gone
