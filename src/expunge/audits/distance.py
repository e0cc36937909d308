"""Distance to retrained models: KLOM, KL, JS, the gap closed, and the summary scores of the literature.

KLOM (Georgiev et al., "Attribute-to-Delete", 2024) is the mean over examples of the KL divergence between the margins of unlearned and of
retrained models. With one candidate and K retrained models this uses the Gaussian form with equal variances, see `klom_distance`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from expunge.audits.core import Probe, Row
from expunge.audits.known import few
from expunge.audits.membership.losses import svc, svc_features
from expunge.audits.unseen import read, same_form
from expunge.audits.utility import jensen_shannon
from expunge.core.registry import check
from expunge.core.stats import Z, bootstrap, bootstrap_mean

CLIP = 50.0
PARTS = ("forget", "retain", "test")


def klom_distance(margin: Tensor, references: Tensor) -> Tensor:
    """(N,) min(CLIP, K / (K + 1) * (m - mean_k m_k)^2 / (2 s^2)) for margins m (N,) and m_k (K, N), K >= 2.

    s^2 is the per-example variance over references, shrunk half way to its mean over examples; K / (K + 1) pays for the estimated mean, so
    that a further retrained model reads 1/2 on average when the variance is known.

    >>> klom_distance(torch.tensor([3.0]), torch.tensor([[0.0], [2.0]]))
    tensor([0.6667])
    """
    k = len(references)
    variance = references.var(0)
    variance = ((variance + variance.mean()) / 2).clamp(min=1e-12)
    return ((margin - references.mean(0)) ** 2 / (2 * variance) * k / (k + 1)).clamp(max=CLIP)


def klom_binned(margins: Tensor, references: Tensor, bins: int = 20, eps: float = 1e-5) -> Tensor:
    """(N,) KLOM as published, for populations: of each example sum_b p_b ln(p_b / max(q_b, eps)), p_b and q_b the shares of the margins (M, N) of M unlearned
    models and (K, N) of K retrained ones in `bins` equal bins from the smallest of all to the largest, margins clipped to -100..100.

    Georgiev et al. 2024 (arXiv:2410.23232). Differs: the last bin holds its right edge, where counting below every edge loses the largest margin. With as many
    models as bins or fewer, two populations of the same models read well above 0: hold it to what one half of the retrained models reads beside the other.

    >>> klom_binned(torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [1.0]])), klom_binned(torch.tensor([[1.0]]), torch.tensor([[0.0], [1.0]])).exp()
    (tensor([0.]), tensor([2.]))
    """
    p, q = (m.double().clamp(-100, 100) for m in (margins, references))
    low, high = torch.cat([p, q]).aminmax(dim=0)
    width = torch.where(high > low, high - low, 1.0) / bins

    def shares(m: Tensor) -> Tensor:
        which = ((m - low) / width).long().clamp(max=bins - 1)
        return torch.nn.functional.one_hot(which, bins).double().mean(0)

    p, q = shares(p), shares(q)
    return torch.where(p > 0, p * (p.clamp(min=eps) / q.clamp(min=eps)).log(), 0.0).sum(1).float()


def klom_floor(references: Tensor) -> Tensor:
    """(N,) the same distance of each retrained model (K, N) to the others, averaged over them; K >= 3."""
    k = len(references)
    return torch.stack([klom_distance(references[i], references[[j for j in range(k) if j != i]]) for i in range(k)]).mean(0)


@check(tasks=("classification", "regression", "causal_lm"), needs=("forget",), reference=True)
def klom(p: Probe) -> list[Row]:
    """klom.<part>, klom_before.<part>, klom_floor.<part>, klom_ratio.<part> (candidate / floor), and gap_closed.klom on forget.

    gap closed = (d(before) - d(after)) / (d(before) - floor): 0 for doing nothing, 1 for a retrained model. It is nan where doing nothing is
    within 1.5 times the larger of the floor and its own distance on retain: such a model does not memorise, and nothing can be ranked on it.
    With two references the floor is what a third model would read if margins were Gaussian with the shrunk variance; three or more are
    advised.
    """
    if len(p.references) < 2:
        return []
    rows, kept = [], 0.0
    if "retain" in p.split.parts():
        refs = torch.stack([p.scores(f"reference{k}", "retain").margin for k in range(len(p.references))])
        kept = float(klom_distance(p.scores("before", "retain").margin, refs).mean())
    for part in (name for name in PARTS if name in p.split.parts()):
        refs = torch.stack([p.scores(f"reference{k}", part).margin for k in range(len(p.references))])
        after, before = (klom_distance(p.scores(w, part).margin, refs) for w in ("after", "before"))
        others = torch.stack([p.seen(model, part).margin for model in p.spread]) if p.spread else refs
        floor = klom_floor(others) if len(others) >= 3 else _two_floor(refs)
        n, note = len(after), f"{len(refs)} retrained models"
        for name, values in (("klom", after), ("klom_before", before), ("klom_floor", floor)):
            rows.append(Row(f"{name}.{part}", float(values.mean()), *_boot(values, p.seed), n, note))
        ratio = lambda r, a=after, f=floor: float(a[r].mean() / f[r].mean().clamp(min=1e-12))  # noqa: E731
        rows.append(Row(f"klom_ratio.{part}", ratio(torch.arange(n)), *bootstrap(ratio, n, p.seed), n, note))
        if part == "forget":
            rows.append(gap_closed("gap_closed.klom", before, after, floor, kept, p.seed, note))
    return rows


def _two_floor(refs: Tensor) -> Tensor:
    """(N,) what klom_distance of a third model would read if margins were Gaussian with the shrunk variance: its mean over examples."""
    variance = refs.var(0)
    shrunk = (variance + variance.mean()) / 2
    return (variance / (2 * shrunk.clamp(min=1e-12))).clamp(max=CLIP)


def gap_closed(name: str, before: Tensor, after: Tensor, floor: Tensor, kept: float, seed: int, note: str) -> Row:
    """(d(before) - d(after)) / (d(before) - floor) of the means over examples, with a bootstrap over examples.

    kept   d(before) on retain: what any two trainings differ by on records that both saw. nan where d(before) is within 1.5 max(floor, kept)
    """
    n, near = len(before), float(floor.mean())
    if float(before.mean()) <= 1.5 * max(near, kept):
        far = f"doing nothing ({float(before.mean()):.3g}) is within 1.5 times the floor ({near:.3g}) or its distance on retain ({kept:.3g})"
        far += ": this model does not memorise"
        return Row(name, math.nan, -math.inf, math.inf, n, far)

    def gap(r: Tensor) -> float:
        return float((before[r].mean() - after[r].mean()) / (before[r].mean() - floor[r].mean()).clamp(min=1e-12))

    return Row(name, gap(torch.arange(n)), *bootstrap(gap, n, seed), n, note)


def _boot(values: Tensor, seed: int) -> tuple[float, float]:
    return bootstrap_mean(values, seed)


def kl_divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """(N,) KL(softmax(teacher) || softmax(student)) of logits (N, C), in nats."""
    return (teacher.softmax(-1) * (teacher.log_softmax(-1) - student.log_softmax(-1))).sum(-1)


def closed(name: str, after: Tensor, before: Tensor, references: Tensor, seed: int, note: str, unseen: Tensor | None = None, small: bool = False) -> Row:
    """Share of the way from the original to K references, of margins (N,), (N,) and (K, N), with a bootstrap over records:

        1 - (D(after) - F) / (D(before) - F),   D(m) = mean over records of (m - mean_k m_k)^2

    F is what one more retrained model would be away from the mean: mean over records of var_k m_k (K + 1) / K; for one reference, or few records (`small`), the
    mean of `unseen` (M,), the same squares of unseen records with the original in the place of one more retrained model, as it never saw them either; 0 for one
    reference without these. Few records have the interval Z std(unseen) / sqrt(N) / (D(before) - F).

    >>> closed("closed", torch.ones(9), torch.full((9,), 2.0), torch.zeros(1, 9), 0, "").value
    0.75
    >>> closed("closed", torch.ones(9), torch.full((9,), 2.0), torch.zeros(1, 9), 0, "", unseen=torch.ones(5)).value
    1.0
    """
    k, n = references.shape
    centre, by = references.mean(0), unseen is not None and (k == 1 or small)
    floor = torch.zeros_like(after) if k == 1 else references.var(0) * (k + 1) / k
    floor = torch.full_like(after, float(unseen.mean())) if by else floor  # pyright: ignore[reportOptionalMemberAccess]
    mine, whole = (after - centre).square(), (before - centre).square()

    def share(r: Tensor) -> float:
        return float(1 - (mine[r].mean() - floor[r].mean()) / (whole[r].mean() - floor[r].mean()).clamp(min=1e-12))

    note += f"; {k} retrained models" + (f", floor by {len(unseen)} unseen records" if by else "")  # pyright: ignore[reportArgumentType]
    if float(whole.mean()) <= 1.5 * float(floor.mean()):
        return Row(name, math.nan, -math.inf, math.inf, n, f"{note}: the original is within 1.5 floors of retrained models, nothing to close")
    value = share(torch.arange(n))
    if not small or unseen is None:
        return Row(name, value, *bootstrap(share, n, seed), n, note)
    half = Z * float(unseen.std()) / n**0.5 / float(whole.mean() - floor.mean())
    return Row(name, value, value - half, value + half, n, note)


def apart(p: Probe, read: Callable[[nn.Module], Tensor]) -> Tensor | None:
    """(M,) what `closed` reads of unseen records of the same form (`audits.unseen`), `read` giving their margins; None where there are fewer than two."""
    u = same_form(p)
    if u is None or len(u.data) < 2:
        return None
    return (read(p.before) - torch.stack([read(m) for m in p.references]).mean(0)).square()


@check(tasks=("classification", "regression", "causal_lm"), needs=("forget",), reference=True)
def nearness(p: Probe) -> list[Row]:
    """gap_closed.margin: `closed` of the margins on forget. It needs one reference; KLOM, which scales each record by its own spread, needs three."""
    references = torch.stack([p.scores(f"reference{k}", "forget").margin for k in range(len(p.references))])
    after, before = (p.scores(which, "forget").margin for which in ("after", "before"))
    u, small = same_form(p), few(p.split)
    floor = None
    if u is not None and (small or len(references) == 1):
        floor = apart(p, lambda m: read(p, u, m).margin)
    return [closed("gap_closed.margin", after, before, references, p.seed, "margins on forget", floor, small)]


@check(tasks=("classification",), needs=("forget",), reference=True)
def divergence(p: Probe) -> list[Row]:
    """kl.<part> and js.<part>: mean over references of KL(retrained || candidate) and JS; kl_floor, js_floor: between references; gap_closed.kl."""
    rows, kept = [], 0.0
    k = len(p.references)
    if "retain" in p.split.parts():
        before = p.scores("before", "retain").logits
        kept = sum(float(kl_divergence(p.scores(f"reference{j}", "retain").logits, before).mean()) for j in range(k)) / k
    for part in (name for name in PARTS if name in p.split.parts()):
        refs = [p.scores(f"reference{j}", part).logits for j in range(k)]
        pairs = [(a, b) for i, a in enumerate(refs) for j, b in enumerate(refs) if i != j]
        for name, f in (("kl", kl_divergence), ("js", lambda a, b: jensen_shannon(a.softmax(-1), b.softmax(-1)))):
            after, before = (torch.stack([f(r, p.scores(w, part).logits) for r in refs]).mean(0) for w in ("after", "before"))
            rows.append(Row(f"{name}.{part}", float(after.mean()), *_boot(after, p.seed), len(after), f"{k} retrained models"))
            if not pairs and (name, part) == ("kl", "forget"):
                rows.append(
                    gap_closed("gap_closed.kl", before, after, torch.zeros_like(after), kept, p.seed, "one retrained model: no floor, so 1 is out of reach")
                )
            if pairs:
                floor = torch.stack([f(a, b) for a, b in pairs]).mean(0)
                rows.append(
                    Row(f"{name}_floor.{part}", float(floor.mean()), *_boot(floor, p.seed), len(floor), f"{len(pairs)} ordered pairs of retrained models")
                )
                if (name, part) == ("kl", "forget"):
                    rows.append(gap_closed("gap_closed.kl", before, after, floor, kept, p.seed, f"{k} retrained models"))
    return rows


def tow(gaps: tuple[float, float, float]) -> float:
    """Tug of war: product of 1 - |accuracy gap| over forget, retain, test; gaps in points. Card audits-classification.

    >>> round(tow((2, 1, 3)), 5)
    0.94109
    """
    return math.prod(1 - abs(g) / 100 for g in gaps)


def aus(original: float, after: float, forget: float, *, removed: bool) -> float:
    """Adaptive unlearning score (1 - (A_or - A_t)) / (1 + Delta), Delta = A_f for removed classes, |A_f - A_t| for records. Card duck.

    >>> round(aus(0.90, 0.88, 0.05, removed=True), 4), round(aus(0.90, 0.88, 0.90, removed=False), 4)
    (0.9333, 0.9608)
    """
    return (1 - (original - after)) / (1 + (forget if removed else abs(forget - after)))


@check(tasks=("classification",), needs=("forget", "retain", "test"), reference=True)
def literature(p: Probe) -> list[Row]:
    """average_gap (points; UA, RA, TA and the published confidence SVC), tow, aus: printed for comparison with papers, not trusted."""
    removed = torch.tensor(p.removed(), dtype=torch.long)

    def accuracies(which: str) -> list[float]:
        test = p.scores(which, "test")
        keep = ~torch.isin(test.labels, removed)
        return [float(p.scores(which, part).correct.float().mean()) for part in ("forget", "retain")] + [float(test.correct[keep].float().mean())]

    def confidence(which: str) -> float:
        forget, retain, test = (svc_features(p.scores(which, part), published=True)["confidence"] for part in ("forget", "retain", "test"))
        n = min(len(retain), len(test), 1000)
        return float(svc(retain[:n], test[:n], forget).float().mean())

    names = [f"reference{k}" for k in range(len(p.references))]
    mine, original = accuracies("after"), accuracies("before")
    rest = [sum(v) / len(names) for v in zip(*map(accuracies, names), strict=True)]
    gaps = [100 * (a - b) for a, b in zip(mine, rest, strict=True)]
    called = [p.once(("confidence",), p.model(which), lambda which=which: confidence(which)) for which in ("after", *names)]
    attack = 100 * (called[0] - sum(called[1:]) / len(names))
    average = (sum(map(abs, gaps)) + abs(attack)) / 4
    values = {"average_gap": average, "tow": tow((gaps[0], gaps[1], gaps[2])), "aus": aus(original[2], mine[2], mine[0], removed=bool(len(removed)))}
    spread = {"average_gap": (0.0, 100.0), "tow": (0.0, 1.0), "aus": (0.0, 2.0)}
    note = "for comparison with papers; no interval is known, so the bounds are those of the scale"
    return [Row(name, value, *spread[name], len(p.split.forget), note, indicative=True) for name, value in values.items()]
