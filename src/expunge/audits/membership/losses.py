"""Membership inference on populations. Source: card audits-classification. Indicative: a population threshold can call an untouched model
forgotten; the per-example calibrated attacks decide. Attacks are read two-sided: an AUC of 0.1 is as visible as one of 0.9.
"""

from __future__ import annotations

import torch
from torch import Tensor

from expunge.audits.core import Probe, Row
from expunge.audits.unseen import strangers
from expunge.audits.utility import entropy, modified_entropy, modified_entropy_published
from expunge.core.registry import check
from expunge.core.stats import Z, above, auc, matched, wilson
from expunge.parts.reading import Scores

MOST = 1000
"""Most members (and non-members) an attack classifier is trained on, drawn by the audit's seed."""


def targets(s: Scores) -> Tensor:
    """(N,) labels or (N, ...) real targets; for texts, which have neither, one label for all."""
    if s.labels is None and s.target is None:
        return torch.zeros(len(s.nll), dtype=torch.long)
    return s.labels if s.labels is not None else s.target


def sides(p: Probe, which: str) -> tuple[Scores, Scores, Tensor, str]:
    """Scores on forget and test, the positions of matched non-members in test, and how they were drawn."""
    forget, test = p.scores(which, "forget"), p.scores(which, "test")
    fair = strangers(p.split.test)
    rows, note = matched(targets(forget), targets(test)[fair], p.seed)
    return forget, test, fair[rows], note


@check(tasks=("classification", "regression", "causal_lm"), needs=("forget", "test"))
def membership(p: Probe) -> list[Row]:
    """membership.loss_auc: P(forget loss < non-member loss); 0.5 when they look alike. membership.tpr: at 1 % false positives.

    With references, membership.excess = AUC of the candidate minus the mean AUC of the retrained models on the same examples.
    """
    forget, test, rows, note = sides(p, "after")
    n = len(forget.nll) + len(rows)
    value, low, high = auc(test.nll[rows], forget.nll)
    out = [Row("membership.loss_auc", value, low, high, n, note, indicative=True)]
    if len(rows):
        cut = test.nll[rows].sort().values[int(0.01 * len(rows))]
        hits = int((forget.nll < cut).sum())
        out.append(Row("membership.tpr", *wilson(hits, len(forget.nll)), n, f"{note}; {len(rows)} non-members set the threshold", indicative=True, at=0.01))
    if forget.logits is not None and len(rows):
        out.append(Row("membership.entropy_auc", *auc(entropy(test.logits[rows]), entropy(forget.logits)), n, note, indicative=True))
    if p.references and len(rows):
        rest = [auc(p.scores(f"reference{k}", "test").nll[rows], p.scores(f"reference{k}", "forget").nll) for k in range(len(p.references))]
        out.append(Row("membership.excess", *above((value, low, high), rest), n, f"{note}; against {len(rest)} retrained models", indicative=True))
    return out


def svc_features(s: Scores, *, published: bool) -> dict[str, Tensor]:
    """The five features of SVC-MIA, each (N, k): correctness, confidence, entropy, modified entropy, all probabilities."""
    probabilities = s.logits.softmax(-1)
    modified = modified_entropy_published if published else modified_entropy
    single = {
        "correctness": s.correct.float(),
        "confidence": probabilities.gather(1, s.labels[:, None])[:, 0],
        "entropy": entropy(s.logits),
        "modified_entropy": modified(s.logits, s.labels),
    }
    return {**{k: v[:, None] for k, v in single.items()}, "probabilities": probabilities}


@check(tasks=("classification",), needs=("forget", "retain", "test"))
def membership_svc(p: Probe) -> list[Row]:
    """Share of forget called NON-member by SVC(rbf, C = 3, gamma auto) trained on members (retain) against non-members (test).

    membership_svc.<feature>: members drawn at random, as many as non-members, right modified entropy.
    membership_svc_published.<feature>: the first |test| retain examples and the published modified entropy, for comparison with papers.
    """
    forget, retain, test = (p.scores("after", part) for part in ("forget", "retain", "test"))
    generator = torch.Generator().manual_seed(p.seed)
    n = min(len(retain.nll), len(test.nll), MOST)
    ways = {
        "membership_svc": (torch.randperm(len(retain.nll), generator=generator)[:n], torch.randperm(len(test.nll), generator=generator)[:n], False),
        "membership_svc_published": (torch.arange(n), torch.arange(n), True),
    }
    rows = []
    for name, (members, others, published) in ways.items():
        sets = [svc_features(s, published=published) for s in (retain, test, forget)]
        for feature in sets[0]:
            outs = svc(sets[0][feature][members], sets[1][feature][others], sets[2][feature])
            note = f"SVC trained on {n} members and {n} non-members" + ("; the published form, for comparison only" if published else "")
            rows.append(Row(f"{name}.{feature}", *wilson(int(outs.sum()), len(outs)), len(outs), note, indicative=True))
    return rows


def svc(members: Tensor, others: Tensor, target: Tensor) -> Tensor:
    """(N,) bool: called non-member. Features (n, k). SVC(rbf, C = 3, gamma = 1 / k)."""
    from sklearn.svm import SVC

    x = torch.cat([members, others]).double().numpy()
    y = torch.cat([torch.ones(len(members)), torch.zeros(len(others))]).numpy()
    return torch.as_tensor(SVC(C=3, gamma="auto", kernel="rbf").fit(x, y).predict(target.double().numpy()) == 0)


@check(tasks=("classification",), needs=("forget", "test"))
def membership_threshold(p: Probe) -> list[Row]:
    """Balanced accuracy of a per-class loss threshold, chosen on one half and read on the other; 0.5 when members look like non-members."""
    forget, test, rows, note = sides(p, "after")
    generator = torch.Generator().manual_seed(p.seed)
    right = [0, 0]
    total = [0, 0]
    for k in forget.labels.unique().tolist():
        a, b = forget.nll[forget.labels == k], test.nll[rows][test.labels[rows] == k]
        a, b = a[torch.randperm(len(a), generator=generator)], b[torch.randperm(len(b), generator=generator)]
        if len(a) < 2 or len(b) < 2:
            continue
        cut = threshold(a[: len(a) // 2], b[: len(b) // 2])
        for side, (values, below) in enumerate(((a[len(a) // 2 :], True), (b[len(b) // 2 :], False))):
            right[side] += int(((values <= cut) == below).sum())
            total[side] += len(values)
    if not all(total):
        return []
    tpr, tnr = right[0] / total[0], right[1] / total[1]
    value = (tpr + tnr) / 2
    error = Z * ((tpr * (1 - tpr) / total[0] + tnr * (1 - tnr) / total[1]) / 4 + 0.25 / min(total) ** 2) ** 0.5
    return [Row("membership_threshold", value, value - error, value + error, sum(total), note, indicative=True)]


def threshold(members: Tensor, others: Tensor) -> Tensor:
    """The loss at or below which "member" has the best balanced accuracy.

    >>> threshold(torch.tensor([0.1, 0.2]), torch.tensor([0.5, 0.9]))
    tensor(0.2000)
    """
    cuts = torch.cat([members, others]).sort().values
    gain = (members[None] <= cuts[:, None]).float().mean(1) - (others[None] <= cuts[:, None]).float().mean(1)
    return cuts[int(gain.argmax())]
