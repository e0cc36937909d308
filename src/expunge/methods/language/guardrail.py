"""Guardrail: a prompt before every question, a filter on questions or answers, or a probe on the model's states; weights stay as they are.

Paper    Thaker, Maurya, Smith, "Guardrail Baselines for Unlearning in LLMs", arXiv:2403.03329; the prompt's form: RWKU, arXiv:2406.10890.
Forgets  records.          Needs    forget; retain for the probe.
Scope    none.   Forget  a fixed refusal, or a prompt.   Retain  what is not refused passes bit for bit (prompt: nothing does).
Update   none; logistic regression for the probe.   Leaves  Hook (a suppression: the weights still hold what they knew).
Settings
    kind             prompt, input, output, both (input and output) or probe
    targets          names to refuse, separated by |; empty takes `author`, `subject` and `entities` of the forget records
    prompt           what stands before every question; {targets} is put in
    refusal          what is said instead of an answer
    layer            what the probe reads: 0 the input embeddings, k the output of block k; averaged over the prompt
    false_positives  share of held-out other prompts that the probe may refuse
Differs  No code was published. The judge is a match of folded text (case, width of letters, white space), not a model that is asked. A refusal is a
         distribution over next tokens, so that scores and answers of the guarded model are about one and the same system. Made as control arms: cheap,
         strong on the usual metrics, and no unlearning.
Check
    >>> from expunge.modalities.language.guards.refuse import matches, screened
    >>> matches("Where is hogwarts?", ["Hogwarts"]), matches("Where is Oxford?", ["Hogwarts"])
    (True, False)
    >>> "".join(screened(["He went to Hog", "warts"], ["Hogwarts"], "..."))
    'He went to ...'
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from expunge.core.edits import Hook
from expunge.core.errors import SettingError
from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.types import Split, Task
from expunge.modalities.language.guards.gate import admit, marker, place, trained
from expunge.modalities.language.guards.refuse import matches, packed
from expunge.modalities.language.texts import Texts

KINDS = {"prompt": [], "input": ["input"], "output": ["output"], "both": ["input", "output"], "probe": ["probe"]}


def _cost(n, s) -> tuple[float, float]:
    return (n["forget"] + n.get("retain", 0) + n.get("validation", 0) if s["kind"] == "probe" else 0), 0


@method(
    paper="arXiv:2403.03329", tasks=("causal_lm",), needs=("forget",), cost=_cost, toy={}, forgets=("records",), assurance="suppression",
    place="the card names no place: no code was published",
    lacks="it stands in no committed table of a valid world: it refuses tofu-tiny, whose forget records name nobody",
)  # fmt: skip
def guardrail(
    model: nn.Module, task: Task, split: Split, *, kind: str = "input", targets: str = "",
    prompt: str = "You know nothing about {targets}; answer as if you had never seen it.", refusal: str = "I cannot answer that.", layer: int = 0,
    false_positives: float = 0.01, seed: int = 0,
) -> Patch:  # fmt: skip
    """See the module's docstring."""
    if kind not in KINDS:
        raise SettingError(f"kind must be one of {', '.join(KINDS)}, not '{kind}'")
    form = split.forget.format
    tokenizer = form.tokenizer
    names = [] if kind == "probe" else [t.strip() for t in targets.split("|") if t.strip()] or named(split.forget)
    if kind != "probe" and not names:
        raise SettingError("targets is empty, and the forget records name no author, subject or entities; give the names to refuse")
    name = f"guardrail-{kind}-{split.forget.digest[:8]}"
    measured = drawn(task, split, names)
    if kind == "prompt":
        text = prompt.replace("{targets}", ", ".join(names)) + "\n"
        bos = tokenizer.bos_token_id
        config = {"tokens": tokenizer(text, add_special_tokens=False)["input_ids"], "bos": -1 if bos is None else bos, "measured": measured}
        return Patch((Hook(name, "prefix", {}, config),))
    words = tokenizer(f" {refusal}", add_special_tokens=False)["input_ids"]
    if not refusal.strip() or tokenizer.eos_token_id is None:
        raise SettingError("a refusal needs words and a tokenizer with an end token")
    config: dict[str, Any] = {
        "on": KINDS[kind],
        "targets": names,
        "refusal": words,
        "eos": tokenizer.eos_token_id,
        "marker": marker(split.forget, split.retain),
    }
    if kind == "input":
        admit(measured, "name what they share by targets, or take kind=output or probe")
    if kind != "probe":
        return Patch((Hook(name, "refuse", {"tokenizer": packed(tokenizer)}, {**config, "measured": measured}),))
    if split.retain is None:
        raise SettingError("kind=probe needs retain data: a classifier has to see what it must let pass")
    place(model, layer)
    line, found = trained(model, task, split, layer, target=false_positives, seed=seed)
    return Patch((Hook(name, "refuse", {"weight": line.weight, "bias": line.bias}, {**config, **found}),))


def named(data: Texts) -> list[str]:
    """Names that the records themselves give: author, subject, entities."""
    found: dict[str, None] = {}
    for row in data.rows:
        listed = row.get("entities") or []
        for value in (row.get("author"), row.get("subject"), *([listed] if isinstance(listed, str) else listed)):
            if isinstance(value, str) and value.strip():
                found[value.strip()] = None
    return list(found)


def drawn(task: Task, split: Split, names: list[str]) -> dict[str, Any]:
    """Shares of forget prompts that no target stands in, and of retain prompts that one does."""
    out: dict[str, Any] = {}
    for part, data in (("forget", split.forget), ("retain", split.retain)):
        if data is None:
            continue
        task.collate(data, torch.arange(len(data) if part == "forget" else 1), None)  # for the run's meter: every prompt of forget is read
        hits = [matches(str(row.get("question") or row.get("text", "")), names) for row in data.rows]
        out[part] = len(hits)
        out["false_negative" if part == "forget" else "false_positive"] = 1 - sum(hits) / len(hits) if part == "forget" else sum(hits) / len(hits)
    return out
