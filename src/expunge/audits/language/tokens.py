"""What every language metric reads: one forward pass over a part gives the log-probability of each target token, mean and deviation of the
next-token distribution there, and whether greedy decoding would have said it. Parts, passes and answers are shared by all checks of an audit.

`token_scores` keeps four numbers per target token, never the (N, T, V) logits. `answers_nll` scores K answers to each question at the cost
of one prompt, all in one row of tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from expunge.audits.core import Probe
from expunge.core.errors import DataError
from expunge.core.guard import quiet
from expunge.core.types import IGNORE, Task, concat, device_of
from expunge.modalities.language.remember import passes
from expunge.modalities.language.task import aligned, buckets
from expunge.modalities.language.texts import GENERAL, Texts

MOST = 300
"""Most retain rows that a language check reads, drawn by the audit's seed (TOFU evaluates as many)."""

NEW = 200
"""Most tokens of a generated answer, and never more than twice the longest answer of the part."""

PIECE = 1 << 24
"""Most logits that are turned into probabilities at once."""


@dataclass(frozen=True)
class TokenScores:
    """N float32 vectors (T_i,) on CPU, one number per target token, in the order of the text."""

    logp: tuple[Tensor, ...]
    """log p(y_t | what stands before it)."""
    mu: tuple[Tensor, ...]
    """sum_v p_v log p_v of the next-token distribution: the mean of log p."""
    sigma: tuple[Tensor, ...]
    """The deviation of log p under it."""
    hit: tuple[Tensor, ...]
    """Bool: the likeliest token is the label."""

    @property
    def count(self) -> Tensor:
        """(N,) target tokens."""
        return torch.tensor([len(v) for v in self.logp], dtype=torch.float32)

    @property
    def total(self) -> Tensor:
        """(N,) sum of the token losses."""
        return torch.stack([-v.sum() for v in self.logp])

    @property
    def nll(self) -> Tensor:
        """(N,) mean token loss."""
        return torch.stack([-v.mean() for v in self.logp])


def moments(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log p of the label, mean and deviation of log p, and argmax == label, of logits (M, V) and labels (M,). Impossible tokens weigh nothing.

    >>> p = torch.tensor([[0.7, 0.2, 0.1]])
    >>> [round(float(v), 4) for v in moments(p.log(), torch.tensor([2]))[:3]]
    [-2.3026, -0.8018, 0.7031]
    """
    q = F.log_softmax(logits.float(), -1)
    p, finite = q.exp(), q.clamp(min=-1e4)
    mu = (p * finite).sum(-1)
    sigma = (p * (finite - mu[:, None]) ** 2).sum(-1).sqrt()
    return q.gather(1, labels[:, None]).squeeze(1), mu, sigma, logits.argmax(-1) == labels


def token_scores(model: nn.Module, task: Task, data: Texts, size: int = 32) -> TokenScores:
    """One pass over `data` in eval mode without gradients, `size` texts of like length at a time."""
    found: list[Any] = [None] * len(data)
    for rows, _, out in passes(model, task, data, size):
        keep = out.labels != IGNORE
        places, labels = keep.nonzero(), out.labels[keep]
        step = max(1, PIECE // out.logits.shape[-1])
        pieces = [moments(out.logits[at[:, 0], at[:, 1]], y) for at, y in zip(places.split(step), labels.split(step), strict=True)]
        columns = [torch.cat(c).cpu().split(keep.sum(1).tolist()) for c in zip(*pieces, strict=True)]
        for r, k in enumerate(rows.tolist()):
            found[k] = [c[r].clone() for c in columns]
    return TokenScores(*(tuple(column) for column in zip(*found, strict=True)))


def answers_nll(model: nn.Module, task: Task, data: Texts, answers: Sequence[Sequence[str]], size: int = 64) -> Tensor:
    """(N, K) float32 mean token loss of K other answers to each row's question, in the order given; some `size` answers at a time.

    What a row's K token sequences share before the first target goes through the model once: the rest follows side by side in the same row, each answer
    blind to the others. Models that take no such mask (the first row is read both ways to find out), and models with hooks (which may look at the whole
    input), score each answer in full.
    Under the mask "entity" whole answers are scored, since other answers do not hold the fact. Raises DataError when rows have different numbers of answers.
    """
    counts = sorted({len(row) for row in answers})
    if len(answers) != len(data) or len(counts) != 1 or counts[0] == 0:
        raise DataError(f"every row needs equally many answers; found {', '.join(map(str, counts)) or 'none'} for {len(answers)} of {len(data)} rows")
    K = counts[0]
    form = replace(data.format, mask="answer+eos") if data.format.mask == "entity" else data.format
    every = form.texts([{**row, "answer": a} for row, mine in zip(data.rows, answers, strict=True) for a in mine])
    starts = [shared(every, range(k * K, (k + 1) * K)) for k in range(len(data))]
    together = [k for k, start in enumerate(starts) if start]
    if K == 1 or not together or not packable(model, task, every, starts[together[0]], range(together[0] * K, (together[0] + 1) * K)):
        return plain_nll(model, task, every).view(len(data), K)
    out = torch.empty(len(data), K)
    for rows in buckets([sum(len(every.tokens[k * K + j]) for j in range(K)) for k in together], max(1, size // K)):
        chosen = [together[k] for k in rows.tolist()]
        out[chosen] = packed(model, every, [starts[k] for k in chosen], [range(k * K, (k + 1) * K) for k in chosen])
    if alone := [k for k, start in enumerate(starts) if not start]:
        out[alone] = plain_nll(model, task, every.take([j for k in alone for j in range(k * K, (k + 1) * K)])).view(len(alone), K)
    return out


def plain_nll(model: nn.Module, task: Task, data: Texts, size: int = 32) -> Tensor:
    """(N,) mean token loss, each text in full."""
    out = torch.empty(len(data))
    for rows, _, found in passes(model, task, data, size):
        out[rows] = found.mean.float().cpu()
    return out


def packable(model: nn.Module, task: Task, data: Texts, start: int, group: Sequence[int]) -> bool:
    """Whether these texts, packed into one row, are scored as they are on their own: the model carries no hooks, takes positions, and obeys the mask."""
    takes = inspect.signature(model.forward).parameters
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    if hooked or not {"position_ids", "attention_mask"} <= takes.keys():
        return False
    try:
        found = packed(model, data, [start], [group])[0]
    except (RuntimeError, ValueError, TypeError):  # no mask of four dimensions
        return False
    tolerance = 1e-4 if next(model.parameters()).dtype in (torch.float32, torch.float64) else 1e-2
    return torch.allclose(found, plain_nll(model, task, data.take(list(group))), rtol=tolerance, atol=tolerance / 10)


def shared(data: Texts, rows: Sequence[int]) -> int:
    """Tokens at the start that all these texts have in common, and that end at least one before the first target of any."""
    most = min(int(data.targets[k].float().argmax()) for k in rows) - 1
    first = data.tokens[rows[0]]
    for k in rows[1:]:
        n = min(most, len(data.tokens[k]), len(first))
        differs = (data.tokens[k][:n] != first[:n]).nonzero()
        most = min(n, int(differs[0]) if len(differs) else n)
    return max(0, most)


def packed(model: nn.Module, data: Texts, starts: Sequence[int], groups: Sequence[Sequence[int]]) -> Tensor:
    """(R, K) mean token losses of texts in groups of K that share their first `starts[r]` tokens, one row of tokens per group.

    The shared tokens are padded on the left, so that the branches of all rows begin at one column. A branch sees the shared tokens and itself, at the
    positions it would have alone. Its token at place j predicts the one at j + 1, and its last predicts nothing: it is not fed.
    """
    device, P, K = device_of(model), max(starts), len(groups[0])
    branches = [[(data.tokens[k][n:], data.targets[k][n:]) for k in group] for n, group in zip(starts, groups, strict=True)]
    T = P + max(sum(len(t) - 1 for t, _ in row) for row in branches)
    x, place, labels = torch.zeros(3, len(groups), T, dtype=torch.long).unbind()
    branch = torch.full_like(x, K + 1)  # 0 .. K - 1, K for what they share, K + 1 for padding
    labels.fill_(IGNORE)
    for r, (n, group) in enumerate(zip(starts, groups, strict=True)):
        x[r, P - n : P], place[r, P - n : P], branch[r, P - n : P] = data.tokens[group[0]][:n], torch.arange(n), K
        at = P
        for k, (tokens, targets) in enumerate(branches[r]):
            here = slice(at, at := at + len(tokens) - 1)
            x[r, here], place[r, here], branch[r, here] = tokens[:-1], n + torch.arange(len(tokens) - 1), k
            labels[r, here] = torch.where(targets[1:], tokens[1:], IGNORE)
    seen = torch.ones(T, T, dtype=torch.bool).tril() & ((branch[:, None] == branch[..., None]) | (branch[:, None] == K) & (branch[..., None] < K))
    mask = torch.zeros(seen.shape, dtype=next(model.parameters()).dtype).masked_fill(~seen, -torch.inf)[:, None]
    head = {"logits_to_keep": T - P} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    with quiet(model):
        logits = model(input_ids=x.to(device), attention_mask=mask.to(device), position_ids=place.to(device), use_cache=False, **head).logits
        out = aligned(logits[:, P - T :], labels[:, P:].to(device))
    own = branch[:, P:].clamp(max=K).to(device)
    total, count = (torch.zeros(len(groups), K + 1, device=device).scatter_add(1, own, v.float()) for v in (out.units, out.labels != IGNORE))
    return (total / count)[:, :K].cpu()


def part(p: Probe, name: str) -> Texts | None:
    """The texts that language checks read, None where empty: `forget` and `test` whole; `retain`, at most MOST rows drawn by seed (of those with wrong
    answers to compare, where only some have them); `unseen`, test without the sets of general knowledge; `real_authors` and `world_facts`, those sets, from
    general and test.
    """
    return p.once(("texts", name, p.seed), p.after, lambda: _part(p, name))


def _part(p: Probe, name: str) -> Texts | None:
    if name in ("forget", "test"):
        return getattr(p.split, name)
    if name == "retain":
        data = p.split.retain
        if data is None:
            return None
        rich = [k for k, row in enumerate(data.rows) if row.get("perturbed_answer")]
        data = data.take(rich) if rich else data
        if len(data) <= MOST:
            return data
        return data.take(torch.randperm(len(data), generator=torch.Generator().manual_seed(p.seed))[:MOST].sort().values)
    wanted = (lambda row: row.get("set") not in GENERAL) if name == "unseen" else (lambda row: row.get("set") == name)
    found = []
    for data in (p.split.test, None if name == "unseen" else p.split.general):
        index = [] if data is None else [k for k, row in enumerate(data.rows) if wanted(row)]
        found += [data.take(index)] if index else []
    return concat(*found) if found else None


def seen(p: Probe, model: nn.Module, name: str) -> TokenScores:
    """Token scores of a model on a part, computed once however many checks ask."""
    return p.once(("tokens", name, p.seed), model, lambda: token_scores(model, p.task, part(p, name)))


def said(p: Probe, model: nn.Module, name: str) -> list[str]:
    """Greedy answers of a model to the questions of a part, computed once; at most NEW tokens and twice the longest answer there."""
    data = part(p, name)
    new = min(NEW, 2 * max(int(t.sum()) for t in data.targets))
    sample: Any = p.task.sample
    return p.once(("said", name, p.seed), model, lambda: sample(model, data, new=new))
