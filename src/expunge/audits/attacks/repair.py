"""Is it gone, or only switched off? Repairs of the candidate that train nothing or next to nothing, read against retrained models after the same repair.

Suppression leaves what was learnt in place and changes what stands before the answer: one bias, a row of the last layer, a channel. Put that back, or make the
last layer even, and all is there. A model that was retrained without the records gains nothing from any of it: there is nothing to bring back.

    repair.free             the best of the repairs below: (repaired - gone) / (original - gone); 0 for a retrained model, 1 where all is back
    repair.free.none        no repair                              repair.free.biases, .rows, .even    biases, norms of rows of the last layer made equal, both
    repair.free.calibrated  each logit's mean on kept records taken off
    repair.free.weights     at most FREE of the weights put back   repair.free.row, .head   the rows of what was removed, the last layer put back
    repair.free.aligned     the original's last layer on units that are matched with its own: no reordering or rescaling of units hides them
    repair.free.rank        the largest part of rank 4 of each matrix's change taken out (texts)   repair.free.bare    guards, hooks off
    repair.p                few records: smallest p over those of these repairs that bring back a tenth, of "no better known than unseen records of the same
                            form after the same repair"; 1 where none does
    repair.weights          smallest share of all weights that brings back half; repair.weights.count: how many they are
    repair.odds             AUC of the log-odds of a removed class between its records and kept ones, above retrained models: no shift of a logit changes it
    repair.odds.recall      the same for the share of its records above all but SPILL of the kept ones: what the best shift of its logit brings back
    repair.head             what 1, 4 and 16 forgotten records and kept ones teach a new last layer about the others, above retrained models
    repair.norm             what normalisation statistics and gains learnt anew on kept records bring back, above retrained models
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from expunge.audits.attacks import mend
from expunge.audits.attacks.inside import narrow
from expunge.audits.attacks.reread import Reading, above, noticed, reading, regained, some
from expunge.audits.core import Probe, Row
from expunge.core import guard
from expunge.core.errors import ModelError
from expunge.core.hooks import bare, guards
from expunge.core.registry import check
from expunge.core.session import NORMS, recompute, scratch
from expunge.core.stats import auc, wilson
from expunge.core.types import IGNORE
from expunge.parts.reading import Scores, features, score
from expunge.parts.training import fresh, pace
from expunge.parts.updates.descend import descend

SPILL = 0.01
"""Share of kept records that may be answered with the removed class when its logit is raised."""

FREE = 0.01
"""Largest share of the weights that counts as a repair for free when it is put back."""

HALF = 0.5
"""Share of the gap at which knowledge counts as back."""

SHOTS = (1, 4, 16)
DRAWS = 3
"""Forgotten records that a new last layer is shown, and how often they are drawn."""

KEPT = 300
"""Most kept records that a repair is calibrated or fitted on."""

WIDE = 1024
"""Most inputs of a last layer that are matched with the original's."""

ALIKE = 0.9
"""Least median correlation of matched units that calls them the original's: those of another training correlate by 0.6 to 0.8."""

STEPS = 16
"""Steps in which normalisation learns, and in which a language model's output layer does."""

WIDEST = 1 << 25
"""Largest output matrix of a language model that is taught anew."""

LIMITS = {"repair.free": "<= 0.5", "repair.weights": ">= 0.01", "repair.odds.recall": "<= 0.6", "repair.head": "<= 0.25", "repair.norm": "<= 0.25"}
"""Recommended rules, set by the readings below; both halves of `bench.adaptive.HALVES` had been seen, so no clean test: what-would-fool-this-audit.md.

Ends that the rules read. Digits without one class, 3 references: 48 retrained models beside 4 originals read repair.free up to 0.27, repair.weights from 1.0,
repair.odds.recall up to 0.52, repair.head up to 0.19. 24 beside 2 originals with wrong labels (50 records): repair.free up to 0.43, repair.head up to 0.22.
Texts: repair.free up to 0.21 with one reference and 0.40 with none, repair.head up to 0.18, repair.norm up to 0.09. Tricks that pass the default gate with what
they hide intact read repair.free near 1. Without retrained models repair.odds.recall and repair.head are indicative and make no rule. A class alone can be
asked for repair.free <= 0.3; with 50 records that refuses 9 of 24 retrained models, for the width of the interval.
"""


@check(tasks=("classification", "regression", "causal_lm"), needs=("forget",))
def repair(p: Probe) -> list[Row]:
    """repair.free, repair.weights, repair.odds, repair.head, repair.norm and the parts of the first: what comes back of what must go without training."""
    r = reading(p)
    if r is None:
        return []
    free = [*_mended(p, r), *_lifted(p, r)]
    weights, light = _weights(p, r)
    free += light
    found = [row for row in free if not math.isnan(row.value) and row.name != "repair.free.rank"]  # of an adapter of that rank it is all that was done
    rows = []
    if found:
        best = max(found, key=lambda row: row.value)
        rows = [replace(best, name="repair.free", note=f"best of {len(found)} repairs: {best.name[12:]}; {best.note}")]
    elif free:
        rows = [replace(free[0], name="repair.free")]
    return [*rows, *free, *noticed(p, r, "repair.p"), *weights, *_odds(p, r), *_head(p, r), *_norm(p, r)]


def suppression(rows: Sequence[Row]) -> str:
    """Empty, or what shows that the forgetting is a suppression: a repair that brings back half of it for sure, where without repair half is gone.

    >>> suppression([Row("repair.free.none", 0.0, -0.1, 0.1, 99), Row("repair.free.weights", 0.98, 0.9, 1.0, 99, "1 of 650 weights put back: 0.98 of 1")])
    '1 of 650 weights put back: 0.98 of what was known is back'
    """
    by_name = {row.name: row for row in rows}
    plain = by_name.get("repair.free.none")
    if plain is not None and not plain.value < HALF:
        return ""
    found = [row for row in rows if row.name.startswith("repair.free.") and row.low >= HALF]
    if not found:
        return ""
    best = by_name["repair.free.weights"] if by_name.get("repair.free.weights") in found else max(found, key=lambda row: row.value)
    return f"{best.note.partition(':')[0]}: {min(1.0, best.value):.2f} of what was known is back"


def _once(p: Probe, r: Reading, label: str, model: nn.Module, make: Callable[[], Any]) -> Any:
    return p.once(("repair", label, r.how, id(p.before), p.seed), model, make)


def _mended(p: Probe, r: Reading) -> list[Row]:
    """Repairs that write new numbers into the last layer, or take guards off."""
    outer = mend.last(p.after)
    rows: list[Row | None] = [regained(p, r, "repair.free.none", lambda m: _plain(p, r, m), "no repair")]
    if guards(p.after) or hooks(p.after) > hooks(p.before):
        rows.append(regained(p, r, "repair.free.bare", lambda m: _bare(p, r, m), "guards and hooks off"))
    if outer is None or (r.how == "losses" and p.scores("before", "forget").logits is None):
        return [row for row in rows if row]
    only = _tokens(p) if r.texts else None
    kinds = {"biases": (False, True, "biases of the last layer made equal"), "rows": (True, False, "rows of the last layer made equally long"),
             "even": (True, True, "rows of the last layer made equally long, biases equal")}  # fmt: skip
    for name, (long, flat, said) in kinds.items():
        if not r.texts or name == "rows":
            new = partial(mend.evened, rows=long, biases=flat, only=only)
            rows.append(regained(p, r, f"repair.free.{name}", partial(_once_under, p, r, name, new), said))
    if r.texts:
        said = f"the part of rank {mend.RANK} of each matrix's change taken out"
        rows.append(regained(p, r, "repair.free.rank", partial(_once_under, p, r, "rank", partial(mend.unranked, p.before)), said))
    return [row for row in rows if row]


def _plain(p: Probe, r: Reading, model: nn.Module) -> Scores:
    return _once(p, r, "none", model, lambda: score(model, p.task, r.data))


def hooks(model: nn.Module) -> int:
    """How many hooks stand on a model's forward pass."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def _bare(p: Probe, r: Reading, model: nn.Module) -> Scores:
    """What the weights themselves say: the model without its guards, and without hooks where the original has none."""
    if hooks(p.before):
        with bare(model):
            return score(model, p.task, r.data)
    standing = [(d, dict(d)) for m in model.modules() for d in (m._forward_hooks, m._forward_pre_hooks)]
    try:
        for d, _ in standing:
            d.clear()
        return score(model, p.task, r.data)
    finally:
        for d, kept in standing:
            d.update(kept)


def _once_under(p: Probe, r: Reading, label: str, make: Callable[[nn.Module], mend.New | None], model: nn.Module) -> Scores | None:
    return _once(p, r, label, model, lambda: _under(p, r, model, make(model)))


def _under(p: Probe, r: Reading, model: nn.Module, new: mend.New | None) -> Scores | None:
    if new is None:
        return None
    with mend.written(model, new):
        return score(model, p.task, r.data)


def _tokens(p: Probe) -> Tensor:
    """Tokens that the answers of the forgotten texts hold."""
    return torch.cat([t[m] for t, m in zip(p.split.forget.tokens, p.split.forget.targets, strict=True)]).unique()


def _kept(p: Probe, model: nn.Module) -> Tensor | None:
    """(N, C) logits on kept records: test of the kept classes, or retain."""
    part = "test" if p.split.test is not None else "retain"
    if getattr(p.split, part) is None:
        return None
    s = p.seen(model, part)
    return s.logits[~torch.isin(s.labels, torch.tensor(p.removed()))]


def odds(logits: Tensor, classes: Sequence[int]) -> Tensor:
    """(N,) log of the probability of these classes over that of all others, of logits (N, C): z_c - log sum_{j != c} exp z_j for one class.

    >>> odds(torch.tensor([[0.5, 0.3, 0.2]]).log(), [0])
    tensor([0.])
    """
    inside = torch.zeros(logits.shape[1], dtype=torch.bool).index_fill_(0, torch.tensor(classes), True)
    return logits[:, inside].logsumexp(1) - logits[:, ~inside].logsumexp(1)


def _lifted(p: Probe, r: Reading) -> list[Row]:
    """Repairs of the logits: no weight of the model is touched."""
    if r.texts or p.scores("before", "forget").logits is None:
        return []

    def calibrated(model: nn.Module) -> Scores | None:
        kept, s = _kept(p, model), _plain(p, r, model)
        return None if kept is None or not len(kept) else _scored(s, s.logits - kept.mean(0))

    rows = [regained(p, r, "repair.free.calibrated", calibrated, "each logit's mean on kept records taken off")]
    outer = mend.last(p.before)
    if outer is not None and p.split.retain is not None:
        said = "the original's last layer on units matched one to one on kept records"
        rows.append(regained(p, r, "repair.free.aligned", partial(_aligned, p, r, outer[1]), said))
    return [row for row in rows if row]


def _aligned(p: Probe, r: Reading, outer: Any, model: nn.Module) -> Scores | None:
    """Answers of the original's last layer on the model's own inputs to it, unit j taken for the original's unit that goes with it and rescaled to it; the
    model's own where its units are others than the original's."""

    def make() -> Scores | None:
        kept, s = some(p.split.retain, KEPT), _plain(p, r, model)
        own = features(model, p.task, kept).cpu().float()
        theirs = _once(p, r, "kept features", p.before, lambda: features(p.before, p.task, kept).cpu().float())
        if own.shape != theirs.shape or own.shape[1] > WIDE:
            return None
        unit, scale, match = mend.paired_units(own, theirs)
        if match < ALIKE:
            return s
        w = outer.weight.detach().cpu().float()[:, unit] * scale
        return _scored(s, features(model, p.task, r.data).cpu().float() @ w.T + (0 if outer.bias is None else outer.bias.detach().cpu().float()))

    return _once(p, r, "aligned", model, make)


def _scored(s: Scores, logits: Tensor) -> Scores:
    return replace(s, logits=logits, nll=F.cross_entropy(logits, s.labels, reduction="none"))


def _weights(p: Probe, r: Reading) -> tuple[list[Row], list[Row]]:
    """(repair.weights and its count, repair.free.weights, .row and .head)."""
    rows = p.removed() if r.how == "class" else _tokens(p).tolist() if r.texts else []
    gone = r.data.take(range(r.n))

    def put(model: nn.Module, label: str) -> tuple[Scores, int] | None:
        both, (mine, _) = _once(p, r, "changed", model, lambda: mend.changed(p.before, model)), all_sets(model)
        one = next((s for s in mine if s.label == label), None)
        if one is None:
            return None if mine else (_plain(p, r, model), 0)
        return _once(p, r, label, model, lambda: (_under(p, r, model, one.back(both)), one.count))

    def all_sets(model: nn.Module) -> tuple[list[mend.Set_], int]:
        return _once(p, r, "sets", model, lambda: mend.sets(p.before, model, p.task, gone, rows))

    def tried(one: mend.Set_) -> Row | None:
        said = {"row": "rows of what was removed put back", "head": "the last layer put back"}.get(one.label, "")
        what = f"{one.count:,} of {total:,} weights put back ({one.label}){f', {said}' if said else ''}"
        fair = one.label in ("row", "head") or (one.label.startswith("size") and one.count <= most)
        return regained(p, r, "repair.free.weights", lambda m: None if (got := put(m, one.label)) is None else got[0], what, fair)

    mine, total = all_sets(p.after)
    most, found = max(1, round(FREE * total)), []
    plain = regained(p, r, "repair.free.weights", lambda m: _plain(p, r, m), f"0 of {total:,} weights put back")
    if plain is None or math.isnan(plain.value):
        return [Row(n, math.nan, -math.inf, math.inf, r.n, plain.note if plain else "") for n in ("repair.weights", "repair.weights.count")], []
    marks: dict[str, tuple[int, Row]] = {}
    free = {"weights": plain}
    for count, label, one in [(0, "none", None), *((s.count, s.label, s) for s in mine)]:
        light = label in ("row", "head") or 0 < count <= most
        if not light and len(marks) == 3:
            continue
        row = plain if one is None else tried(one)
        if row is None:
            continue
        for key, value in (("low", row.high), ("value", row.value), ("high", row.low)):
            if value >= HALF:
                marks.setdefault(key, (count, row))
        kind = label if label in ("row", "head") else "weights"
        if light and (kind not in free or row.value > free[kind].value + (0.02 if kind == "weights" else 0.0)):
            free[kind] = replace(row, name=f"repair.free.{kind}")
        found.append(row)
    changes = sum(s.count for s in mine[-1:])
    at = {k: marks[k][0] if k in marks else changes for k in ("low", "value", "high")}
    note = f"{marks['value'][1].note if 'value' in marks else found[-1].note}; {changes:,} of {total:,} weights differ from the original"
    return [
        Row("repair.weights", at["value"] / total, at["low"] / total, at["high"] / total, r.n, note),
        Row("repair.weights.count", at["value"], at["low"], at["high"], r.n, note),
    ], list(free.values())


def _odds(p: Probe, r: Reading) -> list[Row]:
    """repair.odds of a removed class."""
    if r.how != "class":
        return []

    def read(model: nn.Module) -> tuple[Tensor, Tensor] | None:
        kept = _kept(p, model)
        return None if kept is None or not len(kept) else (odds(_plain(p, r, model).logits[: r.n], p.removed()), odds(kept, p.removed()))

    mine = read(p.after)
    if mine is None:
        return []
    own, rest, rows = auc(*mine), [pair for pair in map(read, p.references) if pair is not None], []
    for name, share, what in (("repair.odds", _wins, "AUC of the removed class's log-odds"), ("repair.odds.recall", _recall, f"recall at {SPILL:.0%} of kept")):
        got, others = share(*mine), [share(*pair) for pair in rest]
        value = float(got.mean())
        if others:
            rows.append(above(name, got, others, f"{what} {value:.3g}; {float(torch.stack(others).mean()):.3g} of {len(others)} retrained models"))
        else:
            base = 0.5 if share is _wins else 0.0
            low, high = (own[1], own[2]) if share is _wins else wilson(round(value * r.n), r.n)[1:]
            note = f"{what} {value:.3g} above {base:g}; what a model that never saw the class reads is not known without a retrained one"
            rows.append(Row(name, value - base, low - base, high - base, r.n, note, indicative=True))
    return rows


def _recall(high: Tensor, low: Tensor) -> Tensor:
    """(N,) 1 for each of `high` above all but a share SPILL of `low` (M,)."""
    return (high > low.quantile(1 - SPILL)).double()


def _wins(high: Tensor, low: Tensor) -> Tensor:
    """(N,) share of `low` (M,) below each of `high` (N,), equal ones half: its mean is the AUC."""
    low = low.sort().values
    below, at_most = (torch.searchsorted(low, high, right=side) for side in (False, True))
    return (below + at_most).double() / (2 * len(low))


def ridge(x: Tensor, y: Tensor, classes: int, strength: float = 1e-2) -> Tensor:
    """(D + 1, C) W = argmin sum_i v_i ||(x_i, 1) W - e_{y_i}||^2 + strength ||W||^2, v_i such that each class weighs as much as any other, 1 in all.

    >>> ridge(torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 1]), 2, 0.0).round(decimals=2).tolist()
    [[0.5, -0.5], [0.5, 0.5]]
    """
    x = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    counts = y.bincount(minlength=classes)
    v = (1.0 / (counts[y] * int((counts > 0).sum()))).double()[:, None]
    weighed = (v * x).T
    return torch.linalg.solve(weighed @ x + strength * torch.eye(x.shape[1], dtype=torch.double), weighed @ F.one_hot(y, classes).double()).float()


def _head(p: Probe, r: Reading) -> list[Row]:
    """repair.head: a new last layer, fitted on kept records and a few forgotten ones, read on those (and unseen ones of the class) that were not shown."""
    kept = p.split.retain if p.split.retain is not None else p.split.test
    shown = min(SHOTS[-1], r.n // 2, len(p.split.forget) // 2)
    if kept is None or shown < 1 or mend.last(p.after) is None or (r.how == "losses" and p.scores("before", "forget").logits is None):
        return []
    kept = some(kept, KEPT)
    first = torch.randperm(min(r.n, len(p.split.forget)), generator=torch.Generator().manual_seed(p.seed))[:shown]
    hidden = torch.ones(r.n, dtype=torch.bool).index_fill_(0, first, False)
    shots = [n for n in SHOTS if n <= shown]
    fit = _taught if r.texts else _fitted

    def read(model: nn.Module) -> Tensor | None:
        return _once(p, r, "shots", model, lambda: fit(p, r, model, kept, first, shots, hidden))

    try:
        mine = read(p.after)
        others = [*p.references[:3]] or [p.once(("fresh", p.seed), p.before, lambda: fresh(p.before, p.seed))]
    except ModelError:
        return []
    if mine is None:
        return []
    rest = [t for t in map(read, others) if t is not None]
    other = f"{len(rest)} retrained models" if p.references else "an untrained model, in the place of retrained ones"
    note = (
        f"shown {', '.join(map(str, shots))} forgotten records: {float(mine.mean()):.3g} of the others known; {float(torch.stack(rest).mean()):.3g} by {other}"
    )
    return [replace(above("repair.head", mine, rest, note), indicative=not p.references)]


def _fitted(p: Probe, r: Reading, model: nn.Module, kept: Any, first: Tensor, shots: Sequence[int], hidden: Tensor) -> Tensor:
    """(m,) what a ridge on the inputs of the last layer knows of each hidden record, mean over shots and draws."""
    x, own = (narrow(features(model, p.task, part).cpu().float(), p.seed) for part in (kept, r.data))
    centre, scale = x.mean(0), x.std(0).clamp(min=1e-6)
    x, own = (x - centre) / scale, (own - centre) / scale
    classes = _plain(p, r, model).logits.shape[1]
    g, out = torch.Generator().manual_seed(p.seed), []
    for n in shots:
        for _ in range(DRAWS):
            rows = first[torch.randperm(len(first), generator=g)[:n]]
            w = ridge(torch.cat([x, own[rows]]), torch.cat([kept.y, r.data.y[rows]]), classes)
            z = own @ w[:-1] + w[-1]
            out.append(r.known(Scores(-z.gather(1, r.data.y[:, None]).squeeze(1), z, r.data.y, None, None))[hidden])
    return torch.stack(out).mean(0)


def _taught(p: Probe, r: Reading, model: nn.Module, kept: Any, first: Tensor, shots: Sequence[int], hidden: Tensor) -> Tensor | None:
    """(m,) probability per answer token of each hidden text after STEPS steps of Adam on the output matrix alone, mean over shots."""
    outer: Any = mend.last(model)[1]  # pyright: ignore[reportOptionalSubscript]
    if outer.weight.numel() > WIDEST:
        return None
    (h, y, who), (hk, yk, _) = _states(p, model, outer, r.data.take(range(r.n))), _states(p, model, outer, some(kept, 32))
    h, y, hk, yk = (t.to(outer.weight.device) for t in (h, y, hk, yk))
    found = []
    for n in shots:
        w = outer.weight.detach().float().clone().requires_grad_(True)
        mine = torch.isin(who, first[:n])
        stepper = torch.optim.Adam([w], lr=0.1 * float(w.detach().std()))
        for _ in range(STEPS):
            stepper.zero_grad()
            with torch.enable_grad():
                (F.cross_entropy(h[mine] @ w.T, y[mine]) + F.cross_entropy(hk @ w.T, yk)).backward()
            stepper.step()
        with torch.no_grad():
            losses = F.cross_entropy(h @ w.T, y, reduction="none").cpu()
        total = torch.zeros(r.n).index_add_(0, who, losses) / torch.zeros(r.n).index_add_(0, who, torch.ones_like(losses))
        found.append((-total).exp()[hidden].double())
    return torch.stack(found).mean(0)


def _states(p: Probe, model: nn.Module, outer: nn.Module, data: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs (M, D) of the output layer at target tokens, the tokens (M,) and the text (M,) each stands in."""
    caught, found = [], []
    handle = outer.register_forward_pre_hook(lambda _, args: caught.append(args[0].detach()))
    try:
        with guard.quiet(model):
            batches = p.task.batches(data, getattr(data, "at_once", 16))
            for k in range(len(batches)):
                caught.clear()
                out = p.task.forward(model, batches[k])
                keep = out.labels != IGNORE
                states = caught[-1][:, -out.logits.shape[1] - 1 : -1]
                found.append((states[keep].float().cpu(), out.labels[keep].cpu(), batches[k]["i"][:, None].expand(keep.shape)[keep.cpu()]))
    finally:
        handle.remove()
    return tuple(torch.cat(column) for column in zip(*found, strict=True))  # pyright: ignore[reportReturnType]


def _norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, NORMS) or type(m).__name__.endswith("Norm")]


def _norm(p: Probe, r: Reading) -> list[Row]:
    """repair.norm: running statistics computed anew, gains and shifts taught for STEPS steps, both on kept records."""
    kept = p.split.retain
    if kept is None or not _norms(p.after):
        return []
    kept = some(kept, KEPT)

    def read(model: nn.Module) -> Tensor:
        def make() -> Scores:
            twin = copy.deepcopy(model).requires_grad_(False)
            if any(isinstance(m, NORMS) and m.running_mean is not None for m in twin.modules()):
                batches = p.task.batches(kept, 100)
                recompute(twin, [batches[k] for k in range(len(batches))])
            gains = [q.requires_grad_(True) for m in _norms(twin) for q in m.parameters(recurse=False)]
            if gains:
                s = scratch(twin)
                s.params = {n: q for n, q in s.params.items() if q.requires_grad}
                s.masks = dict.fromkeys(s.params)
                s.eval()
                with guard.watching(guard.Guard()):
                    steps = p.task.batches(kept, 32, epochs=STEPS / -(-len(kept) // 32), seed=p.seed)
                    descend(s, lambda b: p.task.forward(twin, b).mean.mean(), steps, **pace(p.task, twin))
            return score(twin, p.task, r.data)

        return r.known(_once(p, r, "norm", model, make))

    mine, rest = read(p.after), [read(m) for m in p.references[:3]]
    note = f"normalisation learnt anew on {len(kept)} kept records: {float(mine.mean()):.3g} known"
    other = f"{len(rest)} retrained models" if rest else r.why
    rest = rest or [torch.full_like(mine, r.absent(_plain(p, r, p.after)))]
    return [above("repair.norm", mine, rest, f"{note}; {float(torch.stack(rest).mean()):.3g} by {other}")]
