"""Contrastive image-text models (CLIP): cosines of images and captions in one space.

A training loss of CLIP depends on the whole batch; what audits read must not. So there are two losses, and the batch says which:
    drawn by seed (training)     symmetric InfoNCE among the batch's own pairs, z_ij = scale cos(image_i, caption_j):
                                 nll_i = (CE(z_i., p_i) + CE(z_.i, p_i)) / 2, p_i even over the captions equal to caption i (one-hot where all differ)
    in order (audits, scores)    zero-shot cross-entropy against the task's fixed class prompts: nll_i = -log softmax_c(scale cos(image_i, class c))[class of i]
The second is a function of the model and the record alone.
A model is a module with `vision_model`, `text_model`, `visual_projection`, `text_projection` and `logit_scale`, as CLIPModel of transformers has them; a tower
gives a tensor (B, D) or a record with `pooler_output`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from expunge.core.errors import ModelError, SettingError, SplitError
from expunge.core.modality import Level
from expunge.core.types import Batch, Out, Task, absent, device_of, float_of
from expunge.modalities.pictures import Pictures
from expunge.modalities.records import correct

PARTS = ("vision_model", "text_model", "visual_projection", "text_projection", "logit_scale")


@dataclass(frozen=True)
class Matching(Task):
    """What methods and audits of contrastive models ask of their task besides.

    names     of the C classes
    domain    field of a record that holds its class
    prompts   (C, M, L) tokens: M wordings of each class, whose mean is the class
    others    name -> (C, M, L) other words for the classes, which audits alone read
    """

    tied: bool = True
    names: tuple[str, ...] = ()
    domain: str = "object"
    prompts: Any = None
    others: Mapping[str, Tensor] = field(default_factory=dict)


def contrastive(names: Sequence[str], prompts: Tensor, *, domain: str = "object", others: Mapping[str, Tensor] | None = None) -> Task:
    """The task of CLIP-like models on Pictures with images.

    names, prompts, domain, others as in `Matching`; prompts (C, L) are one wording each.
    Batch: x (B, C, H, W), y (B, L), label (B,) with -1 for a record of none of the classes, i (B,), together (bool).
    Out when together: nll (B,), pred and target (B, D) unit vectors of images and captions; else nll (B,), logits (B, C) and labels (B,).
    """
    each, rest = _wordings(names, prompts), {k: _wordings(names, v) for k, v in (others or {}).items()}
    index = {name: k for k, name in enumerate(names)}
    return Matching(
        "contrastive", lambda data, rows, generator: collate(index, domain, data, rows, generator), lambda m, b: _forward(each, m, b), features,
        names=tuple(names), domain=domain, prompts=each, others=rest,
    )  # fmt: skip


def _wordings(names: Sequence[str], prompts: Tensor) -> Tensor:
    each = prompts[:, None] if prompts.ndim == 2 else prompts
    if len(names) < 2 or each.ndim != 3 or len(each) != len(names):
        raise SettingError(f"prompts must be (classes, wordings, tokens) for at least 2 classes; found {tuple(prompts.shape)} for {len(names)}")
    return each


def collate(index: Mapping[str, int], domain: str, data: Pictures, rows: Tensor, generator: torch.Generator | None) -> Batch:
    """Images with their captions and classes; a generator says that the batch is drawn for training."""
    if not isinstance(data, Pictures):
        raise SplitError(f"a contrastive task works on Pictures, not on {type(data).__name__}")
    if data.x is None:
        raise SplitError("these records have captions and no images: nothing can be matched")
    label = torch.tensor([index.get(str(data.rows[k].get(domain)), -1) for k in rows.tolist()], dtype=torch.long)
    return {"x": data.x[rows], "y": data.tokens[rows], "label": label, "i": rows, "together": generator is not None}


def images(model: nn.Module, x: Tensor) -> Tensor:
    """(B, D) unit vectors of images (B, C, H, W)."""
    _check(model)
    return _unit(model, "visual_projection", model.vision_model(x.to(device_of(model), float_of(model))))  # pyright: ignore


def texts(model: nn.Module, tokens: Tensor) -> Tensor:
    """(..., D) unit vectors of captions (..., L)."""
    _check(model)
    flat = tokens.flatten(0, -2).to(device_of(model))
    return _unit(model, "text_projection", model.text_model(flat)).unflatten(0, tokens.shape[:-1])  # pyright: ignore


def _check(model: nn.Module) -> None:
    if lacking := [name for name in PARTS if not hasattr(model, name)]:
        raise ModelError(f"{type(model).__name__} has no {lacking[0]}: a contrastive model has {', '.join(PARTS)}")


def _unit(model: nn.Module, projection: str, found: Any) -> Tensor:
    value = getattr(model, projection)(found if isinstance(found, Tensor) else found.pooler_output)
    return F.normalize(value if value.dtype is torch.float64 else value.float(), dim=-1)


def info_nce(z: Tensor, captions: Tensor) -> Tensor:
    """(B,) symmetric InfoNCE of scaled cosines (B, B), rows images; captions (B, L) that are equal share the probability.

    >>> z = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    >>> info_nce(z, torch.tensor([[1], [2]])), info_nce(z, torch.tensor([[1], [1]]))
    (tensor([0.1269, 0.1269]), tensor([1.1269, 1.1269]))
    """
    same = (captions[:, None] == captions[None]).all(-1).to(z)
    p = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(z, p, reduction="none") + F.cross_entropy(z.T, p, reduction="none")) / 2


def _forward(prompts: Tensor, model: nn.Module, batch: Batch) -> Out:
    image = images(model, batch["x"])
    scale = model.logit_scale.to(image).exp()  # pyright: ignore
    if batch["together"]:
        text = texts(model, batch["y"])
        nll = info_nce(scale * image @ text.T, batch["y"].to(image.device))
        return Out(nll=nll, count=torch.ones_like(nll), pred=image, target=text)
    if bool((batch["label"] < 0).any()):
        raise SplitError("a record shows none of the task's classes: it can be trained on, but not be scored")
    labels = batch["label"].to(image.device)
    logits = scale * image @ F.normalize(texts(model, prompts).mean(1), dim=-1).T
    nll = F.cross_entropy(logits, labels, reduction="none")
    return Out(nll=nll, count=torch.ones_like(nll), logits=logits, labels=labels)


def features(model: nn.Module, batch: Batch, layer: str = "") -> Tensor:
    """(B, D) unit vectors of the images."""
    return images(model, batch["x"])


def level(p: Any, model: nn.Module, part: str) -> Level:
    """Share of images that are matched to their own words, without those of classes that retain lacks."""
    labels = {name: p.seen(p.before, name).labels for name in ("forget", "retain") if getattr(p.split, name) is not None}
    gone = absent(labels["forget"], labels["retain"]) if "retain" in labels else torch.zeros(0, dtype=torch.long)
    s = p.seen(model, part)
    keep = ~torch.isin(s.labels, gone)
    return correct(s.correct[keep], s.labels[keep])
