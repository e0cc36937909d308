"""TNPO: gradient ascent with a weight on every token, which falls once the token is less likely than the model as it was found it.

Paper    Wang et al., "Rethinking LLM Unlearning Objectives: A Gradient Perspective and Go Beyond", ICLR 2025, arXiv:2502.19301.
Code     tmlr-group/G-effect, no licence (read only).
Forgets  records.          Needs    forget; retain unless retain=none.
Scope    all weights, LoRA or named layers.   Forget  - mean over target tokens of sg( w_t ) l_t, w_t = 2 p_t^b / (p_t^b + pref_t^b + 1e-5).
Retain   ce, kl or none.   Update  AdamW on paired batches.   Leaves  Replace or LowRank.
Settings
    b         power of both probabilities
    weighted  WTNPO: w_t times p_t^1.5
Differs  pref_t is one number per target token, computed before the first step: no second model. Learning rate and epochs are those that
         open-unlearning has for WGA, of the same paper.
Check
    >>> import torch; from expunge.methods.language.tnpo import weights
    >>> p, pref = torch.tensor([0.5]), torch.tensor([0.8])
    >>> [round(float(weights(p, pref, b=4.0, weighted=w)), 6) for w in (False, True)]    # the second is the first times .5^1.5
    [0.264769, 0.09361]
"""

from __future__ import annotations

from torch import Tensor, nn

from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.types import Batch, Out, Split, Task
from expunge.modalities.language.remember import token_logp
from expunge.modalities.language.tuning import Scored, Tuning, cost, tune
from expunge.parts.losses.language import per_sequence, place, pooled, probability


def weights(p: Tensor, reference: Tensor, *, b: float, weighted: bool = False) -> Tensor:
    """w_t of tokens with probabilities p now and `reference` in the model as it was; no gradient."""
    now = p.detach() ** b
    w = 2 * now / (now + reference.to(now) ** b + 1e-5)
    return w * p.detach() ** 1.5 if weighted else w


def token_npo(out: Out, reference: Tensor, *, b: float, weighted: bool = False) -> Tensor:
    """(B,) sums over each sequence of - sg( w_t ) l_t, for reference probabilities (B, T)."""
    return -per_sequence(weights(probability(out), reference, b=b, weighted=weighted) * out.units, out, "sum")


@method(
    paper="arXiv:2502.19301", tasks=("causal_lm",), needs=("forget",), cost=cost(once=1), toy={"lr": 1e-3, "epochs": 10}, forgets=("records",),
    place="code: tmlr-group/G-effect for b; the card names no step size or epochs of its own",
    lacks="on tofu-tiny two seeds of three are told from the gold model (D 0.83 to 1.33 of its critical value)",
)  # fmt: skip
def tnpo(
    model: nn.Module, task: Task, split: Split, *, b: float = 4.0, weighted: bool = False, tuning: Tuning = Tuning(), seed: int = 0,
) -> Patch:  # fmt: skip
    """See the module's docstring."""
    reference = token_logp(model, task, split.forget)

    def forget(out: Out, batch: Batch) -> Tensor:
        return pooled(token_npo(out, place(reference, batch, out).exp(), b=b, weighted=weighted), out, batch)

    return tune(model, task, split, Scored(forget), tuning, seed=seed)
