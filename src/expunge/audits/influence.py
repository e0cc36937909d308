"""UnTrac: how much each of several training sets helps or harms a test set, found by unlearning instead of retraining.

Paper    Isonuma and Titov, "Unlearning Reveals (Traces) the Influential Training Data of Language Models", ACL 2024, arXiv:2401.15241.
Code     misonuma/untrac, no licence.
UnTrac   theta_k = theta_0 after ascent on L_{Z_k};   I_k = L_S(theta_k) - L_S(theta_0).           One ascent per set, S read after each.
Inverse  theta_S = theta_0 after ascent on L_S;       I_k = L_{Z_k}(theta_S) - L_{Z_k}(theta_0).   One ascent, every set read after it.
Sign     I_k > 0: without Z_k the test loss is larger, so the set helps; I_k < 0: it harms. It estimates the order, not the size, of what retraining
         without Z_k would do to L_S.

L is the mean over records of `Out.mean`, so any task will do. Every ascent takes the same number of steps whatever the size of its set. The order of
batches decides the first steps of adaptive optimisers, hence several shuffles. Read influence while losses have moved little (`Influence.rises`,
a few tenths of a nat): an ascent that has gone far tells nothing about the data, and may even turn the order round.

Differs  The published code ascends in train mode with Adafactor, for one pass over each set; here in eval mode, so that dropout adds no noise and running
         statistics stay, with Adam, for equally many steps. Under sgd with a small lr both forms tend to lr * steps * <grad L_S, grad L_{Z_k}>.
Check    theta = 0.5, L_Z = (theta - 1)^2 / 2, L_S = (theta - 0.8)^2 / 2, one step of sgd at 0.1; the first-order value is 0.015 both ways
    >>> from expunge.modalities.regression.task import regression; from expunge.modalities.examples import Examples
    >>> model, one = nn.Linear(1, 1, bias=False).double(), torch.ones(1, 1, dtype=torch.double)
    >>> _ = model.weight.data.fill_(0.5)
    >>> z, s = (Examples(one, v * one[0], torch.tensor([0])) for v in (1.0, 0.8))
    >>> for inverse in (False, True):
    ...     round(untrac(model, regression(), {"z": z}, s, inverse=inverse, steps=1, lr=0.1, optimizer="sgd", runs=1).scores["z"], 6)
    0.01625
    0.01545
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from expunge.audits.core import Row
from expunge.core import guard
from expunge.core.errors import SettingError, SplitError
from expunge.core.session import Session, edit
from expunge.core.types import Data, Scope, Task
from expunge.parts.scopes.layers import everything
from expunge.parts.updates.descend import descend

SIZE = 500
"""Records of one batch when losses are only read."""


@dataclass(frozen=True, repr=False)
class Influence:
    """One score per training set, and what it took to know them.

    runs      (R, K) change of mean loss, one row per shuffle
    rises     (R, K) by how much the mean loss of what was unlearned rose; (R, 1) for the inverse, which unlearns the test set alone
    steps     (R, K) or (R, 1) steps that were taken
    forward, backward, seconds    examples passed, and the time it took
    """

    names: tuple[str, ...]
    runs: Tensor
    rises: Tensor
    steps: Tensor
    forward: int
    backward: int
    seconds: float

    @property
    def scores(self) -> dict[str, float]:
        """Mean over shuffles by name; positive means that the set helps."""
        return dict(zip(self.names, self.runs.mean(0).tolist(), strict=True))

    @property
    def errors(self) -> dict[str, float]:
        """Standard error of each score over shuffles; infinite for one shuffle."""
        r = len(self.runs)
        values = self.runs.std(0) / math.sqrt(r) if r > 1 else torch.full_like(self.runs[0], math.inf)
        return dict(zip(self.names, values.tolist(), strict=True))

    def rows(self) -> list[Row]:
        """Rows influence.<name> with Student's one-sided 95 % bounds over shuffles: they hold for this model and this test set."""
        from scipy.stats import t

        r, errors = len(self.runs), self.errors
        z = float(t.ppf(0.95, r - 1)) if r > 1 else 1.0
        note = f"{r} shuffle(s) of {float(self.steps.mean()):.3g} steps; what was unlearned lost {float(self.rises.mean()):.3g} on average"
        return [Row(f"influence.{name}", v, v - z * errors[name], v + z * errors[name], r, note, indicative=True) for name, v in self.scores.items()]

    def __repr__(self) -> str:
        ranked = ", ".join(f"{name} {v:+.3g}" for name, v in sorted(self.scores.items(), key=lambda pair: -pair[1]))
        return f"Influence({ranked}; {self.forward:,} forward, {self.backward:,} backward, {self.seconds:.3g} s)"


def untrac(
    model: nn.Module, task: Task, sets: Mapping[str, Data], test: Data, *, inverse: bool = False, steps: int = 10, lr: float = 1e-4, optimizer: str = "adam",
    batch_size: int = 64, runs: int = 3, rise: float = math.inf, scope: Scope | None = None, seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Influence:  # fmt: skip
    """Influence of each training set (name -> records) on the mean test loss. The model is left as it was.

    inverse    unlearn the test set once and read every training set, instead of the other way round
    steps      of ascent per shuffle, with lr, optimizer and batch_size
    runs       shuffles
    rise       end an ascent after the step whose batch had already lost this much, so that every set is unlearned about as far; on digits equal steps
               agreed better with retraining than equal rises
    scope      weights that may move; all of them without it
    progress   called as progress(text, done, total), once per ascent

    Raises SplitError for no sets or an empty one, SettingError for a setting out of range, Diverged when a loss or weight is no longer finite.
    """
    _check(sets, test, steps, lr, batch_size, runs, rise)
    start, one = time.perf_counter(), {"the test set": test}
    gone, read = (one, sets) if inverse else (sets, one)
    scope = everything(model, "freeze") if scope is None else scope
    changes = torch.zeros(runs, len(sets), dtype=torch.double)
    rises, taken = torch.zeros(2, runs, len(gone), dtype=torch.double)
    with guard.watching(guard.Guard()) as g:
        known, base = ([losses(model, task, data) for data in part.values()] for part in (gone, read))
        for r in range(runs):
            for k, (name, data) in enumerate(gone.items()):
                if progress:
                    progress(f"unlearning {name}", r * len(gone) + k, runs * len(gone))
                batches = task.batches(data, batch_size, epochs=steps / -(-len(data) // batch_size), seed=seed + r)
                with edit(model, scope) as e:
                    taken[r, k] = _ascend(e, task, batches, known[k], rise, lr=lr, optimizer=optimizer)
                    rises[r, k] = (losses(model, task, data) - known[k]).mean()
                    after = [(losses(model, task, other) - b).mean() for other, b in zip(read.values(), base, strict=True)]
                changes[r, k : k + len(after)] = torch.stack(after)
    return Influence(tuple(sets), changes, rises, taken, g.meter.forward, g.meter.backward, time.perf_counter() - start)


def _check(sets: Mapping[str, Data], test: Data, steps: int, lr: float, batch_size: int, runs: int, rise: float) -> None:
    for what, value in (("steps", steps), ("batch_size", batch_size), ("runs", runs)):
        if value < 1:
            raise SettingError(f"{what} must be at least 1, not {value}")
    if not lr > 0 or not rise > 0:
        raise SettingError(f"lr and rise must be above 0; found {lr:g} and {rise:g}")
    if not sets:
        raise SplitError("no training sets are given; name at least one")
    for name, data in (*sets.items(), ("the test set", test)):
        if len(data) == 0:
            raise SplitError(f"{name} is empty; leave it out or give it records")


def _ascend(e: Session, task: Task, batches: Sequence, known: Tensor, rise: float, **options: Any) -> int:
    """Ascent on the mean loss in eval mode, ended by `rise` over the losses `known` (N,) of a batch's records; how many steps it took."""
    g, lost = guard.current(), [0.0]
    g.stopped = ""

    def loss(batch) -> Tensor:
        values = task.forward(e.model, batch).mean
        lost[0] = float((values.detach().cpu().double() - known[batch["i"]]).mean())
        g.meter.add(forward=len(values), backward=len(values))
        return -values.mean()

    def after(_: int) -> None:
        if lost[0] >= rise:
            g.stopped = f"loss rose by {rise:g}"

    e.eval()
    return len(descend(e, loss, batches, after=after, **options))


def losses(model: nn.Module, task: Task, data: Data) -> Tensor:
    """(N,) loss per unit of every record in eval mode and without augmentation, in double precision on the CPU."""
    batches, found = task.batches(data, SIZE), []
    with guard.quiet(model):
        for k in range(len(batches)):
            found.append(task.forward(model, batches[k]).mean.cpu().double())
            guard.current().meter.add(forward=len(found[-1]))
    return torch.cat(found)
