"""The audit of the audit: every check on a population of models whose truth is known, and what it could tell.

Gone: models retrained without the forget set. Not gone: untouched originals, and sabotage, models made from an original so that something an
audit may look at reads well while what was learnt is still there. Approximate methods are shown beside them without a truth.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from expunge.audits.core import Probe, Row, audit, gate
from expunge.audits.verdict import UTILITY, default_rules, selftest
from expunge.core import guard
from expunge.core.registry import CHECKS
from expunge.core.session import scratch
from expunge.core.stats import Z, auc, wilson
from expunge.core.types import Split, Task, concat
from expunge.engine.run import unlearn
from expunge.modalities.classification.task import head
from expunge.modalities.worlds import World, cache_folder, world
from expunge.parts.reading import outputs
from expunge.parts.updates.descend import descend
from expunge.planning.outcome import patched

REFERENCES = 3
"""Retrained models that the audits compare with; the population's own are others."""

Maker = Callable[[nn.Module, Task, Split, int], nn.Module]


def _descend(model: nn.Module, task: Task, data, loss, *, lr: float, steps: int, seed: int, only: Sequence[Tensor] | None = None) -> nn.Module:
    """A copy after `steps` SGD steps of `loss(out)` on data; `only` these parameters of it move if any are named."""
    twin = copy.deepcopy(model)
    names = None if only is None else [n for n, p in model.named_parameters() if any(p is q for q in only)]
    for n, p in twin.named_parameters():
        p.requires_grad_(names is None or n in names)
    s = scratch(twin)
    s.eval()
    with guard.watching(guard.Guard(max_loss=math.inf)):
        batches = task.batches(data, 32, epochs=steps / -(-len(data) // 32), seed=seed)
        descend(s, lambda b: loss(task.forward(twin, b)), batches, lr=lr, momentum=0.9, clip=5.0)
    return twin.requires_grad_(True).eval()


def no_op(model: nn.Module, task: Task, split: Split, seed: int) -> nn.Module:
    """A learning rate that moves nothing that matters."""
    return _descend(model, task, split.retain, lambda out: out.mean.mean(), lr=1e-7, steps=10, seed=seed)


def noise(model: nn.Module, task: Task, split: Split, seed: int) -> nn.Module:
    """Gaussian noise of 2 % of each tensor's own spread on all weights."""
    twin, g = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(0.02 * p.std(correction=0) * torch.randn(p.shape, generator=g))
    return twin


def wrong_way(model: nn.Module, task: Task, split: Split, seed: int) -> nn.Module:
    """Trained further on the forget set, as a sign error would."""
    return _descend(model, task, split.forget, lambda out: out.mean.mean(), lr=0.01, steps=20, seed=seed)


def muted(model: nn.Module, task: Task, split: Split, seed: int) -> nn.Module:
    """Output level: the biases of the forgotten labels are lowered until the forget set's loss looks unseen; nothing else moves."""
    labels, counts = split.forget.y.unique(return_counts=True)
    twin = copy.deepcopy(model)
    bias = head(twin)[1].bias
    with torch.no_grad():
        bias[labels] -= 20.0 * (counts / counts.max()) if len(labels) < len(bias) else 2.0 * (counts / counts.max())
    return twin


def cooled(model: nn.Module, task: Task, split: Split, seed: int) -> nn.Module:
    """Output level: all logits divided by 4, which raises every loss and changes no answer."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in head(twin)[1].parameters():
            p.div_(4)
    return twin


def top_only(model: nn.Module, task: Task, split: Split, seed: int) -> nn.Module:
    """Random labels on the forget set, the last layer alone: features stay."""
    g = torch.Generator().manual_seed(seed)

    def loss(out):
        other = (out.labels + torch.randint(1, out.logits.shape[1], out.labels.shape, generator=g)) % out.logits.shape[1]
        return nn.functional.cross_entropy(out.logits, other)

    return _descend(model, task, split.forget, loss, lr=0.05, steps=40, seed=seed, only=list(head(model)[1].parameters()))


def half(model: nn.Module, task: Task, split: Split, seed: int) -> nn.Module:
    """Ascent on one half of the forget set, repaired on retain and on the other half, which stays learnt."""
    rows = torch.randperm(len(split.forget), generator=torch.Generator().manual_seed(seed))
    gone, left = split.forget.take(rows[: len(rows) // 2]), split.forget.take(rows[len(rows) // 2 :])
    out = _descend(model, task, gone, lambda o: -o.mean.clamp(max=5).mean(), lr=0.005, steps=10, seed=seed)
    out = _descend(out, task, split.retain, lambda o: o.mean.mean(), lr=0.01, steps=20, seed=seed)
    return _descend(out, task, left, lambda o: o.mean.mean(), lr=0.01, steps=10, seed=seed)


def one_view(model: nn.Module, task: Task, split: Split, seed: int) -> nn.Module:
    """Pushed away on the very inputs that the audit reads, and taught the same records shifted by one pixel: another view still works."""
    data = split.forget
    moved = data.x.roll(1, -1) if data.x.ndim == 4 else data.x + 0.5 * data.x.std()
    both = concat(data, replace(data, x=moved, y=data.y + 1000, ids=data.ids + 10**9))
    twin = copy.deepcopy(model).requires_grad_(True)
    s = scratch(twin)
    s.eval()
    with guard.watching(guard.Guard(max_loss=math.inf)):
        batches = task.batches(both, 32, epochs=60 / -(-len(both) // 32), seed=seed)

        def loss(b):
            shown = b["y"] >= 1000
            out = task.forward(twin, {**b, "y": b["y"] % 1000})
            return torch.where(shown, out.mean, -out.mean.clamp(max=3.0)).mean()

        descend(s, loss, batches, lr=0.01, momentum=0.9, clip=5.0)
    return twin.eval()


def masked(model: nn.Module, task: Task, split: Split, seed: int, told: Tensor | None = None) -> nn.Module:
    """Output level, learnt: the last layer alone is taught to answer the forget set as the model itself would without the label, and retain as before.

    told    (N, C) logits to answer the forget set with instead
    """
    mine, kept = (outputs(model, task, part) for part in (split.forget, split.retain))
    told = mine.scatter(1, split.forget.y[:, None], mine.amin(1, keepdim=True)) if told is None else told
    rows = torch.randperm(len(kept), generator=torch.Generator().manual_seed(seed))[: 2 * len(told)]
    goal, data = torch.cat([told, kept[rows]]).softmax(-1), concat(split.forget, split.retain.take(rows))
    twin = copy.deepcopy(model).requires_grad_(False)
    s = scratch(twin)
    for p in head(twin)[1].parameters():
        p.requires_grad_(True)
    s.eval()
    with guard.watching(guard.Guard(max_loss=math.inf)):
        batches = task.batches(data, 32, epochs=300 / -(-len(data) // 32), seed=seed)
        descend(s, lambda b: nn.functional.cross_entropy(task.forward(twin, b).logits, goal[b["i"]]), batches, lr=0.05, momentum=0.9, clip=5.0)
    return twin.requires_grad_(True).eval()


def flattened(model: nn.Module, task: Task, split: Split, seed: int) -> nn.Module:
    """Trained to answer the forget set with even odds for a few steps: loss and confidence look unseen, little else moves."""

    def loss(out):
        return -out.logits.log_softmax(-1).mean()

    return _descend(model, task, split.forget, loss, lr=0.003, steps=15, seed=seed)


SABOTAGE: dict[str, Maker] = {
    "no_op": no_op, "noise": noise, "wrong_way": wrong_way, "muted": muted, "cooled": cooled, "top_only": top_only, "half": half, "one_view": one_view,
    "flattened": flattened, "masked": masked,
}  # fmt: skip
"""Kinds of models that are not gone, by what was done to an original."""

METHODS = ("fine_tune", "random_label", "salun", "fisher_forgetting", "scrub", "bad_teacher")
"""Approximate methods that are shown beside the population, without a truth."""


def population(
    w: World, scenario: str, cache: Path | None, *, gone: int = 24, originals: int = 9, per_kind: int = 3
) -> Iterator[tuple[str, str, int, nn.Module, nn.Module]]:
    """(truth, kind, seed, original, model): truth is gone, kept or open. At the defaults 24 + 9 + 11 x 3 = 66 models of known truth.

    Beyond SABOTAGE there is `copied`: as masked, but taught the very answers of the retrained models that the audit compares with.
    """
    split, original = w.split(scenario), functools.cache(lambda k: w.original(k, cache))
    for k in range(gone):
        yield "gone", "retrained", k, original(k % originals), w.retrained(scenario, REFERENCES + k, cache)
    for k in range(originals):
        yield "kept", "untouched", k, original(k), original(k)
    for kind, make in SABOTAGE.items():
        for k in range(per_kind):
            yield "kept", kind, k, original(k), make(original(k), w.task, split, 100 + k)
    told = torch.stack([outputs(w.retrained(scenario, k, cache), w.task, split.forget) for k in range(REFERENCES)]).mean(0)
    for k in range(per_kind):
        yield "kept", "copied", k, original(k), masked(original(k), w.task, split, 100 + k, told)
    for name in METHODS:
        attempt = unlearn(name, original(0), w.task, split, seed=0)
        if attempt.patch is not None:
            yield "open", name, 0, original(0), patched(original(0), attempt)


def bench(name: str, scenarios: Sequence[str] = (), out: Path | str = "bench-out", *, progress=None, cache: Path | None = None) -> list[dict[str, Any]]:
    """Audit the population of each scenario; cells in OUT/NAME-power.jsonl are not run again. Writes OUT/NAME-power.md."""
    w, cache = world(name), cache or cache_folder()
    path = Path(out) / f"{name}-power.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(c["scenario"], c["kind"], c["seed"]): c for c in lines if c["digest"] == w.digest}
    for scenario in scenarios or w.scenarios:
        refs, store, trials = tuple(w.retrained(scenario, k, cache) for k in range(REFERENCES)), {}, {}
        for number, (truth, kind, seed, original, model) in enumerate(population(w, scenario, cache)):
            if progress:
                progress(f"{name} {scenario} {kind} {seed}", number, 66 + len(METHODS))
            if (scenario, kind, seed) in done:
                continue
            probe = Probe(original, model, w.task, w.split(scenario), refs, cache=store)
            if id(original) not in trials:
                trials[id(original)] = selftest(probe, default_rules(probe))
            rows, seconds = [], {}
            for check in CHECKS:
                start = time.process_time()
                rows += [{**asdict(r), "check": check} for r in audit(probe, [check])]
                seconds[check] = time.process_time() - start
            usable = {t.name: t.rule for t in trials[id(original)] if t.usable}
            cell = {
                "world": name,
                "digest": w.digest,
                "scenario": scenario,
                "truth": truth,
                "kind": kind,
                "seed": seed,
                "seconds": seconds,
                "rows": rows,
                "rules": usable,
            }
            done[scenario, kind, seed] = cell
            with path.open("a") as f:
                f.write(json.dumps(cell) + "\n")
    cells = list(done.values())
    (path.parent / f"{name}-power.md").write_text(markdown(cells))
    return cells


def values(cells: Sequence[Mapping[str, Any]], row: str) -> Tensor:
    """(N,) the row's value in each cell, nan where it was not measured."""
    found = [next((r["value"] for r in c["rows"] if r["name"] == row), None) for c in cells]
    return torch.tensor([math.nan if v is None else v for v in found], dtype=torch.double)


def strangeness(gone: Tensor, x: Tensor) -> Tensor:
    """(N,) |x - median(gone)| in median absolute deviations of the models that are gone: how unlike a retrained model a value is."""
    centre = gone.median()
    return (x - centre).abs() / (gone - centre).abs().median().clamp(min=1e-9)


def powers(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per row: AUC of telling kept from gone, power at 5 % false alarms with its interval, records needed, cost, and the row it repeats.

    Centre and spread come from one half of the retrained models, the threshold and the rates from the other half.
    """
    gone, kept = ([c for c in cells if c["truth"] == t] for t in ("gone", "kept"))
    names = list(dict.fromkeys(r["name"] for c in cells for r in c["rows"] if not r["name"].startswith(SAME)))
    out, seen = [], {}
    for name in names:
        a, b = values(gone, name), values(kept, name)
        fit, test = a[0::2], a[1::2]
        if torch.isnan(torch.cat([a, b])).any() or len(fit) < 2:
            continue
        s_gone, s_kept = strangeness(fit, test), strangeness(fit, b)
        cut = float(s_gone.sort().values[min(len(s_gone) - 1, math.ceil(0.95 * len(s_gone)) - 1)])
        hits = int((s_kept > cut).sum())
        power, low, high = wilson(hits, len(b))
        missed = sorted({c["kind"] for c, s in zip(kept, s_kept, strict=True) if s <= cut})
        check = next(r["check"] for c in cells for r in c["rows"] if r["name"] == name)
        seconds = sum(c["seconds"].get(check, 0.0) for c in cells) / len(cells)
        seen[name] = torch.cat([s_gone, s_kept])
        area = auc(s_kept, s_gone)
        n = max(r["n"] for c in cells for r in c["rows"] if r["name"] == name)
        out.append(
            {"row": name, "check": check, "auc": area[0], "auc_low": area[1], "power": power, "low": low, "high": high, "seconds": seconds, "missed": missed,
             "needed": needed(n, float(s_kept.median()))}
        )  # fmt: skip
    out.sort(key=lambda r: (-r["power"], -r["auc"], r["seconds"]))
    for k, r in enumerate(out):
        twin = max(out[:k], key=lambda q: _rank_correlation(seen[q["row"]], seen[r["row"]]), default=None)
        r["repeats"] = twin["row"] if twin is not None and _rank_correlation(seen[twin["row"]], seen[r["row"]]) > 0.95 else ""
    return out


def needed(n: int, distance: float) -> float:
    """Records at which the median model that is not gone would lie 2 x 1.645 standard deviations off, 5 % errors on either side.

    n          records behind the row; nan for a row that is one number per model
    distance   of that model, in median absolute deviations of models that are gone at n; their spread is taken to shrink as 1 / sqrt(n)

    >>> needed(100, 1.4826 * 3.29), needed(100, 0.0)
    (100.0, inf)
    """
    if n <= 1:
        return math.nan
    return math.inf if distance <= 0 else float(math.ceil(round(n * (2 * Z * 1.4826 / distance) ** 2, 1)))


def _rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's; 0 where one of them is constant."""
    from scipy.stats import spearmanr

    return 0.0 if float(a.std()) == 0 or float(b.std()) == 0 else float(spearmanr(a.numpy(), b.numpy()).statistic)


SAME = ("cost.", "accuracy.class", "klom_before.", "klom_floor.", "kl_floor.", "js_floor.")
"""Rows that are left out of the table: cost, single classes, and what does not depend on the candidate."""

ANSWERS = ("accuracy.", "drop.", "membership.")
"""Rows that only look at what the model answers."""

GATES: dict[str, Callable[[Mapping[str, str]], Mapping[str, str]]] = {
    "default": lambda rules: rules,
    "answers alone": lambda rules: {n: r for n, r in rules.items() if n.startswith(ANSWERS)},
    "without relearning": lambda rules: {n: r for n, r in rules.items() if n != "gap_closed.relearning"},
    "without KLOM": lambda rules: {n: r for n, r in rules.items() if "klom" not in n},
    "strict": lambda rules: {n: STRICT.get(n, r) for n, r in rules.items()},
}
"""Gate -> its rules, made of the default ones."""

STRICT = {"gap_closed.relearning": ">= 0.8", "gap_closed.klom": ">= 0.8", "klom_ratio.forget": "<= 2"}
"""What a strict gate asks for in place of the default rules."""


def accepted(cell: Mapping[str, Any], rules: Mapping[str, str]) -> bool:
    """Whether a gate of these rules takes the model: all hold, and one of them measures forgetting."""
    known = {"value", "low", "high", "name", "n", "note", "indicative", "at"}
    rows = [Row(**{k: v for k, v in r.items() if k in known}) for r in cell["rows"]]
    return not gate(rows, rules) and any(not n.startswith(UTILITY) for n in rules)


def gates(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per gate: shares of gone and of kept models it takes with one-sided 95 % bounds, the kinds it takes wrongly, CPU seconds of its checks."""
    out = []
    for name, of in GATES.items():
        took = {t: [c for c in cells if c["truth"] == t and accepted(c, of(c["rules"]))] for t in ("gone", "kept", "open")}
        count = {t: sum(c["truth"] == t for c in cells) for t in took}
        used = {r["check"] for c in cells for r in c["rows"] if r["name"] in of(c["rules"])}
        seconds = sum(c["seconds"].get(check, 0.0) for c in cells for check in used) / max(1, len(cells))
        passed = Counter(c["kind"] for c in took["kept"])
        out.append({"gate": name, "gone": wilson(len(took["gone"]), count["gone"]), "kept": wilson(len(took["kept"]), count["kept"]), "seconds": seconds,
                    "passes": [f"{k} {n}" for k, n in passed.items()], "open": [c["kind"] for c in took["open"]]})  # fmt: skip
    return out


def _count(n: float) -> str:
    return "-" if math.isnan(n) else "any" if n <= 1 else f"{n:,.0f}" if n <= 100_000 else "more than 100,000"


def markdown(cells: Sequence[Mapping[str, Any]]) -> str:
    """Per scenario the table of checks, strongest first."""
    out = []
    for key in dict.fromkeys((c["world"], c["scenario"]) for c in cells):
        mine = [c for c in cells if (c["world"], c["scenario"]) == key]
        count = {t: sum(c["truth"] == t for c in mine) for t in ("gone", "kept")}
        out.append(f"### {key[0]}, {key[1]}: {count['gone']} models that are gone, {count['kept']} that are not\n")
        out.append("| gate | takes models that are gone | takes models that are not | wrongly taken | methods taken | CPU s |\n|---|---|---|---|---|---|")
        for g in gates(mine):
            shares = [f"{v:.3f} ({low:.3f} to {high:.3f})" for v, low, high in (g["gone"], g["kept"])]
            out.append(
                f"| {g['gate']} | {shares[0]} | {shares[1]} | {', '.join(g['passes']) or 'none'} | {', '.join(g['open']) or 'none'} | {g['seconds']:.2f} |"
            )
        rules = "; ".join(f"{n} {r}" for n, r in mine[0]["rules"].items())
        out.append(f"\nUsable default rules on the first original: {rules}.\n")
        out.append("| row | power at 5 % false alarms | AUC | records needed | CPU s | misses | repeats |\n|---|---|---|---|---|---|---|")
        for r in powers(mine):
            missed = ", ".join(r["missed"]) or "none"
            power = f"{r['power']:.2f} ({r['low']:.2f} to {r['high']:.2f})"
            out.append(f"| {r['row']} | {power} | {r['auc']:.2f} | {_count(r['needed'])} | {r['seconds']:.2f} | {missed} | {r['repeats']} |")
        out.append("")
    return "\n".join(out)
