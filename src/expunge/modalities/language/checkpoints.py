"""Language models in folders: what `save_pretrained` wrote comes in, and what other tools load goes out.

In: a folder of a causal model of transformers with its tokenizer, or a PEFT adapter folder over one (merged on loading). Weights are read from
safetensors alone, no code of the folder is run and nothing is looked up on a network. Out: the merged model as such a folder, or a PEFT adapter
folder where the patch is low rank.
"""

from __future__ import annotations

import copy
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from expunge.core.edits import LowRank
from expunge.core.errors import ModelError, first_line, printable
from expunge.core.files import json_object, whole
from expunge.core.machine import devices
from expunge.core.patch import Patch
from expunge.modalities.quietly import quietly

FORMS = ("auto", "merged", "peft")
KINDS = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16}
"""What `dtype` may be."""


def needed() -> None:
    """Raises ModelError when the libraries of language models are missing."""
    try:
        import peft  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ModelError(f"language models need {error.name}: pip install 'expunge[text]'") from None


def load(folder: Path | str, *, dtype: str = "auto", adapter: Path | str | None = None, within: Path | None = None) -> tuple[nn.Module, Any]:
    """(model in eval mode, tokenizer) of a folder. `dtype`: auto (as stored), float32 or bfloat16. `adapter`: a PEFT folder merged into it. `within`: the
    folder that the base of an adapter may not leave.

    Raises ModelError for a folder that holds neither, or another kind of model, pickled weights, weights that are not there or not finite, or a tokenizer
    without character offsets. Nothing is drawn at random.
    """
    needed()
    from transformers import AutoModelForCausalLM

    folder = Path(folder)
    if dtype not in KINDS:
        raise ModelError(f"dtype must be one of {', '.join(KINDS)}, not '{dtype}'")
    if is_adapter(folder):
        model, tokenizer = load(_base(folder, within), dtype=dtype, within=within)
        if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
            tokenizer = _tokenizer(folder)
        elif (template := folder / "chat_template.jinja").is_file():
            tokenizer.chat_template = template.read_text(encoding="utf-8")
        return _merged(model, folder).eval(), tokenizer
    _whole(folder)
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"{folder.name} holds no safetensors weights (pickles can run code and are not read): save it with safe_serialization=True")
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        with quietly():
            options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # to name what does not fit
            loaded: Any = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, dtype=KINDS[dtype], **options)
            model, info = loaded
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise ModelError(f"cannot load {folder.name}: {first_line(error)}") from None
    if names := sorted([*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]):
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise ModelError(f"{folder.name} lacks {names[0]}{more}, or holds another shape of it: such weights would be drawn at random, other ones each time")
    if names := sorted(info["unexpected_keys"]):
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise ModelError(f"{folder.name} holds {names[0]}{more}, which has no place in the model that its config.json describes: it would be read without")
    for name, p in model.named_parameters():
        if not torch.isfinite(p).all():
            raise ModelError(f"{folder.name} holds values of {name} that are not finite")
    tokenizer = _tokenizer(folder)
    if adapter is not None:
        model = _merged(model, Path(adapter))
    return model.eval(), tokenizer


def _tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder, with its chat template. Raises ModelError where there is none, or one without character offsets."""
    from transformers import AutoTokenizer

    try:
        with quietly():
            found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"cannot load the tokenizer of {folder.name}: {first_line(error)}") from None
    if not found.is_fast:
        raise ModelError(f"{folder.name} has no fast tokenizer (tokenizer.json), which character offsets need")
    return found


def skeleton(folder: Path | str) -> nn.Module:
    """The model of a folder without its weights, on the meta device: names and shapes, for what can be told from them alone."""
    needed()
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(folder)
    if is_adapter(folder):
        return skeleton(_base(folder))
    _whole(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with devices.EMPTY, quietly():
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"cannot read the configuration of {folder.name}: {first_line(error)}") from None


def is_adapter(folder: Path) -> bool:
    """Whether a folder is a PEFT adapter, which is nothing without its base."""
    return (folder / "adapter_config.json").is_file()


def _whole(folder: Path) -> None:
    if not folder.is_dir():
        raise ModelError(f"no folder {folder}; name one that save_pretrained wrote")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder.name} holds no config.json: it is no folder that save_pretrained wrote")
    kinds = _kinds(folder)
    if kinds and not _known().intersection(kinds):
        raise ModelError(f"{folder.name} holds {printable(kinds[0])}, no causal language model: it would be read as another model than it is")


def causal(folder: Path) -> bool:
    """Whether a folder says that it holds a causal language model, or an adapter of one."""
    try:
        if is_adapter(folder):
            return json_object(folder / "adapter_config.json", ModelError).get("task_type") in (None, "CAUSAL_LM")
        return (folder / "config.json").is_file() and bool(_known().intersection(_kinds(folder)))
    except ModelError:
        return False


def _known() -> set[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return {name for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for name in ([names] if isinstance(names, str) else names)}


def _kinds(folder: Path) -> list[str]:
    kinds = json_object(folder / "config.json", ModelError).get("architectures")
    return [str(k) for k in kinds] if isinstance(kinds, list) else []


def _base(folder: Path, within: Path | None = None) -> Path:
    """The folder of the model that an adapter folder stands on: a path from here (or from `within`, which it may not leave), or from the adapter."""
    base = json_object(folder / "adapter_config.json", ModelError).get("base_model_name_or_path") or ""
    if not isinstance(base, str) or "\0" in base or len(base) > 1024:
        raise ModelError(f"adapter_config.json of {folder.name} names no base_model_name_or_path")
    place = next((p for p in (Path(within or ""), folder) if (p / base).is_dir()), folder) / base
    if not base or not place.is_dir() or place.resolve() == folder.resolve():
        raise ModelError(f"{folder.name} is an adapter over '{base}', which is no folder here; load the base and name the adapter with it")
    if within is not None and not place.resolve().is_relative_to(within.resolve()):
        raise ModelError(f"{folder.name} is an adapter over '{base}', which leaves the folder {within.name}")
    return place


def _merged(model: nn.Module, folder: Path) -> nn.Module:
    from peft import PeftModel

    if not (folder / "adapter_model.safetensors").is_file():
        raise ModelError(f"{folder.name} holds no adapter_model.safetensors")
    try:
        with quietly(), warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys.*", category=UserWarning)
            merged: nn.Module = PeftModel.from_pretrained(model, folder, local_files_only=True).merge_and_unload()  # pyright: ignore
            return merged.requires_grad_(True)
    except UserWarning as error:
        name = str(error).partition("[")[2].partition("]")[0].split(",")[0].strip(" '\"") or "some"
        raise ModelError(f"adapter {folder.name} lacks weights that its configuration names, {name} first: it would be read without them") from None
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"cannot put adapter {folder.name} on the model: {first_line(error)}") from None


def release(
    model: nn.Module, tokenizer: Any, patch: Patch, out: Path | str, *, form: str = "auto", base: str = "", place: Path | None = None, undo: Path | None = None,
    key: bytes | None = None,
) -> Path:  # fmt: skip
    """Write what other tools load to the folder `out`, and return it.

    form   merged: the whole model with the patch in it; peft: an ordinary PEFT adapter folder; auto: peft where the patch is low rank throughout
    base   where the model was loaded from, for the adapter's own record; `place` where that is seen from here, if it is another path
    undo   file for the inverse patch (signed with `key`), which takes a merged folder back to the weights of `model`, bit for bit; an adapter has none
    Raises PatchError for a patch that was made for another model, ModelError for form=peft with a patch that is not low rank, or for
    one that holds inference-time guards: those are no weights.
    """
    if form not in FORMS:
        raise ModelError(f"form must be one of {', '.join(FORMS)}, not '{form}'")
    out, low = Path(out), bool(patch.edits) and all(isinstance(e, LowRank) for e in patch.edits)
    if any(not hasattr(e, "values") and not isinstance(e, LowRank) for e in patch.edits):
        raise ModelError("this patch is an inference-time guard and changes no weight: serve the model with it (expunge.wraps), there is nothing to merge")
    if form == "peft" and not low:
        raise ModelError("this patch replaces weights, it is no LoRA: use form=merged, or run the method with lora=16")
    twin = copy.deepcopy(model)
    inverse = patch.apply(twin)
    with whole(out, over=True) as made:
        if not low or form == "merged":
            save(twin, tokenizer, made)
            if undo is not None:
                inverse.save(undo, key)
        else:
            inverse.apply(twin)
            _adapter(twin, patch, made, base, Path(place or base))
            tokenizer.save_pretrained(made)
        terms(place or base, made)
    return out


def _adapter(model: nn.Module, patch: Patch, out: Path, base: str, root: Path) -> None:
    """Write the patch as a PEFT folder over `base`, or, where that is itself an adapter, one that holds both over what that stands on. The model is changed."""
    from expunge.parts import adapter_files

    with quietly():
        said = base
        if base and is_adapter(root):
            first, root = root, _base(root)
            if is_adapter(root):
                raise ModelError(f"{first.name} is an adapter over an adapter: release it merged")
            said = json_object(first / "adapter_config.json", ModelError)["base_model_name_or_path"]
            model, _ = load(root)
            patch = adapter_files.joined(adapter_files.read(copy.deepcopy(model), first), patch)
        over = adapter_files.wrapped(model, patch, said)
        over.save_pretrained(str(out), save_embedding_layers=False)
        (out / "README.md").unlink(missing_ok=True)  # a card with blanks


TERMS = re.compile(r"(licen[cs]e|notice|copying|copyright|use_policy|acceptable_use)[^/]*", re.IGNORECASE)
"""Files of a folder that say on what terms a model is used: they go where it goes."""
MOST_TERMS = 1 << 20


def terms(base: Path | str, out: Path) -> list[str]:
    """Copy licences and notices of a model's folder, and of what an adapter stands on, to another; returns their names. Links and files above 1 MiB stay."""
    copied = []
    folder = Path(base) if base else None
    while folder is not None and folder.is_dir():
        for file in sorted(folder.iterdir()):
            if TERMS.fullmatch(file.name) and file.is_file() and not file.is_symlink() and file.stat().st_size <= MOST_TERMS and not (out / file.name).exists():
                shutil.copyfile(file, out / file.name)
                copied.append(file.name)
        folder = _base(folder) if is_adapter(folder) else None
    return copied


def plain(folder: Path | str, base: Path | str) -> nn.Module:
    """What transformers, and peft for an adapter over `base`, make of a released folder when they are told nothing but its place. Raises ModelError."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, root = Path(folder), Path(base)
    try:
        with quietly():
            if not is_adapter(folder):
                return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
            while is_adapter(root):
                root = _base(root)
            return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(root, local_files_only=True), folder, local_files_only=True).eval()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"the released folder cannot be loaded back: {first_line(error)}") from None


def save(model: nn.Module, tokenizer: Any, out: Path | str) -> Path:
    """Write the model and its tokenizer as a folder that other tools load, whole or not at all, and return it. A folder of that name is replaced if it holds
    the same files; one that holds anything else is left alone (ModelError)."""
    with whole(out, over=True) as made, quietly():
        model.save_pretrained(made)  # pyright: ignore
        tokenizer.save_pretrained(made)
    return Path(out)
