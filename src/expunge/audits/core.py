"""The audit's core: rows, the probe that checks look through, the gate that reads rows.

A check is a function (Probe) -> list[Row] registered with `@check`. The gate reads the worse end of each interval, and refuses
when a rule's row is missing.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from expunge.core.errors import Diverged, GateError
from expunge.core.modality import of
from expunge.core.registry import CHECKS
from expunge.core.types import Split, Task
from expunge.parts.reading import Scores, score

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """One measured number. `low` and `high` are one-sided 95 % bounds; `n` the number of examples (or models) behind it.

    note says how it was measured where that matters (how non-members were drawn, say). `indicative` rows never decide alone.
    Per-example attacks put the false-positive rate or threshold they are read at into `at`.
    """

    name: str
    value: float
    low: float
    high: float
    n: int
    note: str = ""
    indicative: bool = False
    at: float | None = None


@dataclass(frozen=True)
class Probe:
    """All that a check may see. `references` are models retrained without the forget set; by convention none is `after`.

    pool   shadow models (`audits.pool.Pool`) that calibrate per-example attacks, or None
    spread       retrained models that set floors, where a held-out one is read against fewer references; empty: the references
    forgotten    the same shadows after the audited method made them forget (`audits.pool.forgotten`), or None
    plants       planted controls of the candidate (`audits.plants.Plants`), or None
    cost   the attempt's meter and seconds, and `retrain` passes to compare with: keys forward, backward, seconds, retrain_passes
    """

    before: nn.Module
    after: nn.Module
    task: Task
    split: Split
    references: tuple[nn.Module, ...] = ()
    seed: int = 0
    cost: Mapping[str, float] = field(default_factory=dict)
    cache: dict = field(default_factory=dict)
    pool: Any = None
    forgotten: Any = None
    spread: tuple[nn.Module, ...] = ()
    plants: Any = None

    def model(self, which: str) -> nn.Module:
        """`before`, `after` or `reference0`, `reference1`, ..."""
        return self.references[int(which[9:])] if which.startswith("reference") else {"before": self.before, "after": self.after}[which]

    def scores(self, which: str, part: str) -> Scores:
        """Scores of a model on a part of the split, computed once per model however many checks ask."""
        return self.seen(self.model(which), part)

    def seen(self, model: nn.Module, part: str) -> Scores:
        """The same for any model."""
        return self.once((part,), model, lambda: score(model, self.task, getattr(self.split, part)))

    def once(self, what: tuple, model: nn.Module, make: Callable[[], Any]) -> Any:
        """`make()`, computed once per model and `what` (a tuple that names all else it depends on) as long as the cache lives."""
        key = (*what, id(model))
        if key not in self.cache:
            self.cache[key] = (make(), model)
        return self.cache[key][0]

    def removed(self) -> list[int]:
        """Classes that the request removes; empty for most modalities."""
        return of(self.task).removed(self.split)

    def rows(self, checks: Sequence[str], **changes: Any) -> list[Row]:
        """Rows of these checks (those of them that train nothing) on the probe with fields changed."""
        return audit(replace(self, **changes), checks, slow=False)


def audit(probe: Probe, names: Sequence[str] = (), *, slow: bool = True) -> list[Row]:
    """Rows of all checks that apply (or of the named ones): right task, needed parts at hand, references and pool if needed.

    slow    False leaves out those that train, unless they are named
    A check whose own training diverges gives one row, of its name, that says so.
    """
    have = set(probe.split.parts())
    rows: list[Row] = []
    for name in names or CHECKS:
        check = CHECKS[name]
        applies = check.suits(probe.task) and set(check.needs) <= have and (probe.references or not check.reference) and (probe.pool or not check.pool)
        if applies and (slow or names or not check.slow):
            rows += _measured(probe, name)
    return rows


def _measured(probe: Probe, name: str) -> list[Row]:
    start = time.perf_counter()
    log.debug("audit: %s", name)
    try:
        rows = CHECKS[name](probe)
        log.info("audit: %s read %d values in %.1f s", name, len(rows), time.perf_counter() - start)
        return rows
    except Diverged as error:
        return [Row(name, math.nan, -math.inf, math.inf, 0, f"the attack's own training diverged on this model: {error}")]


_RULE = re.compile(r"\s*(?:(<=|>=)\s*(\S+)|(\S+)\s*\.\.\s*(\S+))\s*")


def bounds(rule: str) -> tuple[float, float]:
    """`<= 0.02`, `>= 0.9` or `0.45..0.55` as (lowest, highest) allowed. Raises GateError."""
    found = _RULE.fullmatch(rule)
    try:
        if not found:
            raise ValueError
        sign, one, a, b = found.groups()
        if sign:
            return (-float("inf"), float(one)) if sign == "<=" else (float(one), float("inf"))
        return float(a), float(b)
    except ValueError:
        raise GateError(f"cannot read the rule '{rule}'; write '<= 0.02', '>= 0.9' or '0.45..0.55'") from None


def gate(rows: Sequence[Row], rules: Mapping[str, str]) -> list[str]:
    """Reasons to refuse, empty when all rules hold at the worse end of their row's interval; a rule without its row refuses.

    Where the value itself holds, the reason says about how many records it would take to claim so.

    >>> gate([Row("accuracy.forget", 0.0, 0.0, 0.051, 50)], {"accuracy.forget": "<= 0.02"})
    ['accuracy.forget is 0 (0 to 0.051, n = 50); the rule asks for <= 0.02: too few records, about 132 would do']
    """
    found = {row.name: row for row in rows}
    reasons = []
    for name, rule in rules.items():
        low, high = bounds(rule)
        row = found.get(name)
        if row is None:
            reasons.append(f"{name} was not measured; the rule asks for {rule}")
        elif not (row.low >= low and row.high <= high):
            more = enough(row, low, high)
            few = f": too few records, about {more:,} would do" if more else ""
            reasons.append(f"{name} is {row.value:.4g} ({row.low:.4g} to {row.high:.4g}, n = {row.n}); the rule asks for {rule}{few}")
    return reasons


def enough(row: Row, low: float, high: float) -> int:
    """About how many records would bring the interval of this value inside low..high; 0 where the value lies outside or on the edge.

    An interval shrinks as 1 / sqrt(n); at a share of exactly 0 or 1 Wilson's end is z^2 / (n + z^2) away, z = 1.645.
    """
    room = min([abs(row.value - e) for e in (low, high) if math.isfinite(e)], default=0.0)
    worst = max(row.high - row.value if row.high > high else 0.0, row.value - row.low if row.low < low else 0.0)
    if not (low < row.value < high) or not math.isfinite(worst) or row.n < 2 or room <= 0:
        return 0
    if row.value in (0.0, 1.0):
        return math.ceil((row.n + 2.706) * worst / room - 2.706)
    return math.ceil(row.n * (worst / room) ** 2)
