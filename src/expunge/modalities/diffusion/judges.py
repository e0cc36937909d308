"""Judges of drawings from folders: what `save_pretrained` of transformers wrote becomes an `audits.pictures.canvas.Judge` of a request's concepts.

    zero-shot     CLIP and SigLIP. A concept c is w_c = norm(mean over wordings t of norm(E_text(t(c)))), an image x is named argmax_c cos(E_image(x), w_c).
                  Source: Radford et al., ICML 2021 (arXiv:2103.00020), section 3.1.4. Features: norm(E_image(x))
    classifier    a model for image classification (ViT, ResNet, Swin, ...). An image is named by its largest logit among ALL labels of the folder, as published
                  (card unlearn-canvas); one whose label is none of the concepts is named OTHER. Features: the inputs of the last linear layer

A zero-shot judge knows the concepts it is told and no others: name an anchor, or a drawing of something else falls to the concept that is least far from it. A
classifier says OTHER of it: so of the erased concept's drawings only those that it would name so among all of its labels count as showing it, and a destroyed
one counts as gone.

Neither has held-out images of the concepts, so `Judge.right` is empty, and the notes of rows say instead how often the judge agrees with the prompt on drawings
of the model before. Weights are read from safetensors alone, no code of the folder is run, nothing is looked up on a network, and torchvision is not needed.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from expunge.core.errors import DataError, ModelError, SettingError, first_line
from expunge.core.guard import quiet
from expunge.core.types import device_of, float_of
from expunge.modalities.classification.task import head
from expunge.modalities.diffusion.pipelines import configuration, needed, network, quietly
from expunge.modalities.judge import Judge

OTHER = "something else"
"""What a classifier names an image whose label is none of the concepts."""
WORDINGS = ("{}", "a photo of {}", "a picture of {}", "an image of {}", "a painting of {}")
"""Wordings that a zero-shot judge reads the concepts in."""
TOKENIZERS = ("tokenizer.json", "vocab.json", "spiece.model")
"""Files of which a tokenizer has one."""
CHUNK = 16
"""Images looked at at once."""
PAIRS = {"clip": "CLIPModel", "siglip": "SiglipModel"}
"""Model type -> its class of two encoders in one space."""
USUAL = {
    "clip": {
        "size": {"shortest_edge": 224}, "do_center_crop": True, "crop_size": 224, "resample": 3,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    },
    "": {"size": 224, "resample": 2, "image_mean": 0.5, "image_std": 0.5},
}  # fmt: skip
"""Model type ("": all others) -> what is done to images where a folder does not say; sizes are then those of its config.json."""
FILTERS = {"0": "nearest", "2": "bilinear"}
"""Number of a filter in Pillow -> its name in torch; all others are read as bicubic."""
LARGEST = 2048
"""Largest side of an image in pixels that a folder may ask for."""


@dataclass(frozen=True)
class Lens:
    """What is done to images before a network sees them.

    resize    (height, width), the shorter side, or None
    crop      (height, width) cut from the middle, or None          mode    nearest, bilinear or bicubic, the latter two with antialiasing
    scale     what 1 in [0, 1] becomes before mean and std (one per channel) are taken out: 1 where a folder divides by 255
    """

    resize: tuple[int, int] | int | None
    crop: tuple[int, int] | None
    mode: str
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """(N, len(mean), H', W') of images (N, C, H, W) in [-1, 1], C = 1 (made as many channels as there are) or that many. What is not finite is grey.

        Raises DataError for other channels. Check: (0.5 - 0.48145466) / 0.26862954
        >>> see = Lens((2, 2), None, "bicubic", 1.0, (0.48145466,) * 3, (0.26862954,) * 3)
        >>> found = see(torch.zeros(1, 1, 4, 4))
        >>> tuple(found.shape), round(float(found[0, 2, 1, 1]), 4)
        ((1, 3, 2, 2), 0.069)
        """
        if x.shape[1] not in (1, len(self.mean)):
            raise DataError(f"the judge looks at images of {len(self.mean)} channels, not of {x.shape[1]}")
        x = ((x.float().nan_to_num(0.0, 1.0, -1.0).clamp(-1, 1) + 1) / 2).expand(-1, len(self.mean), -1, -1)
        h, w = x.shape[-2:]
        wanted = [int(self.resize * side / min(h, w)) for side in (h, w)] if isinstance(self.resize, int) else [*(self.resize or (h, w))]
        if wanted != [h, w]:
            x = F.interpolate(x, size=wanted, mode=self.mode, antialias=self.mode != "nearest").clamp(0, 1)
        if self.crop is not None:
            top, left = ((have - cut) // 2 for have, cut in zip(wanted, self.crop, strict=True))
            x = x[..., top : top + self.crop[0], left : left + self.crop[1]]
        mean, std = (x.new_tensor(v).view(-1, 1, 1) for v in (self.mean, self.std))
        return (x * self.scale - mean) / std


class ZeroShot(nn.Module):
    """Images (N, C, H, W) in [-1, 1] -> (N, concepts) cosines with the concepts' directions (concepts, D), the weights of its last linear layer."""

    def __init__(self, pair: Any, lens: Lens, directions: Tensor) -> None:
        super().__init__()
        self.lens, self.pair = lens, pair
        self.names = nn.Linear(directions.shape[1], len(directions), bias=False)
        self.names.weight = nn.Parameter(directions)

    def forward(self, x: Tensor) -> Tensor:
        """Cosines."""
        seen = self.pair.get_image_features(pixel_values=self.lens(x.to(device_of(self), float_of(self)))).pooler_output
        return self.names(F.normalize(seen, dim=-1))


class Labelled(nn.Module):
    """Images (N, C, H, W) in [-1, 1] -> (N, concepts) logits of the labels at `index`, and, where there are other labels, the largest of theirs behind them."""

    def __init__(self, classifier: Any, lens: Lens, index: Sequence[int]) -> None:
        super().__init__()
        self.lens, self.classifier, self.index = lens, classifier, list(index)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        logits = self.classifier(pixel_values=self.lens(x.to(device_of(self), float_of(self)))).logits
        return gathered(logits, self.index)


def gathered(logits: Tensor, index: Sequence[int]) -> Tensor:
    """(N, k) the columns at `index` (k) of logits (N, C) and, where k < C, (N, k + 1) with the largest of the others last: the argmax over all C is kept.

    >>> gathered(torch.tensor([[1.0, 5.0, 2.0, 3.0]]), [2, 0]).tolist()
    [[2.0, 1.0, 5.0]]
    """
    mine = logits[:, list(index)]
    rest = [k for k in range(logits.shape[1]) if k not in set(index)]
    return torch.cat([mine, logits[:, rest].amax(1, keepdim=True)], 1) if rest else mine


def judge(folder: Path | str, concepts: Sequence[str], *, also: Sequence[str] = (), domain: str = "concept", drawings: int = 0) -> Judge:
    """A judge of the concepts (two or more), from a folder that save_pretrained of transformers wrote. For which folders, and what it says: see the module.

    also        words that an image may be named besides, such as the anchor: a classifier uses those that it has a label for
    domain      field of the prompts' rows that names the concept          drawings    as in `Judge`
    Labels are matched whole, whatever their case, without "a", "an" or "the" before them; a label with commas is known by each of its names.
    Raises ModelError for a folder that is none, weights that are pickles, missing or not finite, an unknown type, or a preprocessor that is not known;
    SettingError for concepts that are fewer than two or have no label, or share one; DataError for names that the tokenizer does not take.
    """
    needed()
    folder, concepts = Path(folder), list(dict.fromkeys(concepts))
    if len(concepts) < 2:
        raise SettingError(f"a judge needs two concepts to choose from, not {len(concepts)}: name some to keep")
    config = configuration(folder / "config.json", folder, "transformers")
    with quietly():
        kind, make = reader(config, folder)
    lens, said = preprocessing(folder, config, kind)
    found, missing = network(folder, folder.name, make, None)
    if missing:
        raise ModelError(f"{folder.name} lacks weights of {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}: a judge is not drawn at random")
    if kind in PAIRS.values():
        names = [*concepts, *(a for a in dict.fromkeys(also) if a not in concepts)]
        encode = encoder(folder, found)
        apart(encode(names), names)
        model: nn.Module = ZeroShot(found, lens, directions(found, encode, names))
        said = f"{folder.name}: {kind}, zero-shot among {len(names)} names{said}"
    else:
        labels = [str(label) for _, label in sorted(found.config.id2label.items())]  # pyright: ignore
        names, index = chosen(labels, concepts, [a for a in also if a not in concepts])
        if head(found)[1].out_features != len(labels):
            raise ModelError(f"the last linear layer of {folder.name} ({head(found)[0]}) does not answer with its {len(labels)} labels")
        model = Labelled(found, lens, index)
        names += [OTHER] if len(index) < len(labels) else []
        said = f"{folder.name}: {kind}, the largest of {len(labels)} labels{said}"
    model.requires_grad_(False).eval()
    looked(model, len(lens.mean), len(names), folder)
    return Judge({domain: tuple(names)}, {domain: model}, {}, size=CHUNK, drawings=drawings, about=said)


def reader(config: Mapping[str, Any], folder: Path) -> tuple[str, Any]:
    """Name and class of transformers that a config.json asks for. Raises ModelError for one that is no judge."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

    labelled: dict[str, Any] = {str(k): v for k, v in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.items()}
    kind, made = str(config.get("model_type")), config.get("architectures")
    made = [str(a) for a in made] if isinstance(made, list) else []
    known = labelled.get(kind, ())
    name = next((a for a in made if a in ((known,) if isinstance(known, str) else known)), None)
    if name is None and kind in PAIRS and not any(a.endswith("ForImageClassification") for a in made):
        name = PAIRS[kind]
    if name is None:
        raise ModelError(
            f"{folder.name} holds {', '.join(made) or 'no architecture'} (model type {kind}): a judge is a {' or a '.join(PAIRS.values())}, "
            "or a model of transformers for image classification, with its head"
        )
    return name, getattr(transformers, name)


def looked(model: nn.Module, channels: int, names: int, folder: Path) -> None:
    """One look at a grey image. Raises ModelError where it fails."""
    try:
        with quiet(model):
            found = tuple(model(torch.zeros(1, channels, 64, 64)).shape)
    except Exception as error:  # networks of other people's
        raise ModelError(f"{folder.name} cannot look at an image as its preprocessor makes it: {first_line(error)}") from None
    if found != (1, names):
        raise ModelError(f"{folder.name} answers one image with a tensor of shape {found}, not {(1, names)}")


def encoder(folder: Path, pair: Any) -> Callable[[Sequence[str]], Tensor]:
    """Texts -> (N, L) tokens, padded to the length of the text encoder. Raises ModelError without a tokenizer; the function DataError for texts that are too
    long, and ModelError for tokens that the text encoder does not know."""
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in TOKENIZERS):  # the library would make an empty one
        raise ModelError(f"{folder.name} has no tokenizer ({', '.join(TOKENIZERS)}): save it into the folder as well")
    try:
        with quietly():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # as in `pipelines.network`
        raise ModelError(f"cannot load the tokenizer of {folder.name}: {first_line(error)}") from None
    length, known = (int(getattr(pair.config.text_config, name)) for name in ("max_position_embeddings", "vocab_size"))

    def encode(texts: Sequence[str]) -> Tensor:
        found = tokenizer(list(texts), padding="max_length", max_length=length, verbose=False)["input_ids"]
        if long := next((text for text, ids in zip(texts, found, strict=True) if len(ids) > length), None):
            raise DataError(f"'{long[:60]}' is longer than the {length} tokens that the judge reads")
        if (largest := max(map(max, found))) >= known:
            raise ModelError(f"the tokenizer of {folder.name} has token {largest}, and its text encoder knows {known}")
        return torch.tensor(found, dtype=torch.long)

    return encode


def apart(tokens: Tensor, names: Sequence[str]) -> None:
    """Raises SettingError where two names have the same tokens (N, L): the judge reads them as one."""
    seen: dict[bytes, str] = {}
    for row, name in zip(tokens, names, strict=True):
        if (other := seen.setdefault(row.numpy().tobytes(), name)) is not name:
            raise SettingError(f"'{other}' and '{name}' are the same to the judge's tokenizer")


def directions(pair: Any, encode: Callable[[Sequence[str]], Tensor], names: Sequence[str], wordings: Sequence[str] = WORDINGS) -> Tensor:
    """(names, D) directions of length 1: the mean over the wordings of the text embeddings, each of length 1."""
    with quiet(pair):
        each = [F.normalize(pair.get_text_features(input_ids=encode([t.format(name) for t in wordings])).pooler_output, dim=-1).mean(0) for name in names]
    return F.normalize(torch.stack(each), dim=-1)


def chosen(labels: Sequence[str], concepts: Sequence[str], also: Sequence[str]) -> tuple[list[str], list[int]]:
    """Names, the concepts and those of `also` that have a label, and the labels' positions.

    Raises SettingError for concepts without a label, with several, or two with the same.
    >>> chosen(["tench, Tinca tinca", "Van_Gogh", "cat"], ["van gogh", "a tench"], ["painting", "cat"])
    (['van gogh', 'a tench', 'cat'], [1, 0, 2])
    """
    known: dict[str, list[int]] = {}
    for k, label in enumerate(labels):
        for name in dict.fromkeys(map(plain, (label, *label.split(",")))):
            known.setdefault(name, []).append(k)
    if missing := [c for c in concepts if plain(c) not in known]:
        raise SettingError(
            f"the judge has no label for {'; '.join(near(c, known) for c in missing[:5])}{f', and {len(missing) - 5} more' if missing[5:] else ''}"
        )
    names = [*concepts, *(a for a in dict.fromkeys(also) if plain(a) in known)]
    index: dict[int, str] = {}
    for name in names:
        found = known[plain(name)]
        if len(found) > 1:
            raise SettingError(f"'{name}' is the name of {len(found)} labels of the judge: write one of them whole, {' or '.join(labels[k] for k in found)}")
        if found[0] in index:
            raise SettingError(f"'{index[found[0]]}' and '{name}' are the same label of the judge, {labels[found[0]]}")
        index[found[0]] = name
    return names, list(index)


def plain(name: str) -> str:
    """A name without case, article and underscores.

    >>> plain(" The Van_Gogh ")
    'van gogh'
    """
    words = name.replace("_", " ").casefold().split()
    return " ".join(words[1:] if len(words) > 1 and words[0] in ("a", "an", "the") else words)


def near(name: str, known: Mapping[str, Any]) -> str:
    """A name that is not known, with the known ones that look like it."""
    found = difflib.get_close_matches(plain(name), known, n=3)
    return f"'{name}'" + (f" (near: {', '.join(found)})" if found else f" (it has {', '.join([*known][:3])}, ...)")


def preprocessing(folder: Path, config: Mapping[str, Any], kind: str) -> tuple[Lens, str]:
    """What preprocessor_config.json (or the part of processor_config.json) asks for; and, where neither is there, a remark on what is done instead."""
    side = of_images(config, "image_size")
    usual = USUAL["clip" if kind.startswith("CLIP") else ""]
    shrunk = {"size": {"shortest_edge": side}, "crop_size": side} if "crop_size" in usual else {"size": side}
    base = {**usual, **(shrunk if side else {})}
    if (folder / "preprocessor_config.json").is_file():
        return lens(configuration(folder / "preprocessor_config.json", folder, "transformers"), base, config, folder), ""
    if (folder / "processor_config.json").is_file():
        found = configuration(folder / "processor_config.json", folder, "transformers").get("image_processor")
        if isinstance(found, dict):
            return lens(found, base, config, folder), ""
    made = lens(base, base, config, folder)
    return made, f"; it has no preprocessor_config.json, so mean {_told(made.mean)}, std {_told(made.std)}, {side or 224} pixels are assumed"


def _told(values: Sequence[float]) -> str:
    return " ".join(f"{v:.3g}" for v in dict.fromkeys(values))


def of_images(config: Mapping[str, Any], name: str) -> int:
    """A number that a config.json says of images (image_size, num_channels); 0 where it does not."""
    vision = config.get("vision_config")
    found = (vision if isinstance(vision, dict) else config).get(name, 0)
    return found if isinstance(found, int) else 0


def lens(given: Mapping[str, Any], base: Mapping[str, Any], config: Mapping[str, Any], folder: Path) -> Lens:
    """What an image processor's settings ask for. Raises ModelError for settings that are not known.

    given   the settings          base    what stands for those that are missing
    """
    asked = {**base, **{k: v for k, v in given.items() if v is not None}}
    channels = of_images(config, "num_channels") or 3
    if asked.get("rescale_offset") or asked.get("include_top"):
        raise ModelError(f"the preprocessor of {folder.name} scales images as EfficientNet's does, which is not known")
    crop = sides(asked.get("crop_size"), "crop_size", folder) if asked.get("do_center_crop") else None
    share = asked.get("crop_pct")
    size = asked["size"]
    edges = {"shortest_edge": size} if isinstance(size, int) and (crop or share) else size
    if isinstance(edges, dict) and "shortest_edge" in edges:
        edge = sides(edges["shortest_edge"], "size", folder)[0]
        resize: tuple[int, int] | int = edge
        if share:  # ConvNeXT's, which ResNet's folders name too: small images are cut from larger ones, larger ones are squares
            if not isinstance(share, int | float) or not 0 < share <= 1:
                raise ModelError(f"the preprocessor of {folder.name} has a crop_pct of {share}; it must lie in 0..1")
            resize, crop = (int(edge / share), (edge, edge)) if edge < 384 else ((edge, edge), crop)
    else:
        resize = sides(size, "size", folder)
    if crop and max(crop) > (resize if isinstance(resize, int) else min(resize)):
        raise ModelError(f"the preprocessor of {folder.name} cuts {crop[0]} x {crop[1]} pixels from images of {resize}")
    scale = 255.0 * number(asked.get("rescale_factor", 1 / 255), "rescale_factor", folder) if asked.get("do_rescale", True) else 255.0
    still = {"image_mean": 0.0, "image_std": 1.0} if not asked.get("do_normalize", True) else {}
    mean, std = (per_channel({**asked, **still}[name], name, channels, folder) for name in ("image_mean", "image_std"))
    if min(std) <= 0:
        raise ModelError(f"the preprocessor of {folder.name} has an image_std that is not above 0")
    return Lens(resize if asked.get("do_resize", True) else None, crop, FILTERS.get(str(asked.get("resample")), "bicubic"), scale, mean, std)


def sides(value: Any, name: str, folder: Path) -> tuple[int, int]:
    """(height, width) of a number or of {"height", "width"}."""
    pair: list[Any] = [value.get(side) for side in ("height", "width")] if isinstance(value, dict) else [value, value]
    if not all(isinstance(v, int) and not isinstance(v, bool) and 1 <= v <= LARGEST for v in pair):
        raise ModelError(f"the preprocessor of {folder.name} has a {name} of {value}; what is known are numbers of pixels up to {LARGEST}")
    return pair[0], pair[1]


def per_channel(value: Any, name: str, channels: int, folder: Path) -> tuple[float, ...]:
    """One number per channel, of as many or of one for all."""
    found = [number(v, name, folder) for v in value] if isinstance(value, list | tuple) else [number(value, name, folder)] * channels
    if len(found) != channels:
        raise ModelError(f"the preprocessor of {folder.name} has {len(found)} numbers in {name}, and the model {channels} channels")
    return tuple(found)


def number(value: Any, name: str, folder: Path) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ModelError(f"the preprocessor of {folder.name} has a {name} that is no finite number")
    return float(value)
