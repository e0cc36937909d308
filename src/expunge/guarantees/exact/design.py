"""Designs: which components there are, what data each one learns from, and where it starts. Cards: sisa, s3t, safe-shard-graph.

A cell (shard, slice) holds records. A component is trained on the union of its cells, starting from its parent's weights; so it depends on the records of
its cells and of nothing else. One component per shard predicts: of those that stand, the one with the most cells.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from expunge.core.errors import SettingError, suggest
from expunge.guarantees.exact.capacity import costs, sequences

Cell = tuple[int, int]
"""(shard, slice), both from 0."""


@dataclass(frozen=True)
class Component:
    """One piece of training. `block`: the group of adapters that it trains besides the head; -1 trains everything."""

    name: str
    shard: int
    cells: tuple[Cell, ...]
    epochs: int
    parent: str = ""
    block: int = -1


@dataclass(frozen=True)
class Design:
    """Components in an order in which parents come first, and what made them: `DESIGNS[name](**settings)` gives the same.

    blocks      groups of adapters that the model gets; 0 trains the model itself, from weights drawn anew for each component without a parent
    detach      whether a deletion takes the touched components away and trains later (`refit`), rather than at once
    """

    name: str
    settings: Mapping[str, Any]
    components: tuple[Component, ...]
    shards: int
    slices: int = 1
    blocks: int = 0
    detach: bool = False
    never: frozenset[int] = field(default_factory=frozenset)
    """Shards whose records cannot be asked to go."""


def sisa(*, shards: int = 5, slices: int = 1, epochs: int = 20, detach: bool = False) -> Design:
    """Sharded, isolated, sliced, aggregated training (Bourtoule et al., S&P 2021; card sisa). `epochs`: those of a run without slices.

    With `detach` a deletion falls back to the longest training before the record came, as S3T with one order does.
    """
    _positive(shards=shards, slices=slices, epochs=epochs)
    per = costs.epochs(epochs, slices)
    parts = []
    for d in range(shards):
        for r in range(slices):
            parent = f"{d}/{r - 1}" if r else ""
            parts.append(Component(f"{d}/{r}", d, tuple((d, k) for k in range(r + 1)), per[r], parent))
    return Design("sisa", {"shards": shards, "slices": slices, "epochs": epochs, "detach": detach}, tuple(parts), shards, slices, detach=detach)


def s3t(*, shards: int = 5, slices: int = 6, budget: int = 6, epochs: int = 15, choice: str = "cyclic", prior: Sequence[float] = (), seed: int = 0) -> Design:
    """Sequence-aware sharded sliced training (card s3t): in each shard `budget` orders of the slices; step i of an order trains adapter block i and the head
    on its first i slices.

    choice  cyclic, or with a `prior` (expected deletions of each slice): matching or sampling
    Orders that begin alike share their components. A deletion detaches what saw the slice; a shard is trained anew when nothing is left of it.
    """
    _positive(shards=shards, slices=slices, budget=budget, epochs=epochs)
    orders = sequences.choose(choice, slices, budget, prior or None, seed)
    parts: dict[str, Component] = {}
    for d in range(shards):
        for order in orders:
            for i in range(slices):
                name = f"{d}/{'.'.join(map(str, order[: i + 1]))}"
                parent = name.rpartition(".")[0] if i else ""
                parts.setdefault(name, Component(name, d, tuple((d, s) for s in sorted(order[: i + 1])), epochs, parent, i))
    settings = {"shards": shards, "slices": slices, "budget": budget, "epochs": epochs, "choice": choice, "prior": list(prior), "seed": seed}
    return Design("s3t", settings, tuple(parts.values()), shards, slices, blocks=slices, detach=True)


def safe(
    *, shards: int = 16, graph: str = "cliques", clique: int = 2, edges: Sequence[Sequence[int]] = (), epochs: int = 20, detach: bool = False,
) -> Design:  # fmt: skip
    """SAFE (card safe-shard-graph): the component of a shard learns from its own records and from those of the shards that it may read.

    graph   isolated (SISA), cliques of `clique` shards, safe (all may read shard 0, whose records cannot be asked to go), complete
    edges   pairs (i, j): i may read j; given, they are the graph

    Differs  What is trained per shard is the model that is given, with `backbone=` on frozen features. The paper's InCA adapters (cross-attention of learnt
             queries over a frozen transformer's tokens) and the prototype classifier that its prediction is joined with, since a small shard sees few
             classes, are left out: its accuracies at hundreds of shards are not claimed. No code was published.
    """
    _positive(shards=shards, epochs=epochs)
    for edge in edges:
        if len(edge) != 2 or not all(isinstance(v, int) and 0 <= v < shards for v in edge):
            raise SettingError(f"an edge is a pair of shards from 0 to {shards - 1}, not {list(edge)}")
    reads = costs.checked(tuple(tuple(sorted({j for a, j in edges if a == i})) for i in range(shards)), shards) if edges else costs.graph(graph, shards, clique)
    parts = [Component(str(i), i, tuple((j, 0) for j in sorted({i, *reads[i]})), epochs) for i in range(shards)]
    settings = {"shards": shards, "graph": graph, "clique": clique, "edges": [list(e) for e in edges], "epochs": epochs, "detach": detach}
    never = frozenset({0} if graph == "safe" and not edges else ())
    return Design("safe", settings, tuple(parts), shards, detach=detach, never=never)


def _positive(**values: int) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or value < 1:
            raise SettingError(f"{name} must be a whole number from 1 on, not {value}")


DESIGNS: dict[str, Callable[..., Design]] = {"sisa": sisa, "s3t": s3t, "safe": safe}


def design(name: str, settings: Mapping[str, Any]) -> Design:
    """The design of that name. Raises SettingError for a name or a setting that does not exist."""
    if name not in DESIGNS:
        raise SettingError(suggest("there is no design", name, DESIGNS))
    try:
        return DESIGNS[name](**settings)
    except TypeError as error:
        raise SettingError(f"{name}: {error}") from None
