"""Class concepts: find the concepts that tie a class to the model, relabel its records by them, and train on those labels for a few passes.

Paper    Chang et al., "Class Machine Unlearning for Complex Data via Concepts Inference and Data Poisoning", 2024, arXiv:2405.15662.
Forgets  class.          Needs    forget, retain.
Scope    all weights, or the last layers.   Forget  CE(f(x), y'), y' chosen by concepts.   Retain  alpha * CE on as many retain records.
Update   a short SGD run on pairs of batches.   Leaves  Replace.
Settings
    target        nearest: per record the kept class that its shared concepts speak for; class: the kept class whose concept vector is nearest to
                  the removed one's; random: a kept class at random
    concepts      nmf, pca or cav: where the concept directions come from
    count         most directions (nmf and pca)
    q             concepts that link a class to the model: those with the largest mean |contribution|
    layer         module whose output is the feature space; empty: the inputs of the last linear layer
    last          edit only the last so many linear and convolution layers; 0: all weights
    alpha         weight of the retain loss
    epochs        passes over the forget set
    lr            step size
    momentum      of SGD
    batch_size    examples per step
    buffers       move, freeze or recompute: what happens to batch-norm statistics
Differs  No public code exists; the pipeline is that of the abstract, its two parts are the standard forms of concept bottlenecks and integrated
         gradients, and all settings are unverified. Directions come from the model's own features instead of CLIP words, scores are
         centred and scaled on retain. The bottleneck chooses labels alone; the model is not routed through it. `class` sends all records
         to one class, a signature that is easily read back, so the default is per record. Language models are left out. Whether the
         concepts still count afterwards is measured by `expunge.audits.records.concepts.attributions`, not by a second round.
Check
    >>> import torch; from expunge.parts.scopes.concepts import Bottleneck, contributions
    >>> layer = Bottleneck(torch.tensor([[2.0, -1.0, 0.0]]), torch.tensor([0.2]))
    >>> contributions(layer, torch.tensor([[1.5, 0.5, 3.0]]), 0)    # sum 2.5 = y(a) - y(0)
    tensor([[ 3.0000, -0.5000,  0.0000]])
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from expunge.core.errors import SettingError, SplitError
from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.session import edit
from expunge.core.types import Paired, Split, Task, drawn
from expunge.parts.losses import nll, relabel
from expunge.parts.scopes import layers
from expunge.parts.scopes.concepts import Bottleneck, bank, bottleneck, class_vectors, embed, exclusive, nearest_classes
from expunge.parts.updates.descend import descend

TARGETS = ("nearest", "class", "random")


def poisoned(target: str, layer: Bottleneck, scores: Tensor, labels: Tensor, vectors: Tensor, kept: Tensor, q: int) -> Tensor:
    """(N,) a wrong label among `kept` classes for records with concept scores (N, K) and labels (N,), in the way of `target`."""
    out = labels.clone()
    for c in labels.unique().tolist():
        rows, others = labels == c, kept[kept != c]
        if not len(others):
            raise SplitError(f"retain holds no class other than {c}, so its records cannot be relabelled")
        if target == "random":
            out[rows] = others[torch.randint(len(others), (int(rows.sum()),))]
        elif target == "class":
            out[rows] = nearest_classes(vectors, c, others)[0]
        else:
            shared = scores[rows].clone()
            shared[:, exclusive(vectors, c, q)] = 0
            out[rows] = others[layer.logits(shared)[:, others].argmax(1)]
    return out


def _cost(n, s) -> tuple[float, float]:
    steps = max(1, round(-(-n["forget"] // s["batch_size"]) * s["epochs"]))
    trained = sum(drawn(n[part], s["batch_size"], steps) for part in ("forget", "retain"))
    return n["forget"] + n["retain"] + trained, trained


@method(
    paper="arXiv:2405.15662", tasks=("classification",), needs=("forget", "retain"), forgets=("class",), cost=_cost, toy={"epochs": 10.0},
    place="the card names no place: no code is public, and all settings are unverified",
    lacks="on digits it costs 4 points of the kept classes, and one seed of three closes 0.28 of the gap",
)  # fmt: skip
def class_concepts(
    model: nn.Module,
    task: Task,
    split: Split,
    *,
    target: str = "nearest",
    concepts: str = "nmf",
    count: int = 20,
    q: int = 5,
    layer: str = "",
    last: int = 0,
    alpha: float = 1.0,
    epochs: float = 5.0,
    lr: float = 0.003,
    momentum: float = 0.9,
    batch_size: int = 64,
    buffers: str = "move",
    seed: int = 0,
) -> Patch:
    """See the module's docstring."""
    if target not in TARGETS:
        raise SettingError(f"target must be one of {', '.join(TARGETS)}, not '{target}'")
    if count < 1 or q < 1:
        raise SettingError(f"count and q must be 1 or larger; found {count} and {q}")
    scope = layers.last(model, last, buffers) if last else layers.everything(model, buffers)
    stay = embed(model, task, split.retain, layer)
    features, y = torch.cat([embed(model, task, split.forget, layer), stay]), torch.cat([split.forget.y, split.retain.y])
    found = bank(features, y, stay, kind=concepts, count=count, seed=seed)
    a = found.scores(features)
    link = bottleneck(a, y, int(y.max()) + 1)
    vectors = class_vectors(link, a, y)
    labels = poisoned(target, link, a[: len(split.forget)], split.forget.y, vectors, split.retain.y.unique(), q)

    def loss(pair) -> Tensor:
        return relabel(task.forward(model, pair[0]), labels[pair[0]["i"]]).mean() + alpha * nll(task.forward(model, pair[1])).mean()

    gone = task.batches(split.forget, batch_size, epochs=epochs, seed=seed)
    kept = task.batches(split.retain, batch_size, epochs=len(gone) / -(-len(split.retain) // batch_size), seed=seed + 1)
    with edit(model, scope, stats=task.batches(split.retain, 256)) as e:
        e.train()
        descend(e, loss, Paired(gone, kept), lr=lr, momentum=momentum)
    return e.patch
