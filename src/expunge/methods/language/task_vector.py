"""Task vector: fine-tune on what must go, and walk the same way in the other direction.

Paper    Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023, arXiv:2212.04089; for unlearning: Shi et al., "MUSE", arXiv:2407.06460.
Code     swj0419/muse_bench, no licence (read only).
Forgets  records.          Needs    forget.
Scope    all weights, LoRA or named layers.   Forget  theta = theta_0 - scale (theta_ft - theta_0), theta_ft trained on CE over forget.
Retain   none.   Update  AdamW, then weight arithmetic.   Leaves  Replace or LowRank.
Settings
    scale   how far to walk; 5 in the code of MUSE
Differs  Under LoRA the vector is (alpha / r) B A, and B is multiplied by - scale. A model that knows the forget set by heart gets hardly any gradient
         from it: there the vector is noise, and more epochs only lengthen it.
Check
    >>> import torch; from expunge.methods.language.task_vector import away
    >>> away(torch.tensor(1.0), torch.tensor(1.2), 5.0).abs() < 1e-6, away(torch.tensor(2.0), torch.tensor(2.5), 3.0)
    (tensor(True), tensor(0.5000))
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from expunge.core.errors import SettingError
from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.session import Session
from expunge.core.types import Split, Task
from expunge.modalities.language.tuning import Tuning, cost, opened, tune
from expunge.parts.losses.language import pooled


def away(base: Tensor, tuned: Tensor, scale: float) -> Tensor:
    """base - scale (tuned - base), computed in float32 at least."""
    b, t = (v if v.dtype == torch.float64 else v.float() for v in (base, tuned))
    return (b - scale * (t - b)).to(base)


@contextlib.contextmanager
def reversing(model: nn.Module, tuning: Tuning, scale: float) -> Iterator[Session]:
    """The session that the settings ask for, whose weights go the other way when it closes; validation sees only that end."""
    with opened(model, tuning) as e:
        base = {n: p.detach().clone() for n, p in e.params.items()}
        e.judged = False
        yield e
        e.judged = True
        with torch.no_grad():
            for name, p in e.params.items():
                if not tuning.lora:
                    p.copy_(away(base[name], p, scale))
                elif name.endswith("lora_B"):
                    p.mul_(-scale)


@method(
    paper="arXiv:2212.04089", tasks=("causal_lm",), needs=("forget",), cost=cost(), toy={"lr": 1e-3, "epochs": 10, "scale": 1.0}, forgets=("records",),
    published={"epochs": 10.0, "batch_size": 32}, place="code: scripts of swj0419/muse_bench",
    lacks="on tofu-tiny it destroys the model (utility 0.91 to 0.02)",
)  # fmt: skip
def task_vector(
    model: nn.Module, task: Task, split: Split, *, scale: float = 5.0, tuning: Tuning = Tuning(retain="none"), seed: int = 0,
) -> Patch:  # fmt: skip
    """See the module's docstring."""
    if tuning.retain != "none":
        raise SettingError(f"task_vector trains on the forget set alone: set retain=none, not {tuning.retain}")

    def forget(batch) -> Tensor:
        return pooled((out := task.forward(model, batch)).nll, out, batch)

    return tune(model, task, split, forget, tuning, seed=seed, session=reversing(model, tuning, scale))
