"""DUCK: pull the features of forgotten records to the nearest centroid of a wrong class, holding the retain set.

Paper    Cotogni et al., "DUCK: Distance-based Unlearning via Centroid Kinematics", 2023, arXiv:2312.02052.
Forgets  records, class.          Needs    forget, retain.
Scope    all weights.   Forget  lambda1 * (1 - cos(features, wrong centroid)).   Retain  lambda2 * CE(logits / T).   Update  nested batches,
         Adam.   Leaves  Replace.
Settings
    lambda1      weight of the distance
    lambda2      weight of the retain loss
    temperature  T
    ratio        retain batches per forget batch
    epochs       most passes over the forget set
    target       stop when forget accuracy is at most this; negative: 0.01 for a removed class, validation accuracy for records
    polish       passes over retain of the second phase, cosine lr from 1e-4, with a tenth of lambda1; 0 for none, published code 2
    lr           step size of the first phase
    batch_size   examples per step
    buffers      move, freeze or recompute: what happens to batch-norm statistics
Differs  Targets are fixed per record, not per batch index, and centroids keep their label beside them. The stop reads validation, never
         test. The paper has one phase; its code adds the second, in which a removed class is held by its first forget batch alone
         and records by one forget batch per 20 of retain: here forget batches are cycled in both cases.
Check
    >>> import torch; from expunge.parts.losses.features import cosine_distance
    >>> cosine_distance(torch.tensor([[3.0, 1.0]] * 3), torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]))
    tensor([0.0513, 0.6838, 1.9487])
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from expunge.core.guard import quiet
from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.session import edit
from expunge.core.types import Paired, Split, Task, drawn
from expunge.parts.losses.features import cosine_distance
from expunge.parts.reading import features
from expunge.parts.scopes.layers import everything
from expunge.parts.updates.descend import descend


def _cost(n, s) -> tuple[float, float]:
    """An upper bound: the first phase stops when `target` is reached."""
    size, per_epoch = s["batch_size"], -(-n["retain"] // s["batch_size"])
    phases = [-(-n["forget"] // size) * s["ratio"]] * s["epochs"] + ([max(1, round(per_epoch * s["polish"]))] if s["polish"] else [])
    trained = sum(drawn(n[part], size, steps) for steps in phases for part in ("forget", "retain"))
    probed = n.get("validation", 0) if s["target"] < 0 else 0
    return trained + (1 + s["epochs"]) * n["forget"] + n["retain"] + probed, trained


@method(
    paper="arXiv:2312.02052", tasks=("classification",), needs=("forget", "retain"), cost=_cost, toy={"epochs": 4, "lr": 0.003},
    published={"ratio": 40, "epochs": 10, "batch_size": 1024}, place="code: README and opts.py, CIFAR-10; the paper's supplement was not seen",
    stable=True,
)  # fmt: skip
def duck(
    model: nn.Module,
    task: Task,
    split: Split,
    *,
    lambda1: float = 1.0,
    lambda2: float = 1.4,
    temperature: float = 2.0,
    ratio: int = 4,
    epochs: int = 4,
    target: float = -1.0,
    polish: float = 0.0,
    lr: float = 0.001,
    batch_size: int = 64,
    buffers: str = "move",
    seed: int = 0,
) -> Patch:
    """See the module's docstring."""

    kept, gone = (features(model, task, part) for part in (split.retain, split.forget))
    labels = split.retain.y.unique()
    centres = torch.stack([kept[split.retain.y == c].mean(0) for c in labels])
    distance = 1 - torch.nn.functional.cosine_similarity(gone[:, None], centres[None], dim=-1)
    own = split.forget.y[:, None] == labels[None]
    aim = centres[distance.masked_fill(own.to(distance.device), torch.inf).argmin(1)]

    def loss(pair, pull: float = lambda1) -> Tensor:
        moved = task.features(model, pair[0], "")
        out = task.forward(model, pair[1])
        ce = torch.nn.functional.cross_entropy(out.logits / temperature, out.labels)
        return pull * cosine_distance(moved, aim[pair[0]["i"]].to(moved)).mean().to(ce) + lambda2 * ce

    def accuracy(data) -> float:
        batches = task.batches(data, 256)
        with quiet(model):
            outs = [task.forward(model, batches[k]) for k in range(len(batches))]
        return float(torch.cat([(o.logits.argmax(-1) == o.labels).float() for o in outs]).mean())

    removed = not set(split.forget.y.tolist()) & set(split.retain.y.tolist())
    if target < 0:
        target = 0.01 if removed else (accuracy(split.validation) if split.validation is not None else -1.0)
    with edit(model, everything(model, buffers), stats=split.retain and task.batches(split.retain, 256)) as e:
        e.train()
        for epoch in range(epochs):
            steps = -(-len(split.forget) // batch_size) * ratio
            per = -(-len(split.retain) // batch_size)
            pairs = Paired(
                task.batches(split.forget, batch_size, epochs=ratio, seed=seed + 2 * epoch),
                task.batches(split.retain, batch_size, epochs=steps / per, seed=seed + 2 * epoch + 1),
            )
            descend(e, loss, pairs, lr=lr, optimizer="adam")
            if accuracy(split.forget) <= target:
                break
        if polish:
            pairs = Paired(task.batches(split.forget, batch_size, seed=seed), task.batches(split.retain, batch_size, epochs=polish, seed=seed + 1))
            descend(e, lambda pair: loss(pair, lambda1 / 10), pairs, lr=1e-4, optimizer="adam", schedule="cosine")
    return e.patch
