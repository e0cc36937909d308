"""UNSIR: learn noise that the model finds most unlike the removed class, impair the model with it, then repair on retain.

Paper    Tarun et al., "Fast Yet Effective Machine Unlearning", TNNLS 2023, arXiv:2111.08947.          Code     vikram2000b/Fast-Machine-Unlearning.
Forgets  class.          Needs    forget, retain.
Scope    all weights.   Forget  CE on noise images that carry the removed label, noise = argmin -CE(f(noise), c) + decay * mean ||noise||^2.
Retain   CE on a sample while impairing, on all of retain while repairing.   Update  two Adam phases.   Leaves  Replace.
Settings
    steps          Adam steps on the noise
    noise_lr       step size on the noise, in units of the model's input
    decay          weight of the noise's squared size
    copies         passes over the noise in the impair phase
    sample         retain examples per kept class that are mixed into the impair phase
    impair_lr      step size while impairing
    repair_lr      step size while repairing
    repair         passes over retain in the repair phase
    batch_size     noise images per removed class, and examples per step
    buffers        move, freeze or recompute: what happens to batch-norm statistics
Differs  The forget set only names the classes and the shape of an input. The notebook gives every noise image the label 0; here it is the removed
         class. Published: impair at .02, one pass of repair at .01, 1,000 retain examples per class; a later notebook uses 1e-4.
Check
    >>> import torch; from expunge.methods.classifiers.unsir import noise_loss
    >>> round(float(noise_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([1]), torch.full((1, 4), 2.0), 0.1)), 4)
    -0.2931
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from expunge.core.errors import SplitError
from expunge.core.guard import quiet
from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.session import edit
from expunge.core.types import Split, Task, absent
from expunge.modalities.examples import Examples
from expunge.parts.losses import nll
from expunge.parts.scopes.layers import everything
from expunge.parts.updates.descend import alternate


def noise_loss(logits: Tensor, labels: Tensor, noise: Tensor, decay: float) -> Tensor:
    """-CE(logits, labels) + decay * mean over images of ||noise||^2 / pixels: minimised, the noise is what the class is least like."""
    return -F.cross_entropy(logits, labels) + decay * noise.square().mean()


def _cost(n, s) -> tuple[float, float]:
    made, mixed = s["batch_size"], 10 * s["sample"]
    trained = s["copies"] * made + min(mixed, n["retain"]) + s["repair"] * n["retain"]
    return s["steps"] * made + trained, s["steps"] * made + trained


@method(
    paper="arXiv:2111.08947", tasks=("classification",), needs=("forget", "retain"), cost=_cost, toy={"impair_lr": 0.005, "repair": 3.0},
    published={"impair_lr": 0.02, "repair_lr": 0.01, "repair": 1.0}, place="code: vikram2000b/Fast-Machine-Unlearning",
    lacks="on digits it closes 0.47 of the gap and costs 7.5 points of retain accuracy",
)  # fmt: skip
def unsir(
    model: nn.Module,
    task: Task,
    split: Split,
    *,
    steps: int = 40,
    noise_lr: float = 0.1,
    decay: float = 0.1,
    copies: int = 20,
    sample: int = 100,
    impair_lr: float = 0.005,
    repair_lr: float = 0.005,
    repair: float = 3.0,
    batch_size: int = 64,
    buffers: str = "move",
    seed: int = 0,
) -> Patch:
    """See the module's docstring."""
    removed = absent(split.forget.y, split.retain.y).tolist()
    if not removed:
        raise SplitError("unsir removes classes: the forget set must hold a class of which retain has no record")
    shape = split.forget.x.shape[1:]
    made, labels = [], torch.tensor(removed).repeat_interleave(batch_size)
    with quiet(model), torch.enable_grad():
        for c in removed:
            noise, y = torch.randn(batch_size, *shape).requires_grad_(True), torch.full((batch_size,), c)
            stepper = torch.optim.Adam([noise], noise_lr)
            for _ in range(steps):
                out = task.forward(model, {"x": noise, "y": y, "i": torch.arange(batch_size)})
                (noise.grad,) = torch.autograd.grad(noise_loss(out.logits, y.to(out.logits.device), noise, decay), noise)
                stepper.step()
            made.append(noise.detach())
    noise = torch.cat(made)
    kept = torch.cat([(split.retain.y == c).nonzero().squeeze(1)[:sample] for c in split.retain.y.unique()])
    mix = Examples(
        torch.cat([noise.repeat(copies, *[1] * len(shape)), split.retain.x[kept]]),
        torch.cat([labels.repeat(copies), split.retain.y[kept]]),
        torch.arange(copies * len(noise) + len(kept)),
    )

    def loss(batch) -> Tensor:
        return nll(task.forward(model, batch)).mean()

    with edit(model, everything(model, buffers), stats=task.batches(split.retain, 256)) as e:
        e.train()
        phases = (loss, task.batches(mix, batch_size, seed=seed)), (loss, task.batches(split.retain, batch_size, epochs=repair, seed=seed + 1))
        alternate(e, *phases, lr=impair_lr, optimizer="adam", decay=lambda phase: repair_lr / impair_lr if phase else 1.0)
    return e.patch
