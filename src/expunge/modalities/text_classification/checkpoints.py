"""Text classifiers in folders: what `save_pretrained` wrote comes in, and what plain transformers loads goes out.

Weights are read from safetensors alone, no code of the folder is run, nothing is looked up on a network, and no weight is drawn: a folder without a trained
head is refused.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from expunge.core.errors import ModelError, SettingError, first_line
from expunge.core.files import json_object, whole
from expunge.core.machine import devices
from expunge.core.patch import Patch
from expunge.modalities.quietly import fitting, quietly

KINDS = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16}
"""What `dtype` may be."""

ENDING, MOST = "ForSequenceClassification", 512
"""How the architecture of a text classifier ends, and the most tokens of a text where nobody says how many."""

LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def needed() -> None:
    """Raises ModelError when transformers is missing."""
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ModelError(f"text classifiers need {error.name}: pip install 'expunge[text]'") from None


def configured(folder: Path | str) -> dict[str, Any]:
    """The folder's config.json. Raises ModelError where there is none, or none of a text classifier."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelError(f"no folder {folder.name}; name one that save_pretrained wrote")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder.name} holds no config.json: it is no folder that save_pretrained wrote")
    found = json_object(folder / "config.json", ModelError)
    kinds = found.get("architectures")
    kinds = kinds if isinstance(kinds, list) and kinds else ["nothing that its configuration names"]
    if not any(str(kind).endswith(ENDING) for kind in kinds):
        raise ModelError(f"{folder.name} holds {kinds[0]}, no text classifier: its head would be drawn at random; fine-tune it as one ({ENDING}) first")
    return found


def classes(folder: Path | str) -> dict[str, int]:
    """Name -> number of the classes, from the folder's configuration alone; LABEL_0 and LABEL_1 where it names none, as transformers has it."""
    found = configured(folder)
    named = {str(name): int(number) for number, name in (found.get("id2label") or {}).items()}
    return named or {str(k): int(v) for k, v in (found.get("label2id") or {"LABEL_0": 0, "LABEL_1": 1}).items()}


def load(folder: Path | str, *, dtype: str = "auto", finite: bool = True) -> tuple[nn.Module, Any]:
    """(model in eval mode, tokenizer) of a folder. `dtype`: auto (as stored), float32 or bfloat16.

    Raises ModelError for a folder that holds no text classifier, pickled weights, weights that lack some of the model's (its head, say) or have others, that
    are not finite (unless `finite` is False: then the audit says so), a model of one number or of several labels per text, or no tokenizer.
    """
    needed()
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = Path(folder)
    if dtype not in KINDS:
        raise ModelError(f"dtype must be one of {', '.join(KINDS)}, not '{dtype}'")
    configured(folder)
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"{folder.name} holds no safetensors weights (pickles can run code and are not read): save it with save_pretrained")
    try:
        with quietly():
            found: Any = AutoModelForSequenceClassification.from_pretrained(folder, use_safetensors=True, dtype=KINDS[dtype], output_loading_info=True, **LOCAL)
            model, info = found
            tokenizer = AutoTokenizer.from_pretrained(folder, **LOCAL)
            for how in ("is_local", "local_files_only", "trust_remote_code"):  # else they are saved with it
                tokenizer.init_kwargs.pop(how, None)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise ModelError(f"cannot load {folder.name}: {first_line(error)}") from None
    fitting(folder.name, info, "would be drawn at random; it is no trained text classifier")
    for name, p in model.named_parameters():
        if finite and not torch.isfinite(p).all():
            raise ModelError(f"{folder.name} holds values of {name} that are not finite")
    if model.config.num_labels < 2 or model.config.problem_type in ("regression", "multi_label_classification"):
        kind = model.config.problem_type or "one output"
        raise ModelError(f"{folder.name} gives {kind}, no one class per text; this task is for models with a class per text")
    if model.config.get_text_config().pad_token_id is None and tokenizer.pad_token_id is None:
        raise ModelError(f"{folder.name} has no padding token; set pad_token and config.pad_token_id, and save it again")
    return model.eval(), tokenizer


def skeleton(folder: Path | str) -> nn.Module:
    """The model of a folder without its weights, on the meta device: names and shapes, for what can be told from them alone."""
    needed()
    from transformers import AutoConfig, AutoModelForSequenceClassification

    configured(folder)
    try:
        with devices.EMPTY, quietly():
            return AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(folder, **LOCAL), trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"cannot read the configuration of {Path(folder).name}: {first_line(error)}") from None


def limit(model: nn.Module, tokenizer: Any, wanted: int = 0) -> int:
    """Tokens that a text is cut to: `wanted`, or for 0 as many as model and tokenizer take, at most MOST. Raises SettingError for more than they take."""
    config: Any = model.config
    most = min(int(getattr(config, "max_position_embeddings", 0) or MOST), int(min(getattr(tokenizer, "model_max_length", MOST) or MOST, 1 << 30)))
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            most = min(most, module.num_embeddings - module.padding_idx - 1)  # RoBERTa counts from behind the padding
    if wanted < 0 or wanted > most:
        raise SettingError(f"max_length must be 0 (the model's own limit) to {most}, which the model takes, not {wanted}")
    return wanted or min(most, MOST)


def release(model: nn.Module, tokenizer: Any, patch: Patch, out: Path | str, *, undo: Path | None = None, key: bytes | None = None) -> Path:
    """Write the model with the patch in its weights, and its tokenizer, to the folder `out`, and return it.

    undo   file for the inverse patch (signed with `key`), which takes the folder back to the weights of `model`, bit for bit
    Raises PatchError for a patch that was made for another model, ModelError where the folder cannot be written.
    """
    twin = copy.deepcopy(model)
    inverse = patch.apply(twin)
    with whole(out, over=True) as made:
        save(twin, tokenizer, made)
        if undo is not None:
            inverse.save(undo, key)
    return Path(out)


def plain(folder: Path | str) -> nn.Module:
    """What transformers makes of a released folder when it is told nothing but its place. Raises ModelError."""
    from transformers import AutoModelForSequenceClassification

    try:
        with quietly():
            return AutoModelForSequenceClassification.from_pretrained(folder, **LOCAL).eval()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"the released folder cannot be loaded back: {first_line(error)}") from None


def save(model: nn.Module, tokenizer: Any, out: Path | str) -> Path:
    """Write model and tokenizer as a folder that transformers loads, whole or not at all. A folder of that name is replaced if it holds the same files;
    one that holds anything else is left alone (ModelError)."""
    with whole(out, over=True) as made, quietly():
        model.save_pretrained(made)  # pyright: ignore
        tokenizer.save_pretrained(made)
    return Path(out)
