"""Regression: one or several real targets per example; nll is half the squared error."""

from __future__ import annotations

import torch
from torch import nn

from expunge.core.errors import ModelError
from expunge.core.types import Batch, Out, Task
from expunge.modalities.classification.task import answers, collate, features, inputs


def regression() -> Task:
    """The task of models that map (B, ...) inputs to (B,), (B, 1) or (B, K) predictions.

    (B, 1) predictions are matched to (B,) targets by rows, never broadcast to (B, B).

    >>> task = regression()
    >>> out = task.forward(nn.Identity(), {"x": torch.tensor([[2.0], [0.0]]), "y": torch.tensor([0.0, 0.0]), "i": torch.arange(2)})
    >>> out.nll
    tensor([2., 0.])
    """
    return Task("regression", collate, _forward, features)


def _forward(model: nn.Module, batch: Batch) -> Out:
    pred = answers(model(inputs(model, batch)))
    target = batch["y"].to(pred.device, pred.dtype)
    if pred.numel() != target.numel():
        raise ModelError(f"the model predicts {tuple(pred.shape)} for targets {tuple(target.shape)}; they must hold equally many numbers")
    pred = pred.reshape(target.shape)
    wide = pred.float() if pred.dtype in (torch.float16, torch.bfloat16) else pred
    nll = ((wide - target) ** 2 / 2).flatten(1).sum(1) if target.ndim > 1 else (wide - target) ** 2 / 2
    return Out(nll=nll, count=torch.ones_like(nll), pred=wide, target=target)
