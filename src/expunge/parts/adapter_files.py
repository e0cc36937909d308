"""PEFT adapter folders: a patch that is low rank throughout goes out as one, and one over a model comes in as a patch.

An adapter over an adapter is written as one over the first's own base, with both side by side: s B A + s' B' A' = [s B, s' B'] [A; A']. Plain peft loads one
folder over one base; of two it would take the second alone.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from expunge.core.edits import LowRank
from expunge.core.errors import ModelError, first_line
from expunge.core.patch import Patch
from expunge.parts.scopes.lora import factors, stacked


def wrapped(model: nn.Module, patch: Patch, base: str) -> Any:
    """The model under a PeftModel whose adapter is the patch: what its `save_pretrained` writes is the adapter folder. The model is changed: give a copy."""
    from peft import LoraConfig, PeftModel

    edits = {e.name: e for e in patch.edits if isinstance(e, LowRank)}
    ranks, first = {n: e.down.shape[-2] for n, e in edits.items()}, next(iter(edits.values()))
    stacks = sorted(n for n, e in edits.items() if e.up.ndim == 3)
    alphas = {n: e.scale * ranks[n] for n, e in edits.items()}
    r, alpha = ranks[first.name], alphas[first.name]
    config = LoraConfig(
        r=r, lora_alpha=alpha, target_modules=sorted(n.removesuffix(".weight") for n in edits if n not in stacks), target_parameters=stacks or None,  # pyright: ignore
        rank_pattern={_layer(n): k for n, k in ranks.items() if k != r}, alpha_pattern={_layer(n): k for n, k in alphas.items() if k != alpha},
        task_type="CAUSAL_LM", base_model_name_or_path=base,
    )  # fmt: skip
    owners = {n: model.get_submodule(n.rpartition(".")[0]) for n in edits}
    turned = {n for n, m in owners.items() if type(m).__name__ == "Conv1D"}
    config.fan_in_fan_out = len(turned) == len(edits)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            over: Any = PeftModel(model, config)
    except (ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"peft takes no adapter of this form on {type(model).__name__}: {first_line(error)}") from None
    over.peft_config["default"].inference_mode = True
    found = named(over)
    if missing := sorted(edits.keys() - found.keys()):
        raise ModelError(f"peft would not adapt {missing[0]} of {type(model).__name__} where it loads the folder: release it merged")
    with torch.no_grad():
        for name, edit in edits.items():
            a, b = factors(edit, owners[name], name in turned)
            for layers, value in ((found[name].lora_A, a), (found[name].lora_B, b)):
                if layers["default"].weight.shape != value.shape:
                    raise ModelError(f"peft holds {name} in another shape than {tuple(value.shape)}: release it merged")
                layers["default"].weight = nn.Parameter(value.contiguous().clone())
    return over


def _layer(name: str) -> str:
    return f"^{re.escape(name.removesuffix('.weight'))}$"


def named(over: Any) -> dict[str, Any]:
    """Parameter of the model under a PeftModel -> peft's layer over it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = {}
    for name, module in over.base_model.model.named_modules():
        if isinstance(module, BaseTunerLayer):
            found[f"{name.replace('.base_layer', '')}.{getattr(module, 'parameter_name', 'weight')}"] = module
    return found


def read(base: nn.Module, folder: Path) -> Patch:
    """The adapter of a folder as low-rank edits of its base, which is changed. Raises ModelError for an adapter that is more than that (another method,
    DoRA, biases, whole modules, embeddings)."""
    from peft import PeftModel

    over: Any = PeftModel.from_pretrained(base, folder, local_files_only=True)
    config = over.peft_config["default"]
    more = {"its method is no LoRA": str(config.peft_type.value) != "LORA"}
    more |= {f"it has {n}": bool(getattr(config, n, None)) for n in ("use_dora", "modules_to_save", "lora_bias", "trainable_token_indices")}
    more["it has biases"] = getattr(config, "bias", "none") != "none"
    if why := next((w for w, holds in more.items() if holds), ""):
        raise ModelError(f"{folder.name} is an adapter that cannot be joined with another ({why}): release it merged")
    edits = []
    for name, layer in named(over).items():
        if "default" not in layer.lora_A:
            raise ModelError(f"{folder.name} adapts the embedding {name}, which cannot be joined with another adapter: release it merged")
        if hasattr(layer, "get_param"):
            edits.append(stacked(name, layer, "default"))
            continue
        a, b, scale = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach(), float(layer.scaling["default"])
        turned = type(layer.get_base_layer()).__name__ == "Conv1D"
        edits.append(LowRank(name, *((a.mT.clone(), b.mT.clone()) if turned else (b.clone(), a.clone())), scale))
    return Patch(tuple(edits))


def joined(first: Patch, second: Patch) -> Patch:
    """Both patches as low-rank edits side by side, in float32 or the wider of their types."""
    found: dict[str, list[LowRank]] = {}
    for edit in (*first.edits, *second.edits):
        assert isinstance(edit, LowRank)
        found.setdefault(edit.name, []).append(edit)

    def one(name: str, edits: list[LowRank]) -> LowRank:
        if len(edits) == 1:
            return edits[0]
        ups, downs = [e.scale * e.up.float() for e in edits], [e.down.float() for e in edits]
        return LowRank(name, torch.cat(ups, -1), torch.cat(downs, -2))

    return Patch(tuple(one(n, edits) for n, edits in found.items()))
