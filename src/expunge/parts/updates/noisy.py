"""Noisy gradient descent of a softmax head: every record in every step, bounded gradients, noise of a stated source, a fixed number of steps.

Loss      L(w) = (1/n) sum_i l(w; x_i, y_i) + (lam/2) ||w||^2,  l = -log softmax(w x)_y,  w (C, D); a bias is a feature of its own that is 1.
Step      w <- w - eta grad L(w) + sqrt(2 eta sigma^2) N(0, I)
Start     w ~ N(0, sigma^2 / (lam (1 - eta lam / 2)) I): where the noise alone would end
Constants for ||x|| <= R.  Gradient (p - y) x^T, so its norm is ||p - y|| ||x|| < sqrt(2) R =: M: p - y is the difference of two points of the simplex.
          Hessian (diag(p) - p p^T) (x) x x^T. v^T (diag(p) - p p^T) v is the variance of v_k under p, at most (max v - min v)^2 / 4 <= ||v||^2 / 2, so
          0 <= Hessian <= beta := R^2 / 2: convex and beta-smooth. With the penalty, curvature lies in [lam, lam + beta], and a step with
          eta <= 1/(lam + beta) brings any two points together by 1 - eta lam. (eta <= 2/(2 lam + beta) would do; the card's is kept.)
Differs   The published way bounds gradients by clipping each at M. Clipped gradients of three classes or more are no gradients of a convex function: where
          clipping is active the step's Jacobian is (M / ||g||) (I - u u^T) H, u = g / ||g||, which is not monotone, and a step can carry two points
          apart (a test holds two that do). So rows are bounded instead, at R, before anything is learned, and M, beta above hold as they stand. With
          two classes p - y has one direction, a clipped gradient stays monotone in the margin, and `clip` is allowed. The public code clips the penalty too
          and can project onto a sphere; both break the contraction and are left out.
Limits    The proof is about real numbers. Noise is float64: the secure source adds four draws so that a sum does not give away its parts, which answers
          the known attack on one draw; what remains of floating-point leakage is not bounded here. A draw never exceeds 17.2,
          as a Gaussian does once in 10^65.
Paper     Chourasia, Shah 2023, arXiv 2210.08911. The secure source: Holohan, Braghin, Secure Random Sampling in Differential Privacy, 2021.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from expunge.core import guard
from expunge.core.errors import SettingError


@dataclass(frozen=True)
class Noise:
    """A source of standard normal float64 numbers: `draw(shape)`. `name` is `secure` or `seeded`."""

    name: str
    draw: Callable[[tuple[int, ...]], Tensor]


@dataclass(frozen=True)
class Run:
    """What a run did, for a certificate to check. `rows`: fewest records in a step; `norm`: a bound on the norm of every record's gradient."""

    asked: int
    taken: int
    n: int
    rows: int
    classes: int
    norm: float
    radius: float
    clip: float
    eta: float
    lam: float
    sigma: float
    noise: str


def seeded(seed: int) -> Noise:
    """Repeatable noise, for tests: whoever knows the seed can take it off again."""
    generator = torch.Generator().manual_seed(seed)
    return Noise("seeded", lambda shape: torch.randn(shape, generator=generator, dtype=torch.double))


def secure() -> Noise:
    """Noise from the system's generator: (z1 + z2 + z3 + z4) / 2, z = sqrt(-2 ln u) cos(2 pi v), with u in (0, 1] and v in [0, 1) of 53 random bits each."""

    def draw(shape: tuple[int, ...]) -> Tensor:
        size = math.prod(shape)
        whole = (np.frombuffer(os.urandom(64 * size), "<u8") >> np.uint64(11)).astype(np.float64).reshape(4, 2, size)
        z = np.sqrt(-2 * np.log((whole[:, 0] + 1) * 2.0**-53)) * np.cos(2 * np.pi * whole[:, 1] * 2.0**-53)
        return torch.from_numpy(z.sum(0) / 2).reshape(shape)

    return Noise("secure", draw)


def constants(radius: float) -> tuple[float, float]:
    """(M, beta) of the softmax loss over rows of norm at most `radius`: sqrt(2) R and R^2 / 2."""
    return math.sqrt(2) * radius, radius**2 / 2


def bounded(x: Tensor, radius: float, bias: bool = True) -> Tensor:
    """(n, D) float64 features: rows longer than `radius` are scaled onto it; with `bias`, a last column of ones. Each row depends on itself alone.

    >>> bounded(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), 1.0)
    tensor([[0.6000, 0.8000, 1.0000],
            [0.3000, 0.4000, 1.0000]], dtype=torch.float64)
    """
    x = x.detach().double()
    x = x * (radius / x.norm(dim=1, keepdim=True).clamp_min(radius)) * (1 - 1e-15)
    return torch.cat([x, x.new_ones(len(x), 1)], 1) if bias else x


def gradient(w: Tensor, x: Tensor, y: Tensor, lam: float, clip: float = math.inf) -> Tensor:
    """grad L at w (..., C, D) over rows x (n, D) and labels y (n,); leading dimensions are heads of their own. Each record's part is clipped at `clip`."""
    g = torch.softmax(x @ w.mT, -1)
    g = g - torch.nn.functional.one_hot(y, w.shape[-2]).to(g)
    if clip < math.inf:
        norm = g.norm(dim=-1) * x.norm(dim=1)
        g = g * (clip / norm.clamp_min(clip)).unsqueeze(-1)
    return g.mT @ x / len(x) + lam * w


def start(shape: tuple[int, ...], eta: float, lam: float, sigma: float, noise: Noise) -> Tensor:
    """Weights before the first step, float64: independent of all data."""
    return noise.draw(shape) * math.sqrt(sigma**2 / (lam * (1 - eta * lam / 2)))


def run(
    w: Tensor, x: Tensor, y: Tensor, *, eta: float, lam: float, sigma: float, steps: int, noise: Noise, clip: float = math.inf, batch_size: int = 0
) -> tuple[Tensor, Run]:
    """`steps` noisy steps from w; returns the last iterate, and what was done. Takes every step, whatever the loss and whatever budget is watched.

    batch_size   records per step, in order and around again; 0 takes all. Fewer than all run, but no certificate is made of them.

    Raises SettingError for eta, lam, sigma, clip or steps out of range.
    """
    for name, value, good in (
        ("eta", eta, eta > 0),
        ("lam", lam, lam > 0),
        ("sigma", sigma, sigma > 0),
        ("clip", clip, clip > 0),
        ("steps", steps, steps >= 0),
    ):
        if not good or value != value:
            raise SettingError(f"{name} must be larger than 0{' or 0' if name == 'steps' else ''}, not {value}")
    size, scale, at, taken = min(batch_size or len(x), len(x)), math.sqrt(2 * eta * sigma**2), 0, 0
    watch = guard.current()
    for k in range(steps):
        rows = slice(None) if size == len(x) else torch.arange(at, at + size, device=x.device) % len(x)
        w = w - eta * gradient(w, x[rows], y[rows], lam, clip) + scale * noise.draw(tuple(w.shape)).to(w.device)
        at, taken = (at + size) % len(x), taken + 1
        watch.meter.add(forward=size, backward=size)
        if watch.progress:
            watch.progress("noisy descent", k + 1, steps)
    radius = float(x.norm(dim=1).max())
    norm = min(clip, constants(radius)[0])
    return w, Run(steps, taken, len(x), size, w.shape[-2], norm, radius, clip, eta, lam, sigma, noise.name)
