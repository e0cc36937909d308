"""What a stream answers: probabilities among the classes of a task, by the network that holds it, here or from a folder of its own."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from expunge.core.files import write
from expunge.core.modality import of
from expunge.guarantees.exact.build import limited
from expunge.guarantees.exact.clpu.parts import Parts, tensors
from expunge.parts.reading import outputs


class Masked(nn.Module):
    """A network restricted to some classes, as `masked` does."""

    def __init__(self, net: nn.Module, classes: tuple[int, ...]) -> None:
        super().__init__()
        self.net: nn.Module = net
        self.classes = classes

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> (B, C)."""
        return masked(self.net(x), self.classes)


def masked(logits: Tensor, classes: tuple[int, ...]) -> Tensor:
    """(B, C) log probabilities among these classes; the others have the least number of the type, whose exponential is 0. `logits` is not written to.

    >>> masked(torch.tensor([[9.0, 1.0, 1.0]]), (1, 2)).exp()
    tensor([[0.0000, 0.5000, 0.5000]])
    """
    at = torch.tensor(classes, device=logits.device)
    least = torch.full_like(logits, torch.finfo(logits.dtype).min)
    return least.index_copy(1, at, logits.index_select(1, at).log_softmax(-1))


def module(parts: Parts, name: str) -> Masked:
    """(B, ...) inputs -> (B, C) log probabilities of a task: a copy. Raises SplitError for one that does not stand."""
    held = parts.held(name)
    return Masked(copy.deepcopy(parts.net(held.network or parts.state.main)), held.classes).eval()


def predict(parts: Parts, name: str, x: Tensor) -> Tensor:
    """(B, ...) inputs -> (B, C) probabilities of a task, 0 for classes of others. Raises as `module`."""
    held = parts.held(name)
    net = parts.net(held.network or parts.state.main)
    zeros = torch.zeros(len(x), dtype=torch.long)
    with limited(parts.training.threads):
        logits = outputs(net, parts.task, of(parts.task).rows(x, zeros, zeros))
    return masked(logits, held.classes).exp()


def save(parts: Parts, folder: Path | str) -> Path:
    """Write the networks in force and the classes of each task, and remove networks of tasks that stand no more. Returns the folder."""
    from safetensors.torch import save

    folder, state = Path(folder), parts.state
    tasks = {n: {"file": f"network-{n if e.network else 'main'}.safetensors", "classes": list(e.classes)} for n, e in state.tasks.items()}
    nets = {"network-main.safetensors": state.main} | {f"network-{n}.safetensors": e.network for n, e in state.tasks.items() if e.network}
    write(folder / "clpu.json", json.dumps({"tasks": tasks}, indent=1))
    for path in folder.glob("network-*.safetensors"):
        if path.name not in nets:
            path.unlink()
    for file, key in nets.items():
        write(folder / file, save(tensors(parts.net(key)), {"format": "pt"}))
    return folder
