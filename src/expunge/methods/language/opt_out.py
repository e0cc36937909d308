"""Opt-Out: NPO on an entity's facts, with a transport distance that holds the weights near where they were.

Paper    Choi et al., "Opt-Out: Investigating Entity-Level Unlearning for Large Language Models via Optimal Transport", arXiv:2406.12329.
Code     brightjade/Opt-Out, MIT, commit 995babb (read only).
Forgets  records, an entity (see data.entity).          Needs    forget; retain unless retain=none.
Scope    all weights, LoRA or named layers.   Forget  -(2 / beta) log sigmoid( beta (l - l_ref) ), l the answer loss per token.
Retain   ce, kl or none, + anchor * sum over tensors of SW2^2(theta, theta0).   Update  AdamW on paired batches.   Leaves  Replace or LowRank.
Settings
    beta         inverse temperature
    reduction    mean: l of each record; pooled: one l over all tokens of a batch, as the code has it; sum: NPO's own
    anchor       weight of the transport distance
    projections  random directions per tensor and step
    tensors      tensors drawn per step, their sum scaled up to all; 0 takes all
Differs  The code pools tokens over the batch, so that what a record does depends on its neighbours and long answers count more (reduction=pooled).
         It takes neighbours, generic instructions and forget records in turn; here each step has a forget and a retain batch, and both kinds of
         retain records are given as retain. Under LoRA the distance is that of the sums W + s B A from W. SW2 ignores the order of rows, and is
         the dearest term of a step: for large models draw few tensors.
Check
    >>> import torch; from expunge.core.types import Out
    >>> out = Out(torch.tensor([3.0, 1.0]), torch.tensor([4.0, 1.0]))
    >>> forgetting(out, torch.tensor([1.0, 1.0]), 0.1, "mean"), forgetting(out, torch.tensor([1.0, 1.0]), 0.1, "pooled")
    (tensor([13.3692, 13.8629]), tensor([13.4669]))
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
from expunge.core.types import IGNORE, Out, Split, Task
from expunge.modalities.language.remember import sequence_nll
from expunge.modalities.language.tuning import Tuning, cost, opened, tune
from expunge.parts.losses import language as losses
from expunge.parts.losses.transport import sliced_w2

REDUCTIONS = ("mean", "pooled", "sum")


def forgetting(out: Out, reference: Tensor, beta: float, reduction: str) -> Tensor:
    """NPO per record, (B,); or, pooled, of the batch as one sequence, (1,)."""
    if reduction != "pooled":
        return losses.npo(out, reference, beta=beta, reduction=reduction)
    return losses.npo(Out(out.nll.sum()[None], out.count.sum()[None]), reference.sum()[None], beta=beta, reduction="mean")


@method(
    paper="arXiv:2406.12329", tasks=("causal_lm",), needs=("forget",), cost=cost(once=1), toy={"lr": 1e-3, "epochs": 10, "beta": 1.0}, forgets=("records",),
    published={"reduction": "pooled"}, place="code: brightjade/Opt-Out",
    lacks="on tofu-tiny it is still told from a model that never knew: D is 1.86 of its critical value, a second gold model's 0.50",
)  # fmt: skip
def opt_out(
    model: nn.Module, task: Task, split: Split, *, beta: float = 0.1, reduction: str = "mean", anchor: float = 0.1, projections: int = 100,
    tensors: int = 0, tuning: Tuning = Tuning(epochs=3.0), seed: int = 0,
) -> Patch:  # fmt: skip
    """See the module's docstring."""
    if reduction not in REDUCTIONS:
        raise SettingError(f"reduction must be one of {', '.join(REDUCTIONS)}, not '{reduction}'")
    reference = sequence_nll(model, task, split.forget)
    here: list[Session] = []
    start: dict[str, Tensor] = {}

    def forget(batch) -> Tensor:
        return forgetting(task.forward(model, batch), reference[batch["i"]], beta, reduction).mean()

    def near(batch) -> Tensor:
        generator = torch.Generator().manual_seed(1_000_003 * seed + batch["step"])
        names = list(start)
        drawn = torch.randperm(len(names), generator=generator)[: tensors or len(names)].tolist()
        apart = [sliced_w2(now(model, here[0], names[k], tuning), start[names[k]], projections, generator) for k in drawn]
        return anchor * len(names) * torch.stack(apart).mean()

    @contextlib.contextmanager
    def session() -> Iterator[Session]:
        with opened(model, tuning) as e:
            here.append(e)
            start.update({name: now(model, e, name, tuning).detach().clone() for name in weights(e)})
            yield e

    steps = len(task.batches(split.forget, tuning.batch_size, epochs=tuning.epochs, seed=seed))
    label = torch.full((1, 1), IGNORE)
    more = {"near": ([{"y": label, "step": k} for k in range(steps)], near)} if anchor else None
    return tune(model, task, split, forget, tuning, seed=seed, more=more, session=session() if anchor else None)


def weights(e: Session) -> list[str]:
    """The weights that a session moves: its parameters, or the layers that its adapters stand on."""
    return list(dict.fromkeys(name.removesuffix(".lora_A").removesuffix(".lora_B") for name in e.params))


def now(model: nn.Module, e: Session, name: str, tuning: Tuning) -> Tensor:
    """The weight of that name as it is: a parameter, or W + s B A of an adapted layer."""
    if name in e.params:
        return e.params[name]
    w = model.get_submodule(name).get_base_layer().weight  # pyright: ignore
    scale = (tuning.lora_alpha or 2.0 * tuning.lora) / tuning.lora
    return w.float() + scale * (e.params[f"{name}.lora_B"] @ e.params[f"{name}.lora_A"])
