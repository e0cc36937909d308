"""A lean dual encoder for small images and word tokens: for tests, demo and worlds, without any download.

Parts are named as in CLIP of transformers (`vision_model`, `text_model`, `visual_projection`, `text_projection`, `logit_scale`, and inside a tower
`encoder.layers.0.self_attn.q_proj`, `mlp.fc1`), so what is written for real folders fits. Like those, a tower ends in one pooled vector.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from expunge.modalities.diffusion.tiny import END


class Attention(nn.Module):
    """Multi-head self-attention, (B, N, D) -> (B, N, D)."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """All places read all others, or those before them."""
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers, twice as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.fc2(F.gelu(self.fc1(x)))


class Layer(nn.Module):
    """A pre-norm block."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attn, self.mlp = Attention(width, heads, causal), Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """Some blocks, one after another."""

    def __init__(self, width: int, depth: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(width, heads, causal) for _ in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        for layer in self.layers:
            x = layer(x)
        return x


class Vision(nn.Module):
    """Images (B, C, H, W) -> (B, width): patches, blocks, mean over patches."""

    def __init__(self, channels: int, side: int, patch: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(channels, width, patch, stride=patch)
        self.position_embedding = nn.Embedding((side // patch) ** 2, width)
        self.encoder, self.post_layernorm = Encoder(width, depth, heads, False), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, width)."""
        h = self.patch_embedding(x).flatten(2).transpose(1, 2) + self.position_embedding.weight
        return self.post_layernorm(self.encoder(h).mean(1))


class Text(nn.Module):
    """Tokens (B, L) -> (B, width): the state at the first end token, which has read all words."""

    def __init__(self, vocabulary: int, length: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.token_embedding, self.position_embedding = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.encoder, self.final_layer_norm = Encoder(width, depth, heads, True), nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L) -> (B, width)."""
        h = self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]
        h = self.final_layer_norm(self.encoder(h))
        return h[torch.arange(len(tokens), device=tokens.device), (tokens == END).int().argmax(1)]


class Clip(nn.Module):
    """Two towers, their projections into one space, and the log of the scale of cosines. Only tasks call it."""

    def __init__(self, vision_model: Vision, text_model: Text, width: int, space: int) -> None:
        super().__init__()
        self.vision_model, self.text_model = vision_model, text_model
        self.visual_projection, self.text_projection = nn.Linear(width, space, bias=False), nn.Linear(width, space, bias=False)
        self.logit_scale = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The scale starts at 1 / 0.07, as CLIP's does."""
        nn.init.constant_(self.logit_scale, math.log(1 / 0.07))


def clip_model(
    vocabulary: int, *, channels: int = 1, side: int = 8, patch: int = 2, width: int = 64, depth: int = 2, heads: int = 4, space: int = 32, length: int = 8
) -> Clip:
    """An untrained model of some 110,000 parameters at the default sizes; the text tower has one block."""
    return Clip(Vision(channels, side, patch, width, depth, heads), Text(vocabulary, length, width, 1, heads), width, space)
