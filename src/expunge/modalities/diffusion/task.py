"""Diffusion models: nll is the mean squared error of the prediction at the batch's time and noise.

    x_t = a(t) x + b(t) n          n ~ N(0, I), t in [0, 1000]
    flow         a = 1 - s, b = s, s = t / 1000        the model predicts n - x
    epsilon      a = sqrt(abar_t), b = sqrt(1 - abar_t)        it predicts n
    v            the same a and b                              it predicts a n - b x

Times and noise are drawn in `collate`, so before and after see the same; without a generator they follow from the record's place in the data.
A model is a module with a `unet`(x_t, t, encoder_hidden_states) and a `text_encoder`(tokens), as a pipeline of diffusers has them.
A model with a buffer `one_step` above 0 is a generator that draws in one step, from b(t) n at that time t; its nll says nothing at other times.
A batch may hold `xt` (B, C, H, W) in place of `x` and `noise` (states of a trajectory: there is nothing to score, Out has the prediction alone), and
`states` (B, L, D) in place of the tokens `y` (embeddings that no prompt has).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from expunge.core.errors import ModelError, SettingError, SplitError
from expunge.core.guard import quiet
from expunge.core.types import Batch, Out, Task, device_of, float_of
from expunge.modalities.pictures import Pictures

PREDICTIONS = ("flow", "epsilon", "v")
T = 1000


@dataclass(frozen=True)
class Schedule:
    """How much signal and noise a time holds, and what the model predicts.

    prediction   flow, epsilon or v
    abar         (1000,) cumulative products of the schedule, for epsilon and v; None is the cosine schedule
    clamp        largest |x_0| while sampling, 0 for latents that have no bound
    """

    prediction: str = "flow"
    abar: Tensor | None = None
    clamp: float = 1.0

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise SettingError(f"prediction must be one of {', '.join(PREDICTIONS)}, not '{self.prediction}'")

    def mix(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 1, 1, 1) a and b at times t (B,).

        >>> [round(float(v), 4) for v in Schedule().mix(torch.tensor([250.0]))]
        [0.75, 0.25]
        >>> [round(float(v), 4) for v in Schedule("epsilon").mix(torch.tensor([0.0]))]
        [1.0, 0.0064]
        """
        if self.prediction == "flow":
            s = (t / T).view(-1, 1, 1, 1)
            return 1 - s, s
        abar = cosine() if self.abar is None else self.abar
        a2 = abar.to(t.device)[t.long().clamp(0, T - 1)].view(-1, 1, 1, 1)
        return a2.sqrt(), (1 - a2).sqrt()

    def noised(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t."""
        a, b = self.mix(t)
        return a * x + b * noise

    def wanted(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the model is to predict."""
        if self.prediction == "flow":
            return noise - x
        a, b = self.mix(t)
        return noise if self.prediction == "epsilon" else a * noise - b * x

    def parted(self, xt: Tensor, pred: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x_0 and noise that a prediction at x_t stands for; x_0 clamped."""
        a, b = self.mix(t)
        if self.prediction == "flow":
            x = xt - b * pred
        elif self.prediction == "epsilon":
            x = (xt - b * pred) / a.clamp(min=1e-4)
        else:
            x = a * xt - b * pred
        if self.clamp and self.prediction != "flow":
            x = x.clamp(-self.clamp, self.clamp)
        return x, (xt - a * x) / b.clamp(min=1e-4)

    def drawn(self, n: int, generator: torch.Generator | None) -> Tensor:
        """(n,) training times: sigmoid of a normal for flow, uniform otherwise."""
        if self.prediction == "flow":
            return T * torch.randn(n, generator=generator).sigmoid()
        return torch.randint(T, (n,), generator=generator).float()

    def path(self, steps: int) -> Tensor:
        """(steps,) times at which the model is asked, from pure noise on; after the last comes the image."""
        return torch.linspace(T, T / steps, steps) if self.prediction == "flow" else torch.linspace(T - 1, 0, steps).round()


def cosine() -> Tensor:
    """(1000,) abar of the cosine schedule (Nichol and Dhariwal 2021), betas at most 0.999."""
    f = torch.cos((torch.arange(T + 1, dtype=torch.double) / T + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - (1 - f[1:] / f[:-1]).clamp(max=0.999)).cumprod(0).float()


def diffusion(
    schedule: Schedule | None = None, *, shape: Sequence[int] = (), null: Tensor | None = None, drop: float = 0.0, judge: Any = None, decode: Any = None
) -> Task:
    """The task of text-conditional (or class-conditional: one token per prompt) diffusion models on Pictures.

    shape    (C, H, W) of what is drawn, for prompts without images
    null     (L,) tokens of the empty prompt: guidance and dropped prompts need it
    drop     share of prompts that training drops
    judge    `audits.pictures.canvas.Judge`, which says what an image shows, for audits
    decode   latents -> images, for latent models
    Batch: x (B, C, H, W), y (B, L), t (B,), noise (B, C, H, W), i (B,). Out: nll (B,), pred and target (B, C, H, W).
    """
    schedule = schedule or Schedule()
    task = Painting(
        "diffusion", lambda data, index, generator: collate(schedule, null, drop, data, index, generator), lambda m, b: _forward(schedule, m, b), features,
        schedule=schedule, shape=tuple(shape), null=null, judge=judge, decode=decode,
    )  # fmt: skip
    return replace(task, sample=partial(draw, task))


@dataclass(frozen=True)
class Painting(Task):
    """What methods and audits of diffusion models ask of their task besides. `batch`: images drawn at once, where the caller does not say."""

    schedule: Schedule = Schedule()
    shape: tuple[int, ...] = ()
    null: Any = None
    judge: Any = None
    decode: Any = None
    batch: int = 128


def collate(schedule: Schedule, null: Tensor | None, drop: float, data: Pictures, index: Tensor, generator: torch.Generator | None) -> Batch:
    """Images and prompts with times and noise; a share `drop` of the prompts emptied when drawn for training."""
    if not isinstance(data, Pictures):
        raise SplitError(f"a diffusion task works on Pictures, not on {type(data).__name__}")
    y = data.tokens[index]
    if data.x is None:
        return {"y": y, "i": index}
    x = data.x[index]
    if generator is None:
        each = [torch.Generator().manual_seed(int(k)) for k in index.tolist()]
        t = torch.cat([schedule.drawn(1, g) for g in each]) if each else torch.zeros(0)
        noise = torch.stack([torch.randn(x.shape[1:], generator=g) for g in each]) if each else torch.zeros_like(x)
    else:
        t, noise = schedule.drawn(len(index), generator), torch.randn(x.shape, generator=generator)
        if drop and null is not None:
            y = torch.where(torch.rand(len(index), 1, generator=generator) < drop, null, y)
    return {"x": x, "y": y, "t": t, "noise": noise, "i": index}


def states(model: nn.Module, tokens: Tensor) -> Tensor:
    """(B, L, D) what the text encoder makes of tokens (B, L); a model with several has an `encode` of its own, which may put `extra` rows behind the words'."""
    encoder: Any = getattr(model, "encode", None) or getattr(model, "text_encoder", None)
    if encoder is None:
        raise ModelError(f"{type(model).__name__} has no text_encoder")
    found = encoder(tokens.to(device_of(model)))
    return found if isinstance(found, Tensor) else found.last_hidden_state


def read(model: nn.Module, found: Tensor) -> Tensor:
    """(B, L, ...) of states, or of marks on tokens: the places that cross-attention reads, without those a model puts behind them."""
    extra = int(getattr(model, "extra", 0))
    return found[:, : found.shape[1] - extra]


def word_table(model: nn.Module) -> nn.Embedding:
    """The text encoder's word embeddings (V, D). Raises ModelError when it has no such table."""
    encoder: Any = getattr(model, "text_encoder", None)
    found = encoder.get_input_embeddings() if hasattr(encoder, "get_input_embeddings") else getattr(encoder, "embedding", None)
    if not isinstance(found, nn.Embedding):
        raise ModelError(f"{type(encoder or model).__name__} has no table of word embeddings: prompts cannot be attacked")
    return found


def roomy(tokens: Tensor, k: int) -> Tensor:
    """(B,) bool: prompts (B, L) in which k words more fit, with one place of padding left.

    >>> roomy(torch.tensor([[5, 7, 0, 0], [5, 0, 0, 0]]), 2)
    tensor([False,  True])
    """
    return (tokens[:, -1 - k :] == tokens[:, -1:]).all(1) if k < tokens.shape[1] else torch.zeros(len(tokens), dtype=torch.bool)


def put_before(model: nn.Module, tokens: Tensor, rows: Tensor, extra: Tensor) -> Tensor:
    """(B, L, ...) rows of prompts of tokens (B, L) with extra (B, k, ...) before their words (behind a start token), in place of the last k of padding."""
    start = getattr(getattr(getattr(model, "text_encoder", None), "config", None), "bos_token_id", None)
    first = int(start is not None and bool((tokens[:, 0] == start).all()))
    return torch.cat([rows[:, :first], extra, rows[:, first : rows.shape[1] - extra.shape[1]]], 1)


def embedded_states(model: nn.Module, tokens: Tensor, extra: Tensor) -> Tensor:
    """(B, L, D) states of prompts (B, L) with free word embeddings (k, W) or (B, k, W) before their words, in place of the last k of padding.

    They stand after the start token where there is one. Raises SettingError where they do not fit.
    """
    table, encoder, k = word_table(model), getattr(model, "text_encoder", None), extra.shape[-2]
    if not bool(roomy(tokens, k).all()):
        raise SettingError(f"{k} words more do not fit into every prompt of {tokens.shape[1]} places")
    tokens = tokens.to(device_of(model))
    x = table(tokens)
    x = put_before(model, tokens, x, extra.to(x).expand(len(x), -1, -1))
    if hasattr(encoder, "embedded"):
        return encoder.embedded(x)  # pyright: ignore[reportOptionalMemberAccess]
    hook = table.register_forward_hook(lambda *_: x)  # CLIPTextModel takes tokens alone: its table gives these embeddings for this one call
    try:
        return states(model, tokens)
    finally:
        hook.remove()


def predict(model: nn.Module, xt: Tensor, t: Tensor, context: Tensor) -> Tensor:
    """(B, C, H, W) the model's prediction at x_t (B, C, H, W) and t (B,), given states (B, L, D)."""
    unet: Any = getattr(model, "unet", None)
    if unet is None:
        raise ModelError(f"{type(model).__name__} has no unet")
    device, kind = device_of(model), float_of(model)
    if hasattr(model, "denoise"):
        return model.denoise(xt.to(device, kind), t.to(device), context)  # pyright: ignore[reportCallIssue]
    found = unet(xt.to(device, kind), t.to(device), encoder_hidden_states=context)
    return found if isinstance(found, Tensor) else found.sample


def _forward(schedule: Schedule, model: nn.Module, batch: Batch) -> Out:
    context = batch["states"] if "states" in batch else states(model, batch["y"])
    if "xt" in batch:
        pred = predict(model, batch["xt"], batch["t"], context)
        zero = pred.new_zeros(len(pred), dtype=torch.float32)
        return Out(nll=zero, count=torch.ones_like(zero), pred=pred.float())
    if "x" not in batch:
        raise SplitError("these records have prompts and no images: nothing can be scored on them")
    x, noise, t = (batch[n].to(device_of(model)) for n in ("x", "noise", "t"))
    pred = predict(model, schedule.noised(x, noise, t), t, context).float()
    target = schedule.wanted(x, noise, t)
    nll = (pred - target).square().flatten(1).mean(1)
    return Out(nll=nll, count=torch.ones_like(nll), pred=pred, target=target)


def jump(model: nn.Module) -> int:
    """Time at which a one-step generator draws (its buffer `one_step`), 0 for a model that draws in many steps."""
    return int(getattr(model, "one_step", 0))


def features(model: nn.Module, batch: Batch, layer: str = "") -> Tensor:
    """(B, D) state of the prompt: the mean over its tokens."""
    return states(model, batch["y"]).mean(1)


def draw(
    task: Any, model: nn.Module, data: Pictures, *, guidance: float = 2.0, steps: int = 25, seed: int = 0, size: int = 0, context: Tensor | None = None,
    watch: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None] | None = None,
) -> Tensor:  # fmt: skip
    """(N, C, H, W) images for the prompts of `data`, deterministic (DDIM, eta 0; for flow this is Euler's method), without gradients.
    A one-step generator (`jump`) draws in its one step from the same noise, whatever `steps` and `guidance` say.

    guidance   pred = null + guidance (cond - null); 1 needs one pass per step
    seed       record k starts from the noise of (seed, its id), whatever stands beside it and whichever model draws
    size       images drawn at once; 0: as many as the task says
    context    (N, L, D) states in place of the prompts
    watch      called at each step as watch(positions, x_t, t, cond, null): trajectories
    """
    start = jump(model)
    if start:
        guidance, steps = 1.0, 1
    if guidance != 1 and task.null is None:
        raise SettingError("guidance needs the tokens of the empty prompt")
    shape = tuple(data.x.shape[1:]) if data.x is not None else task.shape
    if not shape:
        raise SettingError("say what shape is drawn: the prompts have no images")
    schedule, out = task.schedule, []
    times = torch.tensor([float(start)]) if start else schedule.path(steps)
    with quiet(model):
        for rows in torch.arange(len(data)).split(size or task.batch):
            n = len(rows)
            starts = [torch.Generator().manual_seed((seed * 1_000_003 + int(i)) % (1 << 62)) for i in data.ids[rows].tolist()]
            x = torch.stack([torch.randn(shape, generator=g) for g in starts]).to(device_of(model))
            if start:
                x = schedule.mix(times.to(x.device))[1] * x
            both = states(model, data.tokens[rows]) if context is None else context[rows]
            if guidance != 1:
                both = torch.cat([both, states(model, task.null[None]).expand(n, *both.shape[1:])])
            twice = rows if guidance == 1 else torch.cat([rows, rows])
            for k in range(steps):
                t = times[k].expand(n).to(x.device)
                copies = len(twice) // n
                found = task.forward(model, {"xt": torch.cat([x] * copies), "t": torch.cat([t] * copies), "states": both, "i": twice}).pred.split(n)
                cond, empty = found[0], found[-1]
                if watch is not None:
                    watch(rows, x, t, cond, empty)
                x, noise = schedule.parted(x, empty + guidance * (cond - empty), t)
                if k + 1 < steps:
                    a, b = schedule.mix(times[k + 1].expand(n).to(x.device))
                    x = a * x + b * noise
            out.append((x if task.decode is None else task.decode(x)).cpu())
    return torch.cat(out)


def emptied(data: Pictures, null: Tensor) -> Pictures:
    """The same records under the empty prompt."""
    return replace(data, tokens=null.expand(len(data), -1).clone(), rows=tuple({**r, "prompt": ""} for r in data.rows))
