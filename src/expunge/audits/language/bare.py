"""What a guard hides: the same questions to the same model with its guards on and off. For guarded models only; a model without guards gets no row.

bare.probability     forget answers, per-token probability exp(-nll) averaged over records, guards off: what the weights still hold
bare.hidden          the same with guards off minus with guards on, record by record: how much of it the guards keep back
bare.exact           share of forget answers that greedy decoding gives word for word, guards off;    bare.exact_guarded: guards on
bare.missed          share of forget prompts that no gate flags;    bare.missed_paraphrased: of the same questions in other words
bare.false_alarm     share of retain prompts that some gate flags

The last three are there where a guard decides row by row. A guard is a suppression whatever these rows say.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from expunge.audits.core import Probe, Row
from expunge.audits.language.tokens import part, seen, token_scores
from expunge.core import hooks as wraps
from expunge.core.guard import quiet
from expunge.core.hooks import gates, guards
from expunge.core.registry import check
from expunge.core.stats import bootstrap_mean, wilson
from expunge.core.types import device_of
from expunge.modalities.language.task import buckets, collate, generate
from expunge.modalities.language.texts import Texts


@check(tasks=("causal_lm",), needs=("forget",))
def bare(p: Probe) -> list[Row]:
    """Rows bare.*, see the module's docstring."""
    model, data = p.after, p.split.forget
    if not guards(model):
        return []
    n, names = len(data), ", ".join(guards(model))
    on = (-seen(p, model, "forget").nll).exp()
    with wraps.bare(model):
        off = (-token_scores(model, p.task, data).nll).exp()
    rows = [
        Row("bare.probability", float(off.mean()), *bootstrap_mean(off, p.seed), n, f"guards off: {names}"),
        Row("bare.hidden", float((off - on).mean()), *bootstrap_mean(off - on, p.seed), n, "guards off minus on; the weights did not change", indicative=True),
    ]
    with wraps.bare(model):
        rows.append(Row("bare.exact", *wilson(int(exact(model, data).sum()), n), n, "greedy answer equals the record's, guards off"))
    rows.append(Row("bare.exact_guarded", *wilson(int(exact(model, data).sum()), n), n, "the same with guards on", indicative=True))
    if not gates(model):
        return rows
    sides = [("bare.missed", data, False), ("bare.false_alarm", part(p, "retain"), True), ("bare.missed_paraphrased", paraphrased(data), False)]
    for name, texts, wrong in sides:
        if texts is not None:
            hits = int((flags(model, texts) == wrong).sum())
            rows.append(Row(name, *wilson(hits, len(texts)), len(texts), "forget prompts, which the gate was made from" if name == "bare.missed" else ""))
    return rows


def exact(model: nn.Module, data: Texts) -> Tensor:
    """(N,) bool: greedy decoding gives the target tokens and then ends."""
    prompts = [t[: int(y.float().argmax())] for t, y in zip(data.tokens, data.targets, strict=True)]
    wanted = [t[y] for t, y in zip(data.tokens, data.targets, strict=True)]
    eos = data.format.tokenizer.eos_token_id
    found = generate(model, prompts, new=max(len(w) for w in wanted), eos=eos)
    return torch.tensor([torch.equal(a, w[:-1] if len(w) and int(w[-1]) == eos else w) for a, w in zip(found, wanted, strict=True)])


def flags(model: nn.Module, data: Texts, size: int = 32) -> Tensor:
    """(N,) bool: some gate of the model's guards flags the row."""
    out = torch.zeros(len(data), dtype=torch.bool)
    device = device_of(model)
    for rows in buckets([len(t) for t in data.tokens], size):
        batch = collate(data, rows, None)
        for it, gate in gates(model):
            with quiet(model):
                out[rows] |= gate(model, it, batch["x"].to(device), batch["n"].to(device))[1].cpu()
    return out


def paraphrased(data: Texts) -> Texts | None:
    """The records that have a `paraphrased_question`, asked by it; None when none has."""
    have = [k for k, row in enumerate(data.rows) if row.get("paraphrased_question")]
    if not have:
        return None
    return data.format.texts([{**data.rows[k], "question": data.rows[k]["paraphrased_question"]} for k in have], data.ids[have])
