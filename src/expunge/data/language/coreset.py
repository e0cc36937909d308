"""UPCORE: the part of a forget set to train on, so that unlearning harms less; what was left out is checked item by item and put back if it survives.

Paper   Patil, Stengel-Eskin, Bansal, "UPCORE: Utility-Preserving Coreset Selection for Balanced Unlearning", arXiv:2502.15082; card upcore.
Code    Vaidehi99/UPCORE, MIT, commit 7835a89 (read only).

    core = upcore(model, split.forget)                    # h_i, scores, kept, pruned
    patch = METHODS["npo"](model, task, reduced(split, core))
    patch.apply(model)
    again = readd(model, task, split, core)               # forget = kept + the pruned items that the model still knows

 1. h_i = state of the last token of question i at the penultimate decoder block: of the question, not of the template around it, whose end is
    the same for all.
 2. Outlier scores of {h_i} within each group (topic); the ceil(contamination (n - 1)) most outlying items of a group of n > 2 are pruned.
 3. Variance = trace of the unbiased covariance (divided by n - 1), averaged over groups by their size.

A deletion request covers all items. The paper leaves ROUGE of .05 to .23 on pruned items, so a reduced split alone fulfils no request: `readd` does.

Differs  Ties are broken by position, so that every kind prunes the same number. The published one-class SVM and PCA are left out; Mahalanobis
         distance with shrunk covariance is added: it depends on no seed, and finds items that are far out along one direction alone, which a
         forest, whose cuts are parallel to the axes, overlooks in many dimensions.
Check
    >>> points = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0], [2.0, 4.0]])
    >>> round(spread(points), 6), spread(points, unbiased=False), round(trapezoid([0, 0.5, 1], [1, 0.8, 0.2]), 6)
    (6.666667, 5.0, 0.7)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from expunge.core.errors import DataError, SettingError, SplitError, first_line, suggest
from expunge.core.files import seal_json, unsealed_json, write
from expunge.core.guard import quiet
from expunge.core.types import Split, Task
from expunge.modalities.language.task import blocks, buckets, collate, hidden
from expunge.modalities.language.texts import Texts

KINDS = ("forest", "mahalanobis", "lof", "random")

Known = Callable[[nn.Module, Task, Any], Tensor]
"""(model, task, data) -> (N,) bool: which items the model still knows."""


@dataclass(frozen=True)
class Core:
    """What was kept and what was pruned of one forget set, by position, and why; `data` is the digest of that set."""

    kept: tuple[int, ...]
    pruned: tuple[int, ...]
    scores: tuple[float, ...]
    """How far out each item lies, by the measure of `kind`; larger is further."""
    variance_before: float
    variance_after: float
    kind: str
    contamination: float
    seed: int
    data: str = ""

    def save(self, path: Path | str) -> Path:
        """Write as sealed JSON."""
        return write(path, seal_json(asdict(self)) + "\n")

    @staticmethod
    def load(path: Path | str, data: Texts | None = None) -> Core:
        """Read what `save` wrote. Raises DataError for a damaged file, or one that was made for other data than `data`."""
        name = Path(path).name
        try:
            found = unsealed_json(Path(path), DataError, "is no core")
            core = Core(**{f.name: tuple(found[f.name]) if isinstance(found[f.name], list) else found[f.name] for f in fields(Core)})
            whole = sorted(core.kept + core.pruned) == list(range(len(core.scores)))
        except (KeyError, TypeError) as error:
            raise DataError(f"cannot read {name} as a core: {first_line(error)}") from None
        if not whole:
            raise DataError(f"{name} is damaged: kept and pruned are not all items, each once")
        if data is not None:
            _same(core, data)
        return core


def upcore(
    model: nn.Module, data: Texts, *, kind: str = "forest", contamination: float = 0.1, group: str = "", layer: str = "", seed: int = 42
) -> Core:  # fmt: skip
    """The core of a forget set of texts, by the states of `model`, which is not changed.

    kind            forest (isolation forest), mahalanobis (covariance shrunk by Ledoit-Wolf), lof (local outlier factor) or random (the control)
    contamination   share that is pruned, 0..0.5
    group           field of the records by which they are grouped, as "author" or "relation"; one group when ""
    layer           module whose output is read; the penultimate decoder block when ""
    """
    if group and (number := next((k for k, row in enumerate(data.rows, 1) if group not in row), 0)):
        raise DataError(f"record {number} has no field '{group}' to be grouped by")
    groups = [row[group] for row in data.rows] if group else None
    return replace(select(question_states(model, data, layer=layer), kind=kind, contamination=contamination, groups=groups, seed=seed), data=data.digest)


def select(states: Tensor, *, kind: str = "forest", contamination: float = 0.1, groups: Sequence[Hashable] | None = None, seed: int = 42) -> Core:
    """The core by states (N, D) of any model; `groups` names the group of each item.

    >>> select(torch.tensor([0.0, 0.1, -0.1, 0.05, 100.0, 0.02, -0.03, 0.07, -0.06, 0.01, 0.04])[:, None], contamination=1 / 11).pruned
    (4,)
    """
    if kind not in KINDS:
        raise SettingError(suggest("no kind of core", kind, KINDS))
    if not 0 < contamination <= 0.5:
        raise SettingError(f"contamination must be above 0 and at most 0.5, not {contamination:g}")
    if states.ndim != 2 or not len(states) or not torch.isfinite(states).all():
        raise SettingError(f"states must be (N, D), finite and not empty; found {tuple(states.shape)}")
    labels = [""] * len(states) if groups is None else list(groups)
    if len(labels) != len(states):
        raise SettingError(f"{len(labels)} groups for {len(states)} items")
    h = states.detach().double().cpu()
    rows = {label: [k for k, other in enumerate(labels) if other == label] for label in dict.fromkeys(labels)}
    scores, pruned = np.zeros(len(h)), set()
    for number, own in enumerate(rows.values()):
        scores[own] = outlying(h[own].numpy(), kind, contamination, seed + number)
        count = math.ceil(contamination * (len(own) - 1) - 1e-9) if len(own) > 2 else 0
        pruned |= set(sorted(own, key=lambda k: (-scores[k], k))[:count])
    kept = [k for k in range(len(h)) if k not in pruned]
    before, after = ([h[[k for k in own if k in there]] for own in rows.values()] for there in (set(range(len(h))), set(kept)))
    return Core(tuple(kept), tuple(sorted(pruned)), tuple(scores.tolist()), _within(before), _within(after), kind, contamination, seed)


def outlying(h: np.ndarray, kind: str, contamination: float, seed: int) -> np.ndarray:
    """(N,) how far out each row of h (N, D) lies; fewer than three rows all lie at 0."""
    from sklearn.covariance import LedoitWolf
    from sklearn.ensemble import IsolationForest
    from sklearn.neighbors import LocalOutlierFactor

    if len(h) < 3:
        return np.zeros(len(h))
    if kind == "forest":
        return -IsolationForest(contamination=contamination, random_state=seed).fit(h).score_samples(h)
    if kind == "mahalanobis":
        return LedoitWolf().fit(h).mahalanobis(h)
    if kind == "lof":
        return -LocalOutlierFactor(n_neighbors=min(20, len(h) // 2)).fit(h).negative_outlier_factor_
    return torch.rand(len(h), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).numpy()


def spread(states: Tensor, *, unbiased: bool = True) -> float:
    """Trace of the covariance of (N, D): the variances of all features, summed, each divided by N - 1 (or by N); 0 for fewer than two rows."""
    return float(states.double().var(0, correction=int(unbiased)).sum()) if len(states) > 1 else 0.0


def _within(groups: list[Tensor]) -> float:
    return sum(len(g) * spread(g) for g in groups) / sum(len(g) for g in groups)


def question_states(model: nn.Module, data: Texts, *, layer: str = "", size: int = 32) -> Tensor:
    """(N, D) state of the last token of each question (of the whole text where a record asks none) at the named module; the penultimate block when ""."""
    found = blocks(model)
    layer = layer or found[max(0, len(found) - 2)][0]
    tokens = tuple(_asked(data, k) for k in range(len(data)))
    asked = replace(data, tokens=tokens, targets=tuple(torch.zeros(len(t), dtype=torch.bool) for t in tokens))
    states: dict[int, Tensor] = {}
    with quiet(model):
        for rows in buckets([len(t) for t in tokens], size):
            batch = collate(asked, rows, None)
            h = hidden(model, batch, layer)
            last = h[torch.arange(len(h)), (batch["n"] - 1).to(h.device)].float().cpu()
            states |= dict(zip(rows.tolist(), last, strict=True))
    return torch.stack([states[k] for k in range(len(data))])


def _asked(data: Texts, k: int) -> Tensor:
    """Tokens of record k up to the end of its question: in a causal model, the state there depends on nothing that follows."""
    row, form = data.rows[k], data.format
    if "question" not in row:
        return data.tokens[k]
    text, question = form.prompt_text(row), str(row["question"]).strip()
    at = text.rfind(question)
    if at < 0 or not question:
        raise DataError(f"record {k + 1}: the question does not stand in its prompt")
    ids = form.tokenizer(text[: at + len(question)], add_special_tokens=form.template != "chat")["input_ids"]
    if len(ids) > 1 and ids[-1] == form.tokenizer.eos_token_id:
        ids = ids[:-1]
    return torch.tensor(ids[-form.max_length :], dtype=torch.long)


def reduced(split: Split, core: Core) -> Split:
    """The split whose forget part is the core alone. Raises SplitError for a core of other data."""
    _same(core, split.forget)
    return replace(split, forget=split.forget.take(core.kept))


def likelihood(model: nn.Module, task: Task, data: Any, size: int = 32) -> Tensor:
    """(N,) exp(-S / |y|): the probability of each item's answer, per token."""
    with quiet(model):
        return torch.cat([(-task.forward(model, batch).mean).exp().float().cpu() for batch in task.batches(data, size)])


def likely(threshold: float) -> Known:
    """Known: an answer whose probability per token is at least `threshold`."""
    return lambda model, task, data: likelihood(model, task, data) >= threshold


def beyond(unseen: Any, share: float = 0.95) -> Known:
    """Known: an answer likelier, per token, than this share of answers on `unseen` records, which the model was never trained on."""
    return lambda model, task, data: likelihood(model, task, data) > likelihood(model, task, unseen).quantile(share)


def survivors(model: nn.Module, task: Task, split: Split, core: Core, known: Known | None = None) -> tuple[int, ...]:
    """Positions in forget of pruned items that the unlearned `model` still knows, by `known` or else by `beyond(split.validation)`."""
    _same(core, split.forget)
    if known is None:
        split.require("validation")
        known = beyond(split.validation)
    if not core.pruned:
        return ()
    found = known(model, task, split.forget.take(core.pruned))
    return tuple(k for k, yes in zip(core.pruned, found.tolist(), strict=True) if yes)


def readd(model: nn.Module, task: Task, split: Split, core: Core, known: Known | None = None) -> Split:
    """The split whose forget part is the core and, put back, every pruned item that survived in the unlearned `model`, in the order of the request."""
    return replace(split, forget=split.forget.take(sorted({*core.kept, *survivors(model, task, split, core, known)})))


def _same(core: Core, data: Any) -> None:
    if len(core.scores) != len(data) or (core.data and core.data != data.digest):
        raise SplitError(
            f"the core was made for other forget data: {len(core.scores)} items, digest {core.data or 'unknown'}; found {len(data)}, {data.digest}"
        )


def trapezoid(deletion: Sequence[float], utility: Sequence[float]) -> float:
    """Area under the polyline of checkpoints (deletion, utility), in the order of deletion: UPCORE's score, larger is better."""
    if len(deletion) != len(utility) or len(deletion) < 2:
        raise SettingError(f"a curve needs two or more points of two numbers; found {len(deletion)} and {len(utility)}")
    x, y = (np.asarray(v, dtype=float) for v in (deletion, utility))
    order = np.argsort(x, kind="stable")
    return float(np.trapezoid(y[order], x[order]))
