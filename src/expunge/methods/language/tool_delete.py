"""ToolDelete: train a forgotten tool's requests on the answers of a model that never had tools, and the kept tools' on their own.

Paper    Cheng, Amiri, "Tool Unlearning for Tool-Augmented LLMs", ICML 2025, arXiv:2502.01083.
Forgets  records (demonstrations of tools: `data.language.tools.select` splits by tool).
         Needs    forget; retain unless retain=none; anchor (tool-free answers) or tool_free.
Scope    all weights, LoRA or named layers.   Forget  CE(Y' | Q), Y' = f_0(Q) the answer of the tool-free model f_0, greedy, asked once.
Retain   CE on the kept tools' demonstrations.   Update  AdamW on paired batches, then theta <- theta + shift (theta_0 - theta_R) or
         theta + shift (theta_0 - theta).   Leaves  Replace or LowRank.
Settings
    tool_free  weights of f_0: a safetensors file of the state dict, or a folder that save_pretrained wrote; empty: split.anchor holds its answers
    new        longest answer of f_0, in tokens
    shift      size of the step towards general capability after training; 0 leaves it out
    toward     of that step: free (interpolate to theta_0) or random (the published theta_0 - theta_R)
    draw       seed of theta_R, the freshly initialised weights
Differs  No code was found; the paper is known here by its abstract and by a summary. The published step adds shift * theta_0 and as much noise, of the size of
         shift * |theta_R|, and moves away from theta even where nothing was lost: the interpolation does neither, and shift is 0 unless asked
         for. The form with DPO is left out: its losses could not be verified. An answer of f_0 that holds the call (f_0 has the tool) is refused.
         Whether the tool is gone per tool (LiRA-Tool) is a question for the audits, as is the tool's documentation in the prompt, which brings it back.
Check
    >>> import torch
    >>> theta = torch.tensor([1.0, 2.0])
    >>> capable(theta, torch.tensor([0.5, 1.0]), torch.tensor([0.1, -0.1]), 0.1)
    tensor([1.0400, 2.1100])
    >>> capable(theta, torch.tensor([0.5, 1.0]), theta, 0.1)
    tensor([0.9500, 1.9000])
"""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from expunge.core.errors import ModelError, SettingError, SplitError
from expunge.core.patch import Patch
from expunge.core.registry import method, retaining
from expunge.core.types import Split, Task, device_of, float_of
from expunge.data.language.answers import given, remembered, texts
from expunge.data.language.rewrite import Generator, Wanted, local, rewrite
from expunge.modalities.files.models import read_state
from expunge.modalities.language.checkpoints import load
from expunge.modalities.language.texts import Texts
from expunge.modalities.language.tuning import Tuning, cost, opened, tune
from expunge.parts.losses.language import pooled
from expunge.parts.training import fresh

TOWARD = ("free", "random")
LACKS = "tool_delete needs anchor, the tool-free model's answers, or tool_free, its weights"


def capable(theta: Tensor, free: Tensor, other: Tensor, shift: float) -> Tensor:
    """theta + shift (theta_0 - other): other is theta_R in the published form, theta itself in the interpolation."""
    return theta + shift * (free - other)


def without_tools(model: nn.Module, path: str) -> nn.Module:
    """f_0: the model with the weights at `path`. Raises ModelError when they do not fit."""
    place = Path(path)
    if not place.is_dir():
        twin = copy.deepcopy(model)
        twin.load_state_dict(read_state(place, model), strict=False)
        return twin.eval()
    twin, _ = load(place)
    mine, theirs = ({n: tuple(p.shape) for n, p in m.named_parameters()} for m in (model, twin))
    if other := sorted({n for n, _ in mine.items() ^ theirs.items()}):
        raise ModelError(f"the tool-free model {place.name} is of another shape: {', '.join(other[:3])}{' ...' if len(other) > 3 else ''}")
    return twin.to(device_of(model), float_of(model))


def answers(forget: Texts, generator: Generator) -> list[dict]:
    """{question, answer, record} for each record: what the tool-free model says. Raises DataError where that holds the call or the old answer."""
    wanted = [Wanted(str(row["question"]), k, row, {"question": row["question"]}) for k, row in enumerate(forget.rows)]
    return [dict(row) for row in rewrite(wanted, generator, rounds=1).rows]


def _cost(n, s) -> tuple[float, float]:
    records = n["forget"] if s["tool_free"] or "anchor" not in n else n["anchor"]
    forward, backward = cost()({**n, "forget": records}, s)
    return forward + bool(s["tool_free"]) * n["forget"], backward


def _asks(s) -> dict[str, str]:
    return {**({} if s["tool_free"] else {"anchor": LACKS}), **retaining(s)}


@method(
    paper="arXiv:2502.01083", tasks=("causal_lm",), needs=("forget",), cost=_cost, asks=_asks, toy={"lr": 1e-3, "epochs": 10}, forgets=("records",),
    place="the card names no place: no code was found, and settings were not seen",
    lacks="it stands in no committed table of a valid world: it needs demonstrations of tools",
)  # fmt: skip
def tool_delete(
    model: nn.Module, task: Task, split: Split, *, tool_free: str = "", new: int = 64, shift: float = 0.0, toward: str = "free", draw: int = 0,
    tuning: Tuning = Tuning(epochs=3.0), seed: int = 0,
) -> Patch:  # fmt: skip
    """See the module's docstring."""
    if toward not in TOWARD:
        raise SettingError(f"toward must be one of {', '.join(TOWARD)}, not '{toward}'")
    if shift and (not tool_free or tuning.lora):
        raise SettingError("shift moves the weights themselves by those of tool_free: name them, and set lora=0")
    if not tool_free and split.anchor is None:
        raise SplitError(LACKS)
    free = without_tools(model, tool_free) if tool_free else None
    if free is None:
        data = given(split, "anchor")
    else:
        form = split.forget.format
        writer = local(free, form.tokenizer, template=form.template, system=form.system, new=new, temperature=0.0)
        data = texts(split.forget, remembered(f"tool_free/{writer.digest}/{new}", model, split.forget, lambda: answers(split.forget, writer)))

    def forget(batch):
        return pooled((out := task.forward(model, batch)).nll, out, batch)

    with opened(model, tuning) as e:
        tune(model, task, split, forget, tuning, seed=seed, data=data, session=contextlib.nullcontext(e))
        if shift and free is not None:
            theirs = dict(free.named_parameters())
            random = dict(fresh(model, draw).named_parameters()) if toward == "random" else e.params
            with torch.no_grad():
                for name, p in e.params.items():
                    p.copy_(capable(p, theirs[name].to(p), random[name].to(p), shift))
    return e.patch
