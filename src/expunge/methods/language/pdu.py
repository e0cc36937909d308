"""PDU: flatten the logits on the forget set as far as the retain loss stays below a bound, with a weight that follows from the bound.

Paper    Entesari et al., "Constrained Entropic Unlearning: A Primal-Dual Framework for Large Language Models", NeurIPS 2025, arXiv:2506.05314.
Code     locuslab/open-unlearning, MIT, commit d3d7cf9.
Forgets  records.          Needs    forget, retain.
Scope    all weights, LoRA or named layers.   Forget  mean over target tokens of (max_v z_v - mean_v z_v)^2, z the logits.
Retain   lambda (CE - eps), lambda_0 = alpha; every step or epoch after `hold` epochs lambda <- max(0, lambda + eta (CE - eps)), CE its mean since.
Update   AdamW on paired batches, and the dual variable lambda.   Leaves  Replace or LowRank.
Settings
    eps    largest CE on retain data that is asked for, in nats per token
    eta    step size of lambda
    hold   passes over forget before lambda moves
    every  step or epoch: how often it does
Differs  Logits and labels are aligned: the published mask is one token off. A step is a whole step, whatever it is put together from; the published
         code counts its parts. Published: eps .3, eta 5, hold 5, lambda_0 50 to 100 on TOFU; eta 1, hold 3, eps .1 to 1.5 on MUSE.
         A run that stops within `hold` passes never moves lambda: it is then a fixed weight.
Check
    >>> import torch; from expunge.modalities.language.task import aligned; from expunge.methods.language.pdu import moved, spread
    >>> spread(aligned(torch.tensor([[[2.0, 0.0, -2.0, 4.0]]]), torch.tensor([[0]])))
    tensor([9.])
    >>> moved(50.0, 0.5, eta=5.0, eps=0.3), moved(51.0, 0.2, eta=5.0, eps=0.3), moved(0.1, 0.2, eta=5.0, eps=0.3)
    (51.0, 50.5, 0.0)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from expunge.core.errors import SettingError
from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.session import remembering
from expunge.core.types import Out, Split, Task
from expunge.modalities.language.tuning import Tuning, cost, opened, tune
from expunge.parts.losses.language import kept, per_sequence, pooled

EVERY = ("step", "epoch")
NAME = "expunge_dual"


def spread(out: Out) -> Tensor:
    """(B,) sums over each sequence of (max_v z_v - mean_v z_v)^2."""
    each = (out.logits.amax(-1) - out.logits.mean(-1)) ** 2
    return per_sequence(each.masked_fill(~kept(out), 0.0), out, "sum")


def moved(dual: float, ce: float, *, eta: float, eps: float) -> float:
    """max(0, lambda + eta (CE - eps))."""
    return max(0.0, dual + eta * (ce - eps))


@method(
    paper="arXiv:2506.05314", tasks=("causal_lm",), needs=("forget", "retain"), cost=cost(), toy={"lr": 1e-3, "epochs": 10, "hold": 1.0}, forgets=("records",),
    place="code: locuslab/open-unlearning, TOFU (lambda_0 is 50 to 100)",
    lacks="on tofu-tiny it over-forgets: forgotten answers become less likely than unseen ones (loss AUC 0.13), and D is 1.06 of its critical value",
)  # fmt: skip
def pdu(
    model: nn.Module, task: Task, split: Split, *, eps: float = 0.3, eta: float = 5.0, hold: float = 5.0, every: str = "step",
    tuning: Tuning = Tuning(alpha=50.0, epochs=10.0), seed: int = 0,
) -> Patch:  # fmt: skip
    """See the module's docstring."""
    if every not in EVERY:
        raise SettingError(f"every must be one of {', '.join(EVERY)}, not '{every}'")
    if tuning.retain != "ce" or tuning.alpha <= 0:
        raise SettingError(f"pdu bounds CE on retain data: it needs retain=ce and alpha above 0, not {tuning.retain} and {tuning.alpha:g}")
    epoch = -(-len(split.forget) // tuning.batch_size) / tuning.accumulate
    period = 1 if every == "step" else max(1, round(epoch))
    state = torch.tensor([tuning.alpha, 0.0, 0.0], dtype=torch.float64)  # lambda, sum of CE since it last moved, steps since

    def forget(batch) -> Tensor:
        out = task.forward(model, batch)
        return pooled(spread(out), out, batch)

    def keep(batch) -> Tensor:
        out = task.forward(model, batch)
        ce = pooled(out.nll, out, batch)
        state[1] += float(ce.detach()) / tuning.accumulate
        return float(state[0]) / tuning.alpha * (ce - eps)

    def after(step: int) -> None:
        state[2] += 1
        if (step + 1) % period:
            return
        if step + 1 > hold * epoch:
            state[0] = moved(float(state[0]), float(state[1] / state[2]), eta=eta, eps=eps)
        state[1:] = 0

    return tune(model, task, split, forget, tuning, seed=seed, keep=keep, after=after, session=remembering(opened(model, tuning), model, {NAME: state}))
