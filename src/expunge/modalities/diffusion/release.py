"""What a run on a diffusers pipeline leaves, as files: the whole pipeline, or an adapter that stands on the one that was given.

merged    a pipeline's folder with the patch in its weights, which plain diffusers loads; the inverse patch beside it
adapter   of low-rank weights: LORA, in the form of diffusers' `save_lora_weights`, which plain diffusers puts on: `pipe.load_lora_weights(folder)`.
          Tensors PART.LAYER.lora_A.weight (r, I) and PART.LAYER.lora_B.weight (O, r), PART the unet or a text encoder; of a convolution (r, I, h, w) and
          (O, r, 1, 1). Scales stand in B, so that none is left to say: alpha is r, as diffusers takes it where it is told nothing
          of an SPM, whose gate plain diffusers has not: SPM, a patch (`Patch.load`, `expunge apply`, `expunge audit --patch`) that names no base, as an
          SPM fits any pipeline of the same shapes. Tensors 0.hook.LAYER.up (O, r), 0.hook.LAYER.down (r, I) and 0.hook.features (J, L, D), states of
          the concept's prompts; the header's `expunge` entry holds name, kind and config of the guard (`modalities.diffusion.guards.permeable`)
ungated   of an SPM: LORA without the gate. Every prompt then draws with the whole adapter (gamma = 1), retained ones too
auto      adapter where the patch is low rank throughout, merged otherwise

An adapter beside its pipeline deletes nothing: whoever leaves it off has the concept back.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from expunge.core.edits import Hook, LowRank
from expunge.core.errors import ModelError, first_line
from expunge.core.files import whole, write
from expunge.core.patch import Patch
from expunge.core.types import device_of, float_of
from expunge.modalities.diffusion.pipelines import Pipeline, apart, configuration, quietly, save
from expunge.modalities.diffusion.task import Painting
from expunge.modalities.pictures import Pictures
from expunge.parts.adapters import layers

FORMS = ("auto", "merged", "adapter", "ungated")
LORA, SPM = "pytorch_lora_weights.safetensors", "spm.safetensors"
"""Names of the files: the first is the one that diffusers looks for."""
GUARD = (
    "this patch is an inference-time guard and changes no weight: there is nothing to write; apply it to the model in memory, or name a form: "
    "adapter (a file that expunge reads) or ungated (a LoRA that plain diffusers loads, without the gate)"
)


def kind(patch: Patch, form: str) -> str:
    """merged, lora, spm or ungated: what `form` makes of this patch. Raises ModelError where it makes nothing, and says what would."""
    if form not in FORMS:
        raise ModelError(f"form must be one of {', '.join(FORMS)}, not '{form}'")
    hooks = [e for e in patch.edits if isinstance(e, Hook)]
    if form == "ungated" and not hooks:
        raise ModelError("form=ungated leaves out the gate of a guard, and this patch holds none: use form=auto")
    if hooks:
        if form not in ("adapter", "ungated"):
            raise ModelError(GUARD)
        if len(patch) != 1 or hooks[0].kind != "permeable":
            raise ModelError(f"only an SPM by itself is an adapter: this patch holds {len(patch)} edits, among them a guard of the kind {hooks[0].kind}")
        return "spm" if form == "adapter" else form
    low = bool(patch.edits) and all(isinstance(e, LowRank) for e in patch.edits)
    if form == "adapter" and not low:
        raise ModelError("this patch replaces weights, it is no adapter: use form=merged, or run esd or concept_ablation with lora=8, or spm")
    return "lora" if low and form != "merged" else "merged"


def is_adapter(folder: Path | str) -> bool:
    """Whether a folder holds an adapter that `release` wrote (or diffusers did), and no pipeline."""
    return not (Path(folder) / "model_index.json").is_file() and any((Path(folder) / name).is_file() for name in (LORA, SPM))


def release(
    found: Pipeline, model: nn.Module, patch: Patch, out: Path | str, *, form: str = "auto", undo: Path | None = None, key: bytes | None = None
) -> Path:
    """Write the patch to the folder `out` in a form (see the module's docstring), and return it.

    model   the weights that the patch was made for; the patch is put on and taken off again, so that they end as they were, bit for bit
    undo    file for the inverse patch of a merged folder (signed with `key`, as the file of an SPM is); an adapter needs none
    Raises PatchError for a patch that was made for another model or a file that cannot be written, ModelError for a form that does not fit the patch.
    """
    out, what = Path(out), kind(patch, form)
    inverse = patch.apply(model)
    try:
        if what == "merged":
            apart(found, out)
            with whole(out, over=True) as made:
                save(found, model, made)
                if undo is not None:
                    inverse.save(undo, key)
    finally:
        inverse.apply(model)
    if what == "spm":
        replace(patch, meta={name: value for name, value in patch.meta.items() if name != "base"}).save(out / SPM, key)
    elif what != "merged":
        from safetensors.torch import save as packed

        write(out / LORA, packed(tensors(model, ungated(patch) if what == "ungated" else patch), {"format": "pt"}))
    return out


def reload(found: Pipeline, folder: Path | str) -> nn.Module:
    """The model that plain diffusers makes of a released folder, a LoRA on the pipeline that was given; an SPM, which it cannot read, by expunge.

    Raises ModelError where diffusers cannot load it.
    """
    import diffusers

    folder, twin = Path(folder), copy.deepcopy(found.model)
    if (folder / SPM).is_file():
        Patch.load(folder / SPM).apply(twin)
        return twin
    place = found.folder if is_adapter(folder) else folder
    reader: Any = getattr(diffusers, configuration(place / "model_index.json", place)["_class_name"])
    try:
        with quietly():
            options = {} if hasattr(twin, "text_encoder_2") else {"safety_checker": None}
            pipe = reader.from_pretrained(place, torch_dtype=float_of(found.model), local_files_only=True, **options)
            if place is found.folder:
                pipe.load_lora_weights(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"the released folder cannot be loaded back: {first_line(error)}") from None
    for name, _ in list(twin.named_children()):
        setattr(twin, name, getattr(pipe, name).to(device_of(found.model)))
    return twin.eval()


def predictions(task: Painting, model: nn.Module, part: Pictures, rows: list[int]) -> Tensor:
    """(N, C, H, W): what the model predicts for these records' prompts in noise of seed 0, at steps from 20 to 980."""
    some = part.take(rows)
    xt = torch.randn(len(rows), *task.shape, generator=torch.Generator().manual_seed(0))
    batch = {"xt": xt, "t": torch.linspace(20, 980, len(rows)).round(), "y": some.tokens, "i": torch.arange(len(rows))}
    found = task.forward(model, batch).pred
    assert found is not None
    return found


def ungated(patch: Patch) -> Patch:
    """The SPM of a patch as low-rank weights that always act."""
    (hook,) = (e for e in patch.edits if isinstance(e, Hook))
    found: Mapping[str, Tensor] = hook.tensors
    return Patch(tuple(LowRank(f"{n}.weight", found[f"{n}.up"], found[f"{n}.down"], float(hook.config["scale"])) for n in layers(hook)))


def tensors(model: nn.Module, patch: Patch) -> dict[str, Tensor]:
    """The tensors of LORA for a patch that is low rank throughout; convolutions are told by the model's weights."""
    out: dict[str, Tensor] = {}
    for edit in patch.edits:
        assert isinstance(edit, LowRank)
        inside = model.get_parameter(edit.name).shape[2:]
        up, down = (edit.up.float() * edit.scale).cpu(), edit.down.float().cpu()
        if len(inside):
            up, down = up[:, :, None, None], down.unflatten(1, (-1, *inside))
        name = edit.name.removesuffix(".weight")
        out |= {f"{name}.lora_A.weight": down.contiguous(), f"{name}.lora_B.weight": up.contiguous()}
    return out
