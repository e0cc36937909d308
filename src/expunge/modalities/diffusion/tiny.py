"""A lean text-conditional diffusion model for images of 8 to 32 pixels, and its tokenizer: for tests, demo and worlds, without any download.

Parts are named as in diffusers (`unet`, `text_encoder`, `attn1`, `attn2.to_k`, `attn2.to_v`, `to_out.0`, `ff`), so scopes written for real pipelines fit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from expunge.core.errors import DataError

END = 0
"""Token that ends a prompt and fills it up."""


@dataclass(frozen=True)
class Words:
    """A tokenizer of whole words: lower case, split at spaces. Unknown words are left out."""

    words: tuple[str, ...]
    length: int = 8

    @property
    def size(self) -> int:
        """Tokens, the end token included."""
        return len(self.words) + 1

    def ids(self, prompt: str) -> list[int]:
        """Tokens of the known words."""
        index = {w: k for k, w in enumerate(self.words, 1)}
        return [index[w] for w in prompt.lower().split() if w in index]

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """(N, length) tokens, filled up with the end token. Raises DataError for a prompt that is too long, or of which no word is known."""
        out = torch.full((len(prompts), self.length), END, dtype=torch.long)
        for k, prompt in enumerate(prompts):
            found = self.ids(prompt)
            if prompt.strip() and not found:
                raise DataError(f"prompt '{prompt}' has no token: none of its words is known to the model")
            if len(found) >= self.length:
                raise DataError(f"prompt '{prompt}' has {len(found)} tokens; at most {self.length - 1} fit")
            out[k, : len(found)] = torch.tensor(found, dtype=torch.long)
        return out


def words(prompts: Iterable[str], length: int = 8) -> Words:
    """The tokenizer of all words in these prompts, in alphabetical order."""
    return Words(tuple(sorted({w for p in prompts for w in p.lower().split()})), length)


class Attention(nn.Module):
    """Multi-head attention from x (B, N, C) to a context (B, L, D), x itself when there is none."""

    def __init__(self, width: int, context: int | None = None, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context or width, width, bias=False)
        self.to_v = nn.Linear(context or width, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, context: Tensor | None = None, causal: bool = False) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        source = x if context is None else context
        q, k, v = (f(s).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f, s in ((self.to_q, x), (self.to_k, source), (self.to_v, source)))
        return self.to_out[0](F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2))


def feed_forward(width: int) -> nn.Sequential:
    """Two linear layers, twice as wide inside."""
    return nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))


class TextEncoder(nn.Module):
    """Embedding, position, and one causal pre-norm block: tokens (B, L) -> states (B, L, width)."""

    def __init__(self, vocabulary: int, width: int = 32, length: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(length + 4, width)
        self.norm1, self.norm2, self.final = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.ff = Attention(width), feed_forward(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, L) -> (B, L, width)."""
        return self.embedded(self.embedding(tokens))

    def embedded(self, x: Tensor) -> Tensor:
        """The same from word embeddings (B, L, width), where an attack puts its own."""
        x = x + self.position.weight[: x.shape[1]]
        x = x + self.attn(self.norm1(x), causal=True)
        return self.final(x + self.ff(self.norm2(x)))


class Residual(nn.Module):
    """Two 3x3 convolutions with group norm; the time scales and shifts between them. The second starts at zero."""

    def __init__(self, inputs: int, outputs: int, time: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, inputs), nn.GroupNorm(8, outputs)
        self.conv1, self.conv2 = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.time = nn.Linear(time, 2 * outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, inputs, H, W), (B, time) -> (B, outputs, H, W)."""
        scale, shift = self.time(t)[:, :, None, None].chunk(2, 1)
        h = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))


class Block(nn.Module):
    """Self-attention (optional), cross-attention to the text, feed-forward, over the pixels of a feature map."""

    def __init__(self, width: int, context: int, own: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width) if own else None
        self.attn1 = Attention(width) if own else None
        self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn2, self.ff = Attention(width, context), feed_forward(width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """(B, width, H, W), (B, L, D) -> (B, width, H, W)."""
        side, h = x.shape[-2:], x.flatten(2).transpose(1, 2)
        if self.attn1 is not None and self.norm1 is not None:
            h = h + self.attn1(self.norm1(h))
        h = h + self.attn2(self.norm2(h), context)
        h = h + self.ff(self.norm3(h))
        return h.transpose(1, 2).unflatten(2, side)


class UNet(nn.Module):
    """Three levels of `widths` channels: one residual block per level and side, text cross-attention on the two lower levels, self-attention on the lowest."""

    def __init__(self, channels: int = 1, widths: Sequence[int] = (16, 32, 64), context: int = 32, time: int = 64) -> None:
        super().__init__()
        a, b, c = widths
        self.width = a
        self.time = nn.Sequential(nn.Linear(2 * a, time), nn.SiLU(), nn.Linear(time, time), nn.SiLU())
        self.conv_in = nn.Conv2d(channels, a, 3, padding=1)
        self.down_blocks = nn.ModuleList([Residual(a, a, time), Residual(a, b, time), Residual(b, c, time)])
        self.down_attentions = nn.ModuleList([nn.Identity(), Block(b, context, False), Block(c, context, True)])
        self.mid_block = Residual(c, c, time)
        self.up_blocks = nn.ModuleList([Residual(2 * c, c, time), Residual(c + b, b, time), Residual(b + a, a, time)])
        self.up_attentions = nn.ModuleList([Block(c, context, True), Block(b, context, False), nn.Identity()])
        self.norm_out, self.conv_out = nn.GroupNorm(8, a), nn.Conv2d(a, channels, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """x_t (B, C, H, W), t (B,) in 0..1000 and states (B, L, D) -> prediction (B, C, H, W); H and W are multiples of 4."""
        frequency = torch.exp(-math.log(1000) * torch.arange(self.width, device=sample.device) / self.width)
        angle = timestep.float()[:, None] * frequency
        t = self.time(torch.cat([angle.sin(), angle.cos()], 1).to(sample.dtype))
        h, kept = self.conv_in(sample), []
        for k, (block, attention) in enumerate(zip(self.down_blocks, self.down_attentions, strict=True)):
            h = block(h if k == 0 else F.avg_pool2d(h, 2), t)
            h = attention(h, encoder_hidden_states) if isinstance(attention, Block) else h
            kept.append(h)
        h = self.mid_block(h, t)
        for k, (block, attention) in enumerate(zip(self.up_blocks, self.up_attentions, strict=True)):
            h = h if k == 0 else F.interpolate(h, scale_factor=2.0)
            h = block(torch.cat([h, kept.pop()], 1), t)
            h = attention(h, encoder_hidden_states) if isinstance(attention, Block) else h
        return self.conv_out(F.silu(self.norm_out(h)))


class Diffusion(nn.Module):
    """A `unet` and a `text_encoder`, which only tasks call.

    one_step    () the time at which it draws in one step, 0 for a model that draws in many; weights written before there was such a place read as 0
    """

    def __init__(self, unet: nn.Module, text_encoder: nn.Module) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder
        self.register_buffer("one_step", torch.zeros((), dtype=torch.long))
        self.register_load_state_dict_pre_hook(_many)

    def reset_parameters(self) -> None:
        """Draw in many steps."""
        self.get_buffer("one_step").zero_()


def _many(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    state.setdefault(f"{prefix}one_step", torch.zeros((), dtype=torch.long))


def diffusion_model(vocabulary: int, *, channels: int = 1, widths: Sequence[int] = (16, 32, 64), context: int = 32, length: int = 8) -> Diffusion:
    """An untrained model of some 0.5 M parameters at the default widths."""
    return Diffusion(UNet(channels, widths, context), TextEncoder(vocabulary, context, length))
