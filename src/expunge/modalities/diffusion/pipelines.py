"""Diffusion pipelines in folders: what the `save_pretrained` of diffusers wrote comes in, and what plain diffusers loads goes out.

In: Stable Diffusion 1.x and 2.x (StableDiffusionPipeline) and XL (StableDiffusionXLPipeline). Weights are read from safetensors alone, no code of the folder is
run and nothing is looked up on a network. Out: the same folder with the parts that changed written anew.

A model is (unet, text_encoder) or, of XL, (unet, text_encoder, text_encoder_2). The states of an XL prompt have one row more than it has tokens: the pooled
embedding, which is no text that cross-attention reads (`modalities.diffusion.task.read`).
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from expunge.core.errors import DataError, ModelError, first_line
from expunge.core.files import json_object, whole
from expunge.core.machine import devices
from expunge.core.types import device_of
from expunge.modalities.diffusion.task import Painting, Schedule, diffusion
from expunge.modalities.diffusion.tiny import Diffusion

KINDS = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What `dtype` may be; auto is float32, whatever is stored. float16 needs a GPU."""
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
MAX_BYTES = 1 << 20
"""Largest configuration file that is read."""


@dataclass(frozen=True, repr=False)
class Pipeline:
    """What a folder holds: the model, its task, and prompts (list of text) -> (N, L) tokens."""

    folder: Path
    model: nn.Module
    task: Painting
    encode: Callable[[Sequence[str]], Tensor]

    def __repr__(self) -> str:
        return f"Pipeline({self.folder.name}: {sum(p.numel() for p in self.model.parameters()):,} parameters, {self.task.schedule.prediction})"


class DiffusionXL(Diffusion):
    """A UNet and the two text encoders of SDXL. Tokens (B, L + 1), the last one padding, make states (B, L + 1, D): the last row is the pooled embedding."""

    extra = 1

    def __init__(self, unet: nn.Module, first: nn.Module, second: nn.Module, pad: int, empty: Tensor | None, side: int) -> None:
        super().__init__(unet, first)
        self.text_encoder_2, self.pad, self.empty, self.side = second, pad, empty, side

    def encode(self, tokens: Tensor) -> Tensor:
        """(B, L + 1) -> (B, L + 1, D): what the last block but one of both encoders gives, side by side. The second pads with a token of its own."""
        ids = tokens[:, :-1]
        after = (ids == tokens[:, -1:]).cumsum(1) > 1  # behind the first end token
        a: Any = self.text_encoder(ids, output_hidden_states=True)
        b: Any = self.text_encoder_2(ids.masked_fill(after, self.pad), output_hidden_states=True)
        found = torch.cat([a.hidden_states[-2], b.hidden_states[-2]], -1)
        found = torch.cat([found, F.pad(b.text_embeds, (0, found.shape[-1] - b.text_embeds.shape[-1]))[:, None]], 1)
        if self.empty is not None:  # the empty prompt of this pipeline is all zeros
            found = found.masked_fill((tokens == self.empty.to(tokens)).all(1).view(-1, 1, 1), 0.0)
        return found

    def denoise(self, xt: Tensor, t: Tensor, states: Tensor) -> Tensor:
        """Prediction at x_t for states of `encode`, for uncropped images of `side` pixels."""
        config: Any = self.unet.config
        pooled = states[:, -1, : config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim]
        sizes = states.new_tensor([self.side, self.side, 0, 0, self.side, self.side]).expand(len(states), -1)
        return self.unet(xt, t, encoder_hidden_states=states[:, :-1], added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}).sample


def needed() -> None:
    """Raises ModelError when the libraries of pipelines are missing."""
    try:
        import diffusers  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ModelError(f"diffusion pipelines need {error.name}: pip install 'expunge[image]'") from None


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without progress bars and remarks of the libraries on standard error."""
    from diffusers.utils import logging as ours
    from transformers.utils import logging as theirs

    bars = [library.is_progress_bar_enabled() for library in (ours, theirs)]
    levels = {name: logging.getLogger(name).level for name in ("transformers", "diffusers")}
    ours.disable_progress_bar()
    theirs.disable_progress_bar()
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for library, shown in zip((ours, theirs), bars, strict=True):
            if shown:
                library.enable_progress_bar()


def load(folder: Path | str, *, dtype: str = "auto", finite: bool = True) -> Pipeline:
    """The pipeline of a folder, in eval mode.

    Raises ModelError for a folder that is none, an unknown class, a part that is missing, pickled weights, weights that are not finite (unless
    `finite` is False: then the audit says so), and float16 on a CPU.
    """
    needed()
    with quietly():
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    folder = Path(folder)
    if dtype not in DTYPES:
        raise ModelError(f"dtype must be one of {', '.join(DTYPES)}, not '{dtype}'")
    if dtype == "float16" and devices.device() == devices.HOST:
        raise ModelError("float16 arithmetic needs a GPU: use --dtype float32 (or bfloat16) here")
    kind = configuration(folder / "model_index.json", folder).get("_class_name")
    if kind not in KINDS:
        raise ModelError(f"{folder.name} is a {kind}; {' and '.join(KINDS)} can be read")
    xl = kind == KINDS[1]
    readers: dict[str, Any] = {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel}
    readers |= {"text_encoder_2": CLIPTextModelWithProjection} if xl else {}
    parts: dict[str, Any] = {name: part(folder, name, reader, DTYPES[dtype], finite) for name, reader in {**readers, "vae": AutoencoderKL}.items()}
    vae: Any = parts.pop("vae").requires_grad_(False)
    with quietly():
        tokenizers = [
            CLIPTokenizer.from_pretrained(folder / name, local_files_only=True) for name in ("tokenizer", "tokenizer_2")[: 1 + xl] if there(folder, name)
        ]
    encode = encoder(tokenizers[0], extra=int(xl))
    null, unet = encode([""])[0], parts["unet"]
    side = int(unet.config.sample_size)
    if xl:
        model: nn.Module = DiffusionXL(
            parts["unet"], parts["text_encoder"], parts["text_encoder_2"], int(tokenizers[-1].pad_token_id),
            null if configuration(folder / "model_index.json", folder).get("force_zeros_for_empty_prompt", True) else None,
            side * 2 ** (len(vae.config.block_out_channels) - 1),
        )  # fmt: skip
    else:
        model = Diffusion(parts["unet"], parts["text_encoder"])
    task: Any = diffusion(
        schedule(configuration(folder / "scheduler" / "scheduler_config.json", folder)), shape=(int(unet.config.in_channels), side, side), null=null,
        decode=lambda z: vae.decode(z.to(device_of(vae), next(vae.parameters()).dtype) / vae.config.scaling_factor).sample.float().clamp(-1, 1),
    )  # fmt: skip
    return Pipeline(folder, model.eval(), task, encode)


def there(folder: Path, name: str) -> bool:
    """True; raises ModelError when a pipeline lacks that part."""
    if not (folder / name).is_dir():
        raise ModelError(f"{folder.name} has no {name.replace('_', ' ')}: its folder '{name}' is missing")
    return True


def configuration(path: Path, folder: Path, library: str = "diffusers") -> dict[str, Any]:
    """A JSON file of a folder that a library wrote. Raises ModelError when it is missing, too large, or no JSON object."""
    if not folder.is_dir():
        raise ModelError(f"no folder {folder}; name one that save_pretrained of {library} wrote")
    if not path.is_file():
        raise ModelError(f"{folder.name} holds no {path.name}: it is no folder that save_pretrained of {library} wrote")
    return json_object(path, ModelError, MAX_BYTES)


def part(folder: Path, name: str, reader: Any, dtype: torch.dtype | None, finite: bool = True) -> nn.Module:
    """One network of the pipeline, from safetensors."""
    there(folder, name)
    configuration(folder / name / "config.json", folder)
    return network(folder / name, f"{name} of {folder.name}", reader, dtype, finite)[0]


def network(folder: Path, said: str, reader: Any, dtype: torch.dtype | None, finite: bool = True) -> tuple[nn.Module, list[str]]:
    """A network of diffusers or transformers from the safetensors of a folder, and the names of the weights that they lack; `said` names it in errors.

    Raises ModelError for pickled or damaged weights, and, unless `finite` is False, for such as are not finite.
    """
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        old = [f.name for f in sorted(folder.iterdir()) if f.suffix in PICKLES]
        why = f"{old[0]} is a pickle, which can run code, and is not read: load it elsewhere and save_pretrained(safe_serialization=True)" if old else ""
        raise ModelError(f"{said} has no safetensors weights" + (f" ({why})" if why else ""))
    half = all(".fp16." in f.name for f in weights)
    options: dict[str, Any] = {"torch_dtype" if reader.__module__.startswith("diffusers") else "dtype": dtype or torch.float32}
    try:
        with quietly():
            found, info = reader.from_pretrained(
                folder, use_safetensors=True, local_files_only=True, output_loading_info=True, **options, **({"variant": "fp16"} if half else {})
            )
    except Exception as error:  # a damaged file or configuration ends in any error of the libraries
        raise ModelError(f"cannot load {said}: {first_line(error)}") from None
    for key, p in found.named_parameters():
        if finite and not torch.isfinite(p).all():
            raise ModelError(f"{said} holds values of {key} that are not finite")
    return found, sorted(info["missing_keys"])


def encoder(tokenizer: Any, extra: int = 0) -> Callable[[Sequence[str]], Tensor]:
    """Prompts -> (N, L + extra) tokens, filled up with the end token. Raises DataError for a prompt without any token, or one that is too long."""
    length, pad = int(tokenizer.model_max_length), int(tokenizer.eos_token_id)

    def encode(prompts: Sequence[str]) -> Tensor:
        out = torch.full((len(prompts), length + extra), pad, dtype=torch.long)
        for k, prompt in enumerate(prompts):
            found = tokenizer(prompt, verbose=False)["input_ids"]
            if prompt and len(found) <= 2:
                raise DataError(f"prompt '{prompt}' has no token")
            if len(found) > length:
                raise DataError(f"prompt '{prompt[:60]}' has {len(found) - 2} tokens; at most {length - 2} fit")
            out[k, : len(found)] = torch.tensor(found, dtype=torch.long)
        return out

    return encode


def schedule(config: Mapping[str, Any]) -> Schedule:
    """The schedule of a scheduler's configuration. Raises ModelError for one that is not known."""
    n, how = int(config.get("num_train_timesteps", 1000)), config.get("beta_schedule", "linear")
    names = {"epsilon": "epsilon", "v_prediction": "v"}
    kind = config.get("prediction_type", "epsilon")
    if kind not in names:
        raise ModelError(f"prediction type '{kind}' is not known; {', '.join(names)} are")
    if n != 1000:
        raise ModelError(f"a schedule of {n} steps is not known; 1000 is")
    start, end = float(config.get("beta_start", 0.0001)), float(config.get("beta_end", 0.02))
    if how == "squaredcos_cap_v2":
        return Schedule(names[kind], clamp=0.0)
    if how not in ("linear", "scaled_linear"):
        raise ModelError(f"beta schedule '{how}' is not known; linear, scaled_linear and squaredcos_cap_v2 are")
    beta = torch.linspace(start, end, n) if how == "linear" else torch.linspace(start**0.5, end**0.5, n) ** 2
    return Schedule(names[kind], abar=(1 - beta.double()).cumprod(0).float(), clamp=0.0)


def apart(found: Pipeline, out: Path) -> None:
    """Raises ModelError for the folder that the pipeline was read from."""
    if out.resolve() == found.folder.resolve():
        raise ModelError(f"{out.name} is the folder that was read; name another")


def save(found: Pipeline, model: nn.Module, out: Path | str) -> Path:
    """Write the pipeline with the weights of `model` (a copy of its own, changed) to the folder `out`: its networks anew, all else as it was; returns `out`.

    Pickles and links of the folder are left behind. Raises ModelError when it cannot be written.
    """
    out, networks = Path(out), [name for name, _ in model.named_children()]
    apart(found, out)

    def skip(folder: str, names: list[str]) -> set[str]:
        return {n for n in names if Path(n).suffix in PICKLES or (Path(folder) / n).is_symlink()}

    with whole(out, over=True) as made:
        made.mkdir()
        for item in sorted(found.folder.iterdir()):
            if item.is_dir() and not item.is_symlink() and item.name not in networks:
                shutil.copytree(item, made / item.name, ignore=skip)
        shutil.copyfile(found.folder / "model_index.json", made / "model_index.json")
        with quietly():
            for name in networks:
                network: Any = getattr(model, name)
                network.save_pretrained(made / name, safe_serialization=True)
    return out
