"""What a diffusion model draws, as a judge sees it. Source: card unlearn-canvas (Zhang et al., NeurIPS 2024).

    UA    1 - share of drawings of the erased concept that the judge still names so
    IRA   share named rightly among drawings of the other concepts of its domain
    CRA   share named rightly in the other domains, over all drawings
    distance   Frechet distance between the judge's features of drawn and of real retained images
    seconds, memory, storage   what the method took: run time, peak on the GPU (or, above its start, of the process) in GB, and what is kept in GB, where
                               the run measured them (`Probe.cost`)

Before and after draw from the same noise. A judge has no word for "nothing": a destroyed image counts as unlearned, so read UA beside the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from expunge.audits.core import Probe, Row
from expunge.audits.drop import paired
from expunge.core.registry import check
from expunge.core.stats import wilson
from expunge.core.types import concat
from expunge.modalities.diffusion.trajectory import distinct
from expunge.modalities.judge import Judge, renamed, target
from expunge.modalities.pictures import Pictures

GONE, KEPT = 60, 240
"""Drawings of the erased concept (all of them gone is at least 0.957 by Wilson's bound), and of the others, shared evenly among combinations of concepts."""


def rates(wanted: Sequence[Mapping[str, Any]], said: Mapping[str, Sequence[str]], domain: str, concept: str) -> dict[str, tuple[int, int]]:
    """(hits, n) of ua, ira and cra for rows of prompts and what the judge said per domain.

    Check (card unlearn-canvas): 2 styles x 2 objects, style a erased
    >>> rows = [{"style": s, "object": o} for s in "ab" for o in "xy"]
    >>> rates(rows, {"style": ["b", "a", "b", "b"], "object": ["x", "y", "x", "x"]}, "style", "a")
    {'ua': (1, 2), 'ira': (2, 2), 'cra': (3, 4)}
    """
    right = named_rightly(wanted, said)
    mine = torch.tensor([row[domain] == concept for row in wanted])
    out = {"ua": (int((mine & ~right[domain]).sum()), int(mine.sum())), "ira": (int((right[domain] & ~mine).sum()), int((~mine).sum()))}
    if others := [right[d] for d in said if d != domain]:
        out["cra"] = (int(torch.cat(others).sum()), len(others) * len(wanted))
    return out


def named_rightly(wanted: Sequence[Mapping[str, Any]], said: Mapping[str, Sequence[str]]) -> dict[str, Tensor]:
    """(N,) bool per domain: the judge's word is the one that was asked for."""
    return {d: torch.tensor([row[d] == word for row, word in zip(wanted, words, strict=True)]) for d, words in said.items()}


def frechet(a: Tensor, b: Tensor) -> float:
    """Frechet distance between normal fits of features (N, D) and (M, D): |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)). Biased upwards for few samples.

    >>> x = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    >>> round(frechet(x, x), 6), round(frechet(x, x + 2), 4)
    (0.0, 12.0)
    """
    a, b = a.double(), b.double()
    A, B = a.T.cov(), b.T.cov()
    root = _root(A)
    cross = torch.linalg.eigvalsh(root @ B @ root).clamp(min=0).sqrt().sum()
    return max(0.0, float((a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * cross))


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def drawings(data: Pictures, fields: Sequence[str], n: int) -> Pictures:
    """Some n rows to draw: the different prompts of each combination of concepts in turn, every combination equally often (of more than n, n spread evenly),
    numbered from 0 on."""
    unique, _ = distinct(data)
    groups: dict[tuple, list[int]] = {}
    for k, row in enumerate(unique.rows):
        groups.setdefault(tuple(row.get(f) for f in fields), []).append(k)
    every = list(groups.values())
    some = every if len(every) <= n else [every[k * len(every) // n] for k in range(n)]
    index = [rows[j % len(rows)] for rows in some for j in range(n // len(some))]
    return replace(unique.take(index), x=None, ids=torch.arange(len(index)))


@dataclass(frozen=True)
class Asked:
    """What the checks of drawings draw, and for what request.

    fields     the judge's domains                              domain, concept    what is erased
    prompts    those of the erased concept, then the others     held               the concept's prompts in test that forget lacks, or None
    gone       (N,) bool: which prompts name the concept
    """

    judge: Judge
    fields: tuple[str, ...]
    domain: str
    concept: str
    prompts: Pictures
    held: Pictures | None
    gone: Tensor

    def drawn(self, p: Probe, model: nn.Module) -> Tensor:
        """(N, C, H, W) the drawings of the prompts, made once for all checks."""
        return draw_once(p, model, "canvas", self.prompts)

    def drawn_held(self, p: Probe, model: nn.Module) -> Tensor:
        """(M, C, H, W) those of the test prompts."""
        return draw_once(p, model, "alias", self.held) if self.held is not None else torch.zeros(0)


def asked(p: Probe) -> Asked | None:
    """What is drawn for the request; None without a judge. Raises SettingError where it erases not exactly one concept."""
    task: Any = p.task
    if task.judge is None:
        return None
    judge = task.judge()
    fields = tuple(judge.names)
    domain, concept = target(p.split, fields)
    mine, others = (judge.drawings, 2 * judge.drawings) if judge.drawings else (GONE, KEPT)
    both = concat(drawings(p.split.forget, fields, mine), drawings(p.split.retain, fields, others))
    index = renamed(p.split, domain, concept)
    held = drawings(p.split.test.take(index), fields, mine) if index else None
    gone = torch.tensor([row[domain] == concept for row in both.rows])
    return Asked(judge, fields, domain, concept, replace(both, ids=torch.arange(len(both))), held, gone)


def trust(p: Probe, q: Asked) -> tuple[Mapping[str, Tensor], str, str]:
    """How far the judge can be trusted: (n,) bool per domain, in what it was right, and on what. One that was tried on no held-out images is compared with the
    prompts on drawings of the model before, which may err as well."""
    if q.judge.right:
        return q.judge.right, "judge right on", "held-out images"

    def agreed() -> dict[str, Tensor]:
        x = q.drawn(p, p.before)
        return named_rightly(q.prompts.rows, {d: q.judge.says(x, d) for d in q.fields})

    return p.once(("trust", p.seed), p.before, agreed), "judge agrees with the prompt on", "drawings of the model before"


@check(tasks=("diffusion",), needs=("forget", "retain"))
def canvas(p: Probe) -> list[Row]:
    """canvas.ua, .ira, .cra with Wilson bounds, and canvas.ira_drop, .cra_drop against the model before on the same noise; canvas.alias: share of
    drawings under the erased concept's other names and wordings (test) that still show it; canvas.distance of retained drawings, and that before;
    canvas.seconds, .memory (GB) and .storage (GB) of the run, where it measured them.
    """
    q = asked(p)
    if q is None:
        return []
    shown = {name: q.drawn(p, model) for name, model in (("before", p.before), ("after", p.after))}
    said = {name: {d: q.judge.says(x, d) for d in q.fields} for name, x in shown.items()}
    found = rates(q.prompts.rows, said["after"], q.domain, q.concept)
    right, does, what = trust(p, q)
    sure = ", ".join(f"{d} {float(r.float().mean()):.3f} of {len(r)}" for d, r in right.items())
    sure += f" ({q.judge.about})" if q.judge.about else ""
    rows = [Row(f"canvas.{k}", *wilson(*v), v[1], f"{does} {what}: {sure}") for k, v in found.items()]
    before, after = (named_rightly(q.prompts.rows, said[name]) for name in ("before", "after"))
    lost, stays = {d: before[d].float() - after[d].float() for d in q.fields}, ~q.gone
    rows.append(paired("canvas.ira_drop", lost[q.domain][stays], "against the model before, on the same noise"))
    if others := [lost[d] for d in q.fields if d != q.domain]:
        rows.append(paired("canvas.cra_drop", torch.cat(others), "against the model before, on the same noise"))
    if q.held is not None:
        for name, model in (("canvas.alias", p.after), ("canvas.alias_before", p.before)):
            words = q.judge.says(q.drawn_held(p, model), q.domain)
            rows.append(Row(name, *wilson(words.count(q.concept), len(words)), len(words), "prompts that no method was given"))
    real = p.split.retain.x
    if real is not None:
        base = q.judge.features(real, q.domain)
        note = f"{int(stays.sum())} drawings, {len(base)} images, features of the {q.domain} judge"
        for name, which in (("canvas.distance", "after"), ("canvas.distance_before", "before")):
            value = frechet(q.judge.features(shown[which][stays], q.domain), base)
            rows.append(Row(name, value, value, value, int(stays.sum()), note))
    return rows + efficiency(p.cost)


def efficiency(cost: Mapping[str, float]) -> list[Row]:
    """canvas.seconds, .memory and .storage of a run's cost (seconds, and bytes); none for what it does not hold or did not measure.

    >>> [(r.name, r.value) for r in efficiency({"seconds": 2.5, "storage": 4.3e9, "forward": 7})]
    [('canvas.seconds', 2.5), ('canvas.storage', 4.3)]
    """
    units = (
        ("seconds", "seconds", 1.0, "s of wall time"), ("memory", "memory", 1e9, "GB at the peak, on the GPU"),
        ("memory", "resident", 1e9, "GB of the process at the peak, above what it held at the start of the run"),
        ("storage", "storage", 1e9, "GB of the patch's tensors"),
    )  # fmt: skip
    found = [(name, float(cost[key]) / scale, note) for name, key, scale, note in units if cost.get(key)]
    return [Row(f"canvas.{name}", value, value, value, 1, note, indicative=True) for name, value, note in found]


def draw_once(p: Probe, model: nn.Module, what: str, asked: Pictures) -> Tensor:
    """The drawings of a model, made once however many checks ask."""
    sample: Any = p.task.sample
    return p.once((what, p.seed), model, lambda: sample(model, asked, seed=p.seed))
