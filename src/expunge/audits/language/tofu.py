"""TOFU: forget quality and model utility, from per-row losses and texts. Source: card tofu (Maini et al., arXiv 2401.06121).

    log R   l_para - mean_j l_pert_j (geometric, as in the released leaderboards), or l_para + log mean_j exp(-l_pert_j) (arithmetic, as in the paper)
    forget quality   p of the two-sample Kolmogorov-Smirnov test between the log R of the unlearned and of a gold model on the forget rows
    model utility    harmonic mean of probability, ROUGE-L recall and truth ratio on retain, real authors and world facts

l is the mean token loss of an answer, end token counted. A log of one set of rows holds lists by row: `avg_gt_loss`, `rougeL_recall` and, where the rows
have other answers, `avg_paraphrased_loss` and `average_perturb_loss` (K each): the fields of the published evaluation logs.

A tiny p says neither which way nor how far, and depends on n: an untouched model and a destroyed one reach the same floor. So D, D over the critical
value, the shift and the floor stand beside it. A model that is equally bad at true and false answers looks ideal: read it with the utility.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from expunge.audits.core import Probe, Row
from expunge.audits.drop import paired
from expunge.audits.language.text import share
from expunge.audits.language.tokens import answers_nll, part, said, seen
from expunge.core.errors import SettingError
from expunge.core.registry import check
from expunge.core.stats import bootstrap
from expunge.modalities.language.records.measures import rouge
from expunge.modalities.language.texts import GENERAL

FORMS = ("geometric", "arithmetic")
UTILITY = ("retain", *GENERAL)
"""The sets whose nine numbers make model utility."""

PARTS = ("probability", "rougeL_recall", "truth_ratio")
ROWS = {"probability": "probability", "rougeL_recall": "rouge", "truth_ratio": "truth_ratio"}

Log = Mapping[str, Sequence]


def probability(loss: Tensor) -> Tensor:
    """(N,) P = exp(-l) of mean token losses."""
    return (-loss).exp()


def normalised(true: Tensor, false: Tensor) -> Tensor:
    """(N,) P / (P + sum_j P_j) of losses (N,) and (N, K), in log space.

    >>> round(float(normalised(torch.tensor([0.5]), torch.tensor([[1.0, 1.5, 2.0]]))), 6)
    0.455054
    """
    return torch.cat([-true[:, None], -false], 1).softmax(1)[:, 0]


def log_ratio(paraphrased: Tensor, perturbed: Tensor, form: str = "geometric") -> Tensor:
    """(N,) log R of losses (N,) and (N, K). It never saturates where a probability underflows, and the KS test is unchanged by the logarithm.

    >>> l, wrong = torch.tensor([1.0]), torch.tensor([[1.2, 1.5, 2.0, 2.3, 3.0]])
    >>> [round(float(log_ratio(l, wrong, form).exp()), 6) for form in FORMS]
    [0.367879, 0.440202]
    """
    if form not in FORMS:
        raise SettingError(f"form must be one of {', '.join(FORMS)}, not '{form}'")
    if form == "geometric":
        return paraphrased - perturbed.mean(1)
    return paraphrased + (-perturbed).logsumexp(1) - math.log(perturbed.shape[1])


def truth_ratio(log_r: Tensor, *, forget: bool) -> Tensor:
    """(N,) the reported score: min(R, 1 / R) on forget rows, max(0, 1 - R) on the others.

    >>> truth_ratio(torch.tensor([0.5]).log(), forget=False), truth_ratio(torch.tensor([2.0]).log(), forget=True)
    (tensor([0.5000]), tensor([0.5000]))
    """
    return (-log_r.abs()).exp() if forget else (1 - log_r.exp()).clamp(min=0)


def scores(log: Log, name: str, form: str = "geometric") -> dict[str, Tensor]:
    """Per-row probability, ROUGE-L recall and truth ratio (N,) of one set's log; those whose fields it lacks are left out.

    Probability is normalised over the wrong answers on real_authors and world_facts.
    """
    loss = torch.as_tensor(log["avg_gt_loss"], dtype=torch.double)
    wrong = torch.as_tensor(log["average_perturb_loss"], dtype=torch.double) if "average_perturb_loss" in log else None
    out = {}
    if name not in GENERAL:
        out["probability"] = probability(loss)
    elif wrong is not None:
        out["probability"] = normalised(loss, wrong)
    if "rougeL_recall" in log:
        out["rougeL_recall"] = torch.as_tensor(log["rougeL_recall"], dtype=torch.double)
    if wrong is not None:
        out["truth_ratio"] = truth_ratio(ratios(log, form), forget=name == "forget")
    return out


def ratios(log: Log, form: str = "geometric") -> Tensor:
    """(N,) log R of one set's log; the answer stands in where there is no paraphrase."""
    right = torch.as_tensor(log.get("avg_paraphrased_loss", log["avg_gt_loss"]), dtype=torch.double)
    return log_ratio(right, torch.as_tensor(log["average_perturb_loss"], dtype=torch.double), form)


def harmonic(values: Sequence[float]) -> float:
    """Harmonic mean; 0 as soon as one value is.

    >>> round(harmonic([0.99, 0.986, 0.475, 0.4555, 0.933, 0.596, 0.4186, 0.8825, 0.539]), 6), round(harmonic([0.9] * 8 + [0.01]), 3)
    (0.622753, 0.083)
    """
    return 0.0 if not values or min(values) <= 0 else len(values) / sum(1 / v for v in values)


def summary(logs: Mapping[str, Log], form: str = "geometric") -> dict[str, Any]:
    """{"model_utility", "parts": {set: {probability, rougeL_recall, truth_ratio}}} of a model's logs by set."""
    parts = {name: {k: float(v.mean()) for k, v in scores(log, name, form).items()} for name, log in logs.items()}
    return {"model_utility": harmonic([v for name in UTILITY if name in parts for v in parts[name].values()]), "parts": parts}


@dataclass(frozen=True)
class Quality:
    """Forget quality of one model against one gold model.

    p          two-sided, exact        d          the KS statistic            shift   median of mine minus median of gold's: which way
    floor      p of full separation for that many rows                       critical   the largest D whose p is still 5 % or more
    """

    p: float
    d: float
    shift: float
    floor: float
    critical: float


def ks_exact(n: int, k: int) -> float:
    """P(D >= k / n) of two samples of n without ties: 2 sum_{j >= 1} (-1)^(j-1) C(2n, n - jk) / C(2n, n).

    >>> round(ks_exact(4, 2), 6), f"{ks_exact(40, 40):.2e}"
    (0.771429, '1.86e-23')
    """
    if k <= 0:
        return 1.0
    top = 2 * sum((-1) ** (j - 1) * math.comb(2 * n, n - j * k) for j in range(1, n // k + 1))
    return min(1.0, top / math.comb(2 * n, n))


def critical(n: int) -> float:
    """The largest D = k / n whose p is at least 5 %, so that D / critical <= 1 means "not told apart".

    >>> critical(40), critical(400)
    (0.3, 0.095)
    """
    low, high = 0, n
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if ks_exact(n, middle) >= 0.05 else (low, middle - 1)
    return low / n


def forget_quality(mine: Tensor, gold: Tensor) -> Quality:
    """KS test between two models' log R (or losses) (N,) on the same rows.

    >>> q = forget_quality(torch.tensor([0.1, 0.4, 0.5, 0.9]), torch.tensor([0.2, 0.6, 0.7, 0.8]))
    >>> q.d, round(q.p, 6)
    (0.5, 0.771429)
    """
    from scipy.stats import ks_2samp

    if len(mine) != len(gold) or not len(mine):
        raise SettingError(f"forget quality compares two models on the same rows; found {len(mine)} and {len(gold)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # for a p next to 1, scipy's exact sum gives way to the asymptotic one
        found = ks_2samp(mine.double().numpy(), gold.double().numpy())
    n = len(mine)
    return Quality(float(found.pvalue), float(found.statistic), float(mine.median() - gold.median()), ks_exact(n, n), critical(n))


def log_of(p: Probe, model: nn.Module, name: str, *, texts: bool = True) -> Log:
    """The log of a model on one set of the audit, computed once; ROUGE (which needs answers generated) only with `texts`."""
    data = part(p, name)
    out: dict[str, Any] = {"avg_gt_loss": seen(p, model, name).nll}
    wrong = [list(row.get("perturbed_answer") or ()) for row in data.rows]
    if K := min(map(len, wrong)):
        right = [row.get("paraphrased_answer") or row["answer"] for row in data.rows]

        def make() -> Tensor:
            return answers_nll(model, p.task, data, [[r, *w[:K]] for r, w in zip(right, wrong, strict=True)])

        losses = p.once(("tofu", name, p.seed), model, make)
        out |= {"avg_paraphrased_loss": losses[:, 0], "average_perturb_loss": losses[:, 1:]}
    if texts:
        out["rougeL_recall"] = rouge([row.get("answer", row.get("text", "")) for row in data.rows], said(p, model, name))[0]
    return out


@check(tasks=("causal_lm",), needs=("forget",))
def tofu(p: Probe) -> list[Row]:
    """Model utility and its parts: tofu.model_utility, tofu.<set>.probability, .rouge, .truth_ratio for forget, retain, real_authors and world_facts.

    With a retrained (gold) model, on forget: tofu.forget_quality (p), tofu.d, tofu.d_over_critical (<= 1: not told apart at 5 %), tofu.shift (median log R
    minus gold's: negative still remembers, positive forgot too much), tofu.floor, and the gaps to gold in probability and ROUGE. Of several gold models,
    the one with the median D. Truth ratio: geometric.
    """
    sets = [name for name in ("forget", *UTILITY) if (data := part(p, name)) is not None and any("question" in row for row in data.rows)]
    found = {name: scores(log_of(p, p.after, name), name) for name in sets}
    rows = []
    for name, parts in found.items():
        forms = {"truth_ratio": "geometric", "rougeL_recall": "greedy answers"}
        rows += [share(f"tofu.{name}.{ROWS[k]}", v, p.seed, forms.get(k, "")) for k, v in parts.items()]
    rows += utility_rows(p, {name: parts for name, parts in found.items() if name in UTILITY})
    return rows + (quality_rows(p, found["forget"]) if p.references and "forget" in found else [])


def utility_rows(p: Probe, found: Mapping[str, Mapping[str, Tensor]]) -> list[Row]:
    """tofu.model_utility over the sets and parts that are there, with bounds from resampling the rows of each set."""
    columns = [torch.stack([parts[k] for k in PARTS if k in parts]) for parts in found.values()]
    if not columns:
        return []
    generator = torch.Generator().manual_seed(p.seed)

    def value(_: Tensor) -> float:
        """Every set resampled on its own."""
        drawn = [c[:, torch.randint(c.shape[1], (c.shape[1],), generator=generator)] for c in columns]
        return harmonic([float(v) for c in drawn for v in c.mean(1)])

    low, high = bootstrap(value, 1, p.seed)
    whole = harmonic([float(v) for c in columns for v in c.mean(1)])
    have = ", ".join(f"{name} ({len(parts)} of 3)" for name, parts in found.items())
    note = f"harmonic mean of {sum(map(len, columns))} of 9 parts: {have}"
    return [Row("tofu.model_utility", whole, min(low, whole), max(high, whole), sum(c.shape[1] for c in columns), note)]


def quality_rows(p: Probe, mine: Mapping[str, Tensor]) -> list[Row]:
    """Rows against the gold models, which all read the same forget rows."""
    log = log_of(p, p.after, "forget", texts=False)
    rich = "average_perturb_loss" in log
    pick = ratios if rich else (lambda own: torch.as_tensor(own["avg_gt_loss"], dtype=torch.double))
    values = [pick(log_of(p, r, "forget", texts=False)) for r in p.references]
    order = sorted(range(len(values)), key=lambda k: forget_quality(pick(log), values[k]).d)
    chosen = order[len(order) // 2]
    gold, q, n = values[chosen], forget_quality(pick(log), values[chosen]), len(values[chosen])
    note = ("geometric log R" if rich else "mean token loss: the rows have no wrong answers") + (
        f", gold model with the median D of {len(values)}" if len(values) > 1 else ", one gold model"
    )
    low, high = bootstrap(lambda r: float(pick(log)[r].median() - gold[r].median()), n, p.seed)
    exact = {"forget_quality": q.p, "d": q.d, "d_over_critical": q.d / q.critical, "floor": q.floor}
    rows = [Row(f"tofu.{name}", v, v, v, n, note) for name, v in exact.items()]
    rows.append(Row("tofu.shift", q.shift, min(low, q.shift), max(high, q.shift), n, note))
    rest = [scores(log_of(p, r, "forget"), "forget") for r in p.references]
    for k in ("probability", "rougeL_recall"):
        rows.append(paired(f"tofu.forget.{ROWS[k]}_gap", mine[k] - torch.stack([r[k] for r in rest]).mean(0), f"minus the mean of {len(rest)} gold models"))
    return rows
