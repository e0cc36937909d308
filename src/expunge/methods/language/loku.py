"""LoKU: move each answer token's probability to its runner-up, by LoRA that starts where the forget set's Fisher information is.

Paper    Cha et al., "Towards Robust and Parameter-Efficient Knowledge Unlearning for LLMs", ICLR 2025, arXiv:2408.06621.
Code     csm9493/efficient-llm-unlearning, MIT, commit 272484a.
Forgets  records.          Needs    forget, retain.
Scope    LoRA on all linear layers, B A fitted to the weights' rows of high F_f / F_r, the base reduced by B A.
Forget   mean over answer tokens of 1 + p_y - max over v != y of p_v.   Retain  ce, kl or none.   Update  AdamW on paired batches.   Leaves  LowRank.
Settings
    loss          ihl (the inverted hinge loss above) or ga (-CE)
    fila          start LoRA at the Fisher-weighted fit; False starts at B = 0
    fisher_batch  records per batch of the Fisher pass: F is that of batches, not of records, and depends on it
    budget        GiB for Fisher diagonals; more groups of layers, and a pass over both sets each, when they do not fit
Differs  The loss's clamp at 0 never acts (it lies in [0, 2]) and is left out. The code takes logits that all lie in [0, 1] for probabilities; here the
         softmax is always taken. A tie among runners-up shares its gradient evenly, so that no order of tokens matters. The SVD has its own seed,
         oversampling and power iterations. The adapter alone does not bring the old model back, since the base changed with it: the patch holds
         the trained product minus the first one, of rank 2 r, over the untouched base. Layers without forget gradient are left alone.
         Published ranks are 4 to 32, lr 1e-4 (Llama-2) and 2e-4 (phi-1.5).
Check
    >>> import torch; from expunge.core.types import Out
    >>> for z in ((1.0, 0.0, 0.0), (1.0, 0.5, 0.0)):
    ...     logits = torch.tensor([[z]], requires_grad=True)
    ...     value = hinge(Out(torch.zeros(1), torch.ones(1), logits, torch.tensor([[0]]))).sum()
    ...     print(round(value.item(), 6), [round(g, 6) for g in torch.autograd.grad(value, logits)[0].flatten().tolist()])
    1.364175 [0.366309, -0.183155, -0.183155]
    1.199285 [0.405547, -0.368415, -0.037131]
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor, nn

from expunge.core.errors import SettingError, suggest
from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.session import Session
from expunge.core.types import Out, Split, Task
from expunge.modalities.language.tuning import Tuning, cost, recomputing, tune
from expunge.parts.losses.language import kept, pooled
from expunge.parts.scopes.fila import fila as fitted
from expunge.parts.scopes.lora import linears, lora

LOSSES = ("ihl", "ga")


def hinge(out: Out) -> Tensor:
    """(B, T) 1 + p_y - max over v != y of p_v, with p = softmax(logits); 0 where a token does not count."""
    p = out.logits.softmax(-1)
    y = out.labels.clamp(min=0)[..., None]
    right = p.gather(-1, y).squeeze(-1)
    runner_up = p.scatter(-1, y, -1.0).amax(-1)
    return (1 + right - runner_up).masked_fill(~kept(out), 0.0)


@contextlib.contextmanager
def started(model: nn.Module, tuning: Tuning, start: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[Session]:
    """The session of LoRA adapters that begin at `start`, over the base less their product; as `tuning.opened` otherwise."""
    with lora(model, rank=tuning.lora, alpha=tuning.lora_alpha, start=start) as e:
        e.eval()
        with recomputing(model, tuning.checkpointing):
            yield e


def based(tuning: Tuning) -> Tuning:
    """The settings for `tune` under `started`: what retain=kl compares with is the model as it was, not the reduced base that LoRA's off view shows."""
    return replace(tuning, lora=0)


def _cost(n, s) -> tuple[float, float]:
    forward, backward = cost()(n, {**s, "lora": 0} if s["fila"] else s)
    passes = n["forget"] + n["retain"] if s["fila"] else 0
    return forward + passes, backward + passes


@method(
    paper="arXiv:2408.06621", tasks=("causal_lm",), needs=("forget", "retain"), cost=_cost, toy={"lr": 2e-3, "epochs": 10}, forgets=("records",),
    published={"batch_size": 2, "accumulate": 16}, place="code: csm9493/efficient-llm-unlearning, TOFU and Llama-2-7B",
    lacks="on tofu-tiny it costs more than half of the utility (0.91 to 0.42)",
)  # fmt: skip
def loku(
    model: nn.Module, task: Task, split: Split, *, loss: str = "ihl", fila: bool = True, fisher_batch: int = 2, budget: float = 4.0,
    tuning: Tuning = Tuning(lr=1e-4, batch_size=32, lora=16, weight_decay=0.01), seed: int = 0,
) -> Patch:  # fmt: skip
    """See the module's docstring."""
    if loss not in LOSSES:
        raise SettingError(suggest("loku has no loss", loss, LOSSES))
    if tuning.lora < 1:
        raise SettingError(f"loku trains adapters: set lora to 1 or more, not {tuning.lora}")

    def forget(batch) -> Tensor:
        out = task.forward(model, batch)
        return pooled(hinge(out).sum(1) if loss == "ihl" else -out.nll, out, batch)

    if not fila:
        return tune(model, task, split, forget, tuning, seed=seed)
    scale = (tuning.lora_alpha or 2.0 * tuning.lora) / tuning.lora
    names = linears(model, tuning.layers)
    start = fitted(model, task, split.forget, split.retain, names, rank=tuning.lora, scale=scale, size=fisher_batch, budget=budget, seed=seed)
    return tune(model, task, split, forget, based(tuning), seed=seed, session=started(model, tuning, start))
