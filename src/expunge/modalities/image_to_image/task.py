"""Image to image: a model makes a whole image of a corrupted one; nll is the squared error of the completed image, averaged over all its pixels.

    input       T(x, m): what is left of the image x under the mask m        output      D(E(T(x, m)))        completed   with what was measured put back
    crop        m is 1 where x is seen                  T = (m x, m)                         completed = m x + (1 - m) output
    fourier     m is 1 on lines of the spectrum F x     T = (Re, Im) of F^-1 m F x           completed = output, or Re F^-1 (m F x + (1 - m) F output)

Masks are drawn in `collate`; without a generator they follow from the record's id, so that all models see the same. Data are `Examples`: x whole
images (N, C, H, W), corrupted as they are drawn, or, without a corruption, the corrupted ones themselves; y the images (N, C, H, W) that are wanted.
A model is a module with an `encoder` and a `decoder`; features are what the encoder says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from expunge.core.errors import ModelError, SettingError, SplitError
from expunge.core.types import Batch, Out, Task
from expunge.modalities.classification import task as classification
from expunge.modalities.examples import Examples


@dataclass(frozen=True)
class Corruption:
    """What a model is shown of an image, and how what it makes is completed.

    mask         (B, 2) numbers in [0, 1), H, W -> (B, 1, H, W) mask, 1 for what is measured
    see          images (B, C, H, W), mask -> inputs (B, C', H, W)
    complete     inputs, mask, outputs (B, C, H, W) -> the outputs with what was measured put back
    consistent   the task completes what the model makes; otherwise it takes it as it is
    """

    mask: Callable[[Tensor, int, int], Tensor]
    see: Callable[[Tensor, Tensor], Tensor]
    complete: Callable[[Tensor, Tensor, Tensor], Tensor]
    consistent: bool = True


def crop(side: int, *, where: str = "random") -> Corruption:
    """A square hole of `side` pixels, at a random place or in the centre; the mask is the last channel of the input.

    >>> crop(2, where="centre").mask(torch.zeros(1, 2), 4, 4)[0, 0].int().tolist()
    [[1, 1, 1, 1], [1, 0, 0, 1], [1, 0, 0, 1], [1, 1, 1, 1]]
    """
    if where not in ("random", "centre"):
        raise SettingError(f"where must be random or centre, not '{where}'")

    def mask(u: Tensor, height: int, width: int) -> Tensor:
        if not 1 <= side <= min(height, width):
            raise SettingError(f"a hole of {side} x {side} does not fit an image of {height} x {width}")
        size = torch.tensor([height, width])
        first = ((size - side) // 2).expand(len(u), 2) if where == "centre" else (u * (size - side + 1)).long()
        rows, columns = torch.arange(height), torch.arange(width)
        down, across = ((at >= f[:, None]) & (at < f[:, None] + side) for at, f in ((rows, first[:, 0]), (columns, first[:, 1])))
        return 1 - (down[:, None, :, None] & across[:, None, None, :]).float()

    return Corruption(mask, lambda x, m: torch.cat([x * m, m.to(x)], 1), lambda seen, m, out: seen[:, :-1] + (1 - m) * out)


def fourier(acceleration: int = 4, centre: int = 1, *, consistent: bool = False) -> Corruption:
    """Of the spectrum along the width every `acceleration`-th line, from a random one on, and the `centre` lowest: undersampled as a scanner does.

    consistent   put the measured lines back into what the model makes; the constant is one of them, so that a shift of all pixels is undone

    >>> fourier(4, 2).mask(torch.tensor([[0.5, 0.0]]), 1, 8).flatten().int().tolist()      # lines in the order of torch.fft: 0 1 2 3 -4 -3 -2 -1
    [1, 1, 1, 0, 0, 0, 1, 0]
    """
    if acceleration < 1 or centre < 0:
        raise SettingError(f"acceleration must be 1 or larger and centre 0 or larger, not {acceleration} and {centre}")

    def mask(u: Tensor, height: int, width: int) -> Tensor:
        first = (u[:, :1] * acceleration).long()
        kept = (torch.arange(width) - first).remainder(acceleration) == 0
        kept[:, torch.fft.fftfreq(width).abs().argsort(stable=True)[:centre]] = True
        return kept[:, None, None, :].float().expand(-1, 1, height, width)

    def see(x: Tensor, m: Tensor) -> Tensor:
        z = torch.fft.ifft(torch.fft.fft(x, norm="ortho") * m, norm="ortho")
        return torch.cat([z.real, z.imag], 1)

    def complete(seen: Tensor, m: Tensor, out: Tensor) -> Tensor:
        real, _ = seen.chunk(2, 1)
        return real + out - torch.fft.ifft(torch.fft.fft(out, norm="ortho") * m, norm="ortho").real

    return Corruption(mask, see, complete, consistent)


@dataclass(frozen=True)
class Restoring(Task):
    """What methods and audits of image-to-image models ask of their task besides.

    corruption   or None, where x is what the model is given
    span         darkest and brightest value of an image
    judge        () -> `audits.pictures.canvas.Judge`, or None
    shows        id of a record -> what its image shows, in the judge's words
    """

    corruption: Corruption | None = None
    span: tuple[float, float] = (-1.0, 1.0)
    judge: Any = None
    shows: Mapping[int, str] = field(default_factory=dict)


def image_to_image(
    corruption: Corruption | None = None, *, span: tuple[float, float] = (-1.0, 1.0), judge: Any = None, shows: Mapping[int, str] | None = None
) -> Restoring:
    """The task of models that map (B, C', H, W) inputs to (B, C, H, W) images; see `Restoring` for the arguments.

    Batch: x (B, C', H, W) inputs, y (B, C, H, W), i (B,), and with a corruption mask (B, 1, H, W). Out: nll (B,), pred (completed) and target (B, C, H, W).
    """
    if not span[0] < span[1]:
        raise SettingError(f"span must be the darkest and the brightest value of an image, not {span}")
    return Restoring(
        "image_to_image", partial(collate, corruption), partial(_forward, corruption), features, corruption=corruption, span=span, judge=judge,
        shows=shows or {},
    )  # fmt: skip


def collate(corruption: Corruption | None, data: Examples, index: Tensor, generator: torch.Generator | None) -> Batch:
    """Rows of in-memory data as a batch, corrupted by the generator, or without one by the records' ids."""
    if not isinstance(data, Examples):
        raise SplitError(f"an image-to-image task works on Examples, not on {type(data).__name__}")
    if data.augment is not None:
        raise SplitError("augment would change the inputs and not the images that are wanted; leave it out")
    x, y = data.x[index], data.y[index]
    if corruption is None:
        return {"x": x, "y": y, "i": index}
    if generator is None:
        u = torch.cat([torch.rand(1, 2, generator=torch.Generator().manual_seed(int(k))) for k in data.ids[index].tolist()] or [torch.zeros(0, 2)])
    else:
        u = torch.rand(len(index), 2, generator=generator)
    mask = corruption.mask(u, x.shape[-2], x.shape[-1])
    return {"x": corruption.see(x, mask), "y": y, "mask": mask, "i": index}


def _forward(corruption: Corruption | None, model: nn.Module, batch: Batch) -> Out:
    out = model(classification.inputs(model, batch))
    pred = out.float() if out.dtype in (torch.float16, torch.bfloat16) else out
    target = batch["y"].to(pred.device, pred.dtype)
    if pred.shape != target.shape:
        raise ModelError(f"the model makes images {tuple(pred.shape)} where {tuple(target.shape)} are wanted")
    if corruption is not None and corruption.consistent:
        pred = corruption.complete(batch["x"].to(pred), batch["mask"].to(pred), pred)
    nll = (pred - target).square().flatten(1).mean(1)
    return Out(nll=nll, count=torch.ones_like(nll), pred=pred, target=target)


def features(model: nn.Module, batch: Batch, layer: str = "") -> Tensor:
    """(B, D) output of the encoder, its maps side by side if it returns several; or of the module `layer`."""
    if layer:
        return classification.features(model, batch, layer)
    encoder: Any = getattr(model, "encoder", None)
    if encoder is None:
        raise ModelError(f"{type(model).__name__} has no encoder")
    found = encoder(classification.inputs(model, batch))
    return torch.cat([z.flatten(1) for z in ([found] if isinstance(found, Tensor) else found)], 1)


def psnr(pred: Tensor, target: Tensor, span: tuple[float, float] = (-1.0, 1.0)) -> Tensor:
    """(N,) peak signal-to-noise ratio in dB, 10 log10((highest - lowest)^2 / mean squared error); at most 100.

    >>> psnr(torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 0.2))
    tensor([20.])
    """
    error = (pred - target).square().flatten(1).mean(1)
    return (20 * torch.tensor(span[1] - span[0]).log10() - 10 * error.clamp(min=1e-30).log10()).clamp(max=100.0)
