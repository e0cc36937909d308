"""FLAT: raise the probability of a template answer and lower that of the true one, through the variational form of an f-divergence.

Paper    Wang et al., "LLM Unlearning via Loss Adjustment with Only Forget Data", ICLR 2025, arXiv:2410.11143.
Code     UCSC-REAL/FLAT, Apache-2.0, commit bf2ef07.
Forgets  records.          Needs    forget, anchor (a template answer, as a refusal, to each forget question, row by row).
Scope    all weights, LoRA or named layers.
Forget   mean of -g(P_e) + f*(g(P_f)); P_e, P_f the mean probability of a target token of the template and of the true answer, per record.
Retain   none; ce or kl if asked for.   Update  AdamW.   Leaves  Replace or LowRank.
Settings
    divergence   tv, kl, pearson, js, jeffrey, reverse_kl, hellinger or neyman: which g and f*
    probability  mean: of the token probabilities; geometric: exp(-S / |y|), which is the sequence's own
    published    reverse_kl, hellinger and neyman as released, with the wrong sign (see Differs)
Differs  In the code three divergences lost the sign of an argument: with reverse_kl, hellinger and neyman the loss falls as the template becomes less
         likely, and with the first two as the true answer becomes likelier. Here g rises: -exp(-v), 1 - exp(-v), 1 - exp(-v). The conjugate of jeffrey is
         the code's polynomial. The code divides by all places of the padded sequence (500 or 1,024), so that P and the step shrink with padding; here by
         |y|. It applies the divergence to the mean of P over the batch; here to each record. Its Harry Potter path takes other corpora as templates.
         A probability gives hardly any gradient where the model thinks a token unlikely, as in templates: learning starts slowly.
Check
    >>> import torch; from expunge.methods.language.flat import adjusted
    >>> e, f = (torch.tensor([v], dtype=torch.double) for v in (0.2, 0.6))
    >>> {d: round(float(adjusted(e, f, d)), 6) for d in ("tv", "kl", "pearson", "js", "jeffrey")}
    {'tv': 0.169837, 'kl': 0.47032, 'pearson': 0.49, 'js': 0.249332, 'jeffrey': 0.5035}
    >>> {d: (round(float(adjusted(e, f, d)), 6), round(float(adjusted(e, f, d, published=True)), 6)) for d in ("reverse_kl", "hellinger", "neyman")}
    {'reverse_kl': (0.418731, -0.378597), 'hellinger': (0.64085, -0.229786), 'neyman': (0.337094, 0.956492)}
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from expunge.core.errors import SettingError
from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.types import Out, Split, Task
from expunge.methods.language.idk_nll import answered
from expunge.modalities.language.tuning import Tuning, cost, tune
from expunge.parts.losses.language import kept, per_sequence, probability

Terms = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
"""v -> -g(v), and v -> f*(g(v))."""

DIVERGENCES: dict[str, Terms] = {
    "tv": (lambda v: -torch.tanh(v) / 2, lambda v: torch.tanh(v) / 2),
    "kl": (lambda v: -v, lambda v: torch.exp(v - 1)),
    "pearson": (lambda v: -v, lambda v: v**2 / 4 + v),
    "js": (lambda v: softplus(-v) - math.log(2), lambda v: softplus(v) - math.log(2)),
    "jeffrey": (lambda v: -v, lambda v: v + v**2 / 4 + v**3 / 16),
    "reverse_kl": (lambda v: torch.exp(-v), lambda v: v - 1),
    "hellinger": (lambda v: torch.exp(-v) - 1, lambda v: torch.exp(v) - 1),
    "neyman": (lambda v: torch.exp(-v) - 1, lambda v: 2 - 2 * torch.exp(-v / 2)),
}
RELEASED: dict[str, Terms] = {
    "reverse_kl": (torch.exp, lambda v: -1 - v),
    "hellinger": (lambda v: torch.exp(v) - 1, lambda v: torch.exp(-v) - 1),
    "neyman": (lambda v: torch.exp(v) - 1, lambda v: 2 - 2 * torch.sqrt(1 - v)),
}
PROBABILITIES = ("mean", "geometric")


def adjusted(template: Tensor, forget: Tensor, divergence: str, *, published: bool = False) -> Tensor:
    """-g(P_e) + f*(g(P_f)), (B,). It falls as P_e rises and as P_f falls, but for `published` forms."""
    if divergence not in DIVERGENCES:
        raise SettingError(f"divergence must be one of {', '.join(DIVERGENCES)}, not '{divergence}'")
    e, f = (RELEASED if published and divergence in RELEASED else DIVERGENCES)[divergence]
    return e(template) + f(forget)


def likelihood(out: Out, kind: str) -> Tensor:
    """(B,) P: the mean probability of a target token, or their geometric mean."""
    if kind not in PROBABILITIES:
        raise SettingError(f"probability must be one of {', '.join(PROBABILITIES)}, not '{kind}'")
    return torch.exp(-out.mean) if kind == "geometric" else per_sequence(probability(out).masked_fill(~kept(out), 0.0), out)


@method(
    paper="arXiv:2410.11143", tasks=("causal_lm",), needs=("forget", "anchor"), cost=cost(forward=2, backward=2),
    toy={"lr": 1e-3, "epochs": 10, "accumulate": 1}, forgets=("records",),
    place="code: config/forget.yaml (lr, TOFU) and the Harry Potter script (batches, epochs, decay)",
    lacks="on tofu-tiny one seed of three is told from the gold model (D 0.42 to 1.33 of its critical value)",
)  # fmt: skip
def flat(
    model: nn.Module, task: Task, split: Split, *, divergence: str = "tv", probability: str = "mean", published: bool = False, seed: int = 0,
    tuning: Tuning = Tuning(epochs=5.0, batch_size=4, accumulate=4, retain="none", weight_decay=0.01, schedule="linear"),
) -> Patch:  # fmt: skip
    """See the module's docstring."""
    templates = answered(split)

    def loss(batch) -> Tensor:
        e = likelihood(task.forward(model, task.collate(templates, batch["i"], None)), probability)
        f = likelihood(task.forward(model, batch), probability)
        return adjusted(e, f, divergence, published=published).mean()

    return tune(model, task, split, loss, tuning, seed=seed)
