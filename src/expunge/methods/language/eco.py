"""ECO: a classifier flags prompts about what must go, and their input embeddings are corrupted; weights stay as they are.

Paper    Liu, Wang, Flanigan, Liu, "Large Language Model Unlearning via Embedding-Corrupted Prompts", NeurIPS 2024, arXiv:2406.07933.
Code     chrisliu298/llm-unlearn-eco, no licence, commit 9b0ba1a (read only).
Forgets  records.          Needs    forget, retain; validation unless strength is given.
Scope    none.   Forget  corruption of the embeddings of flagged prompts.   Retain  unflagged prompts pass bit for bit.
Update   logistic regression; zeroth-order search for the strength.   Leaves  Hook (a suppression: the weights still hold what they knew).
Settings
    corruption       zero_out_top_k or flip_sign (on the dimensions with the largest |e| of each token), or rand_noise_first_n
    strength         share b of the dimensions; of noise, standard deviations of the embeddings; 0 searches for b in 0..1 (noise: b / (1 - b) deviations)
    first            dimensions that get noise
    select           tokens of the prompt that are corrupted: all_but_last or all
    layer            what the classifier reads: 0 the input embeddings, k the output of block k; averaged over the prompt
    false_positives  share of held-out other prompts that may be flagged; sets the threshold
    steps            of the search
    lr               step size of the search; large as it is, what counts is the sign of the slope and `eps`
    eps              half the distance of its two points; no step is longer than the whole
    batch_size       records per forward pass of the search
Differs  The published classifier is RoBERTa, trained on the very questions that are scored, with thresholds fixed by hand; here it is linear on the
         model's own states, and its threshold comes from prompts held out of retain, and from validation. The published search for WMDP scores the test
         questions; here it compares the loss on forget answers with the model's loss on validation answers, which it never saw:
         f(b) = |loss(b) / loss_validation - 1|, from b = .5 on, and the best point that was looked at is taken. Steps are cut to 2 eps, and halved when
         the slope turns. Published code corrupts prompt and answer when an answer is scored, and only the first pass of a generation; here the prompt
         alone, always. Noise is drawn once and kept in the patch, so that an answer does not change from one call to the next. Names are not picked out
         by an NER model.
Check
    >>> import torch
    >>> from expunge.parts.updates.zeroth import search
    >>> from expunge.modalities.language.guards.corrupt import corrupted
    >>> round(search(lambda b: (b - 2) ** 2, 1.0, lr=0.1, eps=0.1, steps=1)[1][-1], 6)
    1.2
    >>> corrupted(torch.tensor([1.0, -3.0, 2.0]), "zero_out_top_k", 1 / 3)
    tensor([1., 0., 2.])
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from expunge.core.edits import Hook
from expunge.core.errors import SettingError, SplitError
from expunge.core.hooks import attach
from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.types import Split, Task
from expunge.modalities.language.guards.corrupt import CORRUPTIONS, SELECT
from expunge.modalities.language.guards.gate import trained
from expunge.modalities.language.remember import passes
from expunge.modalities.language.texts import Texts
from expunge.parts.updates.zeroth import search

LACKS = "the search for the strength needs validation data; give some, or set strength"
ROWS = 256
"""Tokens of a prompt that get noise of their own; longer prompts start again."""


def _cost(n, s) -> tuple[float, float]:
    gate = n["forget"] + n["retain"] + n.get("validation", 0)
    return gate + (0 if s["strength"] else 2 * s["steps"] * n["forget"] + n.get("validation", 0)), 0


def _asks(s) -> dict[str, str]:
    return {} if s["strength"] else {"validation": LACKS}


@method(
    paper="arXiv:2406.07933", tasks=("causal_lm",), needs=("forget", "retain"), cost=_cost, asks=_asks, toy={}, forgets=("records",), assurance="suppression",
    place="code: chrisliu298/llm-unlearn-eco; the number of dimensions is searched per model",
    lacks="on tofu-tiny it is still told from a model that never knew: D is 1.75 of its critical value, a second gold model's 0.50 (seed 0 alone)",
)  # fmt: skip
def eco(
    model: nn.Module, task: Task, split: Split, *, corruption: str = "zero_out_top_k", strength: float = 0.0, first: int = 1, select: str = "all_but_last",
    layer: int = 0, false_positives: float = 0.01, steps: int = 10, lr: float = 100.0, eps: float = 0.0999, batch_size: int = 16, seed: int = 0,
) -> Patch:  # fmt: skip
    """See the module's docstring."""
    for name, value, known in (("corruption", corruption, CORRUPTIONS), ("select", select, SELECT)):
        if value not in known:
            raise SettingError(f"{name} must be one of {', '.join(known)}, not '{value}'")
    if strength < 0 or first < 1:
        raise SettingError(f"strength must be 0 or larger and first 1 or larger; found {strength:g} and {first}")
    if not strength and split.validation is None:
        raise SplitError(LACKS)
    line, config = trained(model, task, split, layer, target=false_positives, seed=seed)
    embed: Any = model.get_input_embeddings()  # pyright: ignore
    unit, tensors = 1.0, {"weight": line.weight, "bias": line.bias}
    if corruption == "rand_noise_first_n":
        unit = float(embed.weight.detach().float().std())
        tensors["noise"] = torch.randn(ROWS, min(first, embed.weight.shape[1]), generator=torch.Generator().manual_seed(seed))
    config |= {"corruption": corruption, "select": select}

    def hook(b: float, **changed: Any) -> Hook:
        return Hook(f"eco-{split.forget.digest[:8]}", "corrupt", tensors, {**config, "strength": b * unit, **changed})

    def scale(b: float) -> float:
        return b / max(1e-3, 1 - b) if corruption == "rand_noise_first_n" else b

    if not strength:
        goal = loss(model, task, split.validation, batch_size)

        def f(b: float) -> float:
            undo = attach(model, hook(scale(b), threshold=-1e30))
            try:
                return abs(loss(model, task, split.forget, batch_size) / goal - 1)
            finally:
                attach(model, undo)

        strength = scale(search(f, 0.5, lr=lr, eps=eps, steps=steps, most=2 * eps, high=1.0)[0])
    return Patch((hook(strength),))


def loss(model: nn.Module, task: Task, data: Texts, size: int) -> float:
    """Mean loss per target token over all records."""
    found = [(float(out.nll.sum()), float(out.count.sum())) for _, _, out in passes(model, task, data, size)]
    return sum(a for a, _ in found) / sum(b for _, b in found)
