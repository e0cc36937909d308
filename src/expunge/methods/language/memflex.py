"""MemFlex: ascent on forget and descent on retain answers, in those LoRA matrices alone whose gradients set the two apart.

Paper    Tian et al., "To Forget or Not? Towards Practical Knowledge Unlearning for LLMs", EMNLP 2024 Findings, arXiv:2407.01920.
Code     zjunlp/KnowUnDo, MIT, commit 92aea2b.
Forgets  records.          Needs    forget, retain (best about the same subjects).
Scope    LoRA matrices with cosine(g_f, g_r) < mu and mean |g_f| > sigma, g the mean gradients on answers with noise.
Forget   -0.4 CE.   Retain  2 CE (or kl, none).   Update  AdamW on paired batches, means per sequence.   Leaves  LowRank.
Settings
    select  quantile: of the matrices of one kind (as q_proj.lora_A) with cosine < mu, the share with the largest mean |g_f|; absolute: all above sigma
    share   kept share of each kind, for select=quantile
    mu      cosine from which on a matrix is left alone
    sigma   smallest mean |g_f|, for select=absolute: 6e-4 is published, and holds for one scale of adapters, loss and data only
    copies  noisy copies of each record that gradients are taken on
    noise   share of the answer's tokens that are replaced by random ones, in inputs and labels alike
Differs  Published is the unlearning of an adapter that was trained on the data. Here adapters are new: at B = 0 the gradient of A is zero, so they start
         at the first r singular vectors of each weight, which is reduced by their product; the model's function is the same at the start. Matrices
         that are not kept do not enter the optimizer, so that weight decay leaves them alone. A cosine with a zero gradient counts as 1. Special tokens
         are never replaced nor drawn (the code's test for them works for small ids only). The card of the data has the loss as -CE_f + CE_r; the
         weights here are those of the code. The variant that selects again at each step is left out. The kept matrices stand in the patch's meta data.
Check
    >>> import torch
    >>> f = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([1.0, 0.0]), "c": torch.tensor([1e-4, 0.0])}
    >>> located(f, {"a": torch.tensor([1.0, 1.0]), "b": torch.tensor([1.0, 0.1]), "c": torch.tensor([0.0, 1.0])}, 0.92, 6e-4)
    ['a']
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from expunge.core.errors import ScopeError, SettingError, suggest
from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.session import Session
from expunge.core.types import Batch, Split, Task, concat
from expunge.methods.language.loku import based, started
from expunge.modalities.language.texts import Texts
from expunge.modalities.language.tuning import Tuning, cost, tune
from expunge.parts.scopes.fila import fit
from expunge.parts.scopes.lora import linears

SELECT = ("quantile", "absolute")


def statistics(forget: Mapping[str, Tensor], retain: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
    """(cosine of g_f and g_r, mean |g_f|) of each tensor, flattened; the cosine is 1 where a gradient is zero."""
    found = {}
    for name, g in forget.items():
        f, r = g.double().flatten(), retain[name].double().flatten()
        length = float(f.norm() * r.norm())
        found[name] = (float(f @ r) / length if length > 0 else 1.0, float(f.abs().mean()))
    return found


def located(forget: Mapping[str, Tensor], retain: Mapping[str, Tensor], mu: float, sigma: float) -> list[str]:
    """Names of the tensors with cosine(g_f, g_r) < mu and mean |g_f| > sigma."""
    return [n for n, (cosine, size) in statistics(forget, retain).items() if cosine < mu and size > sigma]


def largest(forget: Mapping[str, Tensor], retain: Mapping[str, Tensor], mu: float, share: float) -> list[str]:
    """Of the tensors of one kind (the last two words of the name) with 0 < mean |g_f| and cosine < mu: the share (at least one) with the largest mean |g_f|."""
    found = {n: size for n, (cosine, size) in statistics(forget, retain).items() if cosine < mu and size > 0}
    kinds: dict[str, list[str]] = {}
    for name in found:
        kinds.setdefault(".".join(name.split(".")[-2:]), []).append(name)
    kept = {n for kind in kinds.values() for n in sorted(kind, key=lambda n: -found[n])[: max(1, round(share * len(kind)))]}
    return [n for n in forget if n in kept]


def noisy(data: Texts, vocabulary: int, *, copies: int, share: float, generator: torch.Generator) -> Texts:
    """`copies` of each record in which the share (at least one) of the answer's tokens is replaced by random ones; special tokens stay and are never drawn."""
    special = set() if data.format is None else set(data.format.tokenizer.all_special_ids)
    words = torch.tensor([v for v in range(vocabulary) if v not in special])

    def one(tokens: Tensor, targets: Tensor) -> Tensor:
        where = [t for t in targets.nonzero().flatten().tolist() if int(tokens[t]) not in special]
        chosen = torch.tensor(where, dtype=torch.long)[torch.randperm(len(where), generator=generator)[: max(1, round(share * len(where)))]]
        out = tokens.clone()
        out[chosen] = words[torch.randint(len(words), (len(chosen),), generator=generator)]
        return out

    return concat(*(replace(data, tokens=tuple(one(*pair) for pair in zip(data.tokens, data.targets, strict=True))) for _ in range(copies)))


def gradients(model: nn.Module, task: Task, data: Texts, params: Mapping[str, Tensor], size: int) -> dict[str, Tensor]:
    """Mean over the records of the gradient of their CE per token."""
    total = {n: torch.zeros_like(p) for n, p in params.items()}
    batches = task.batches(data, size)
    for k in range(len(batches)):
        loss = task.forward(model, batches[k]).mean.sum()
        for name, grad in zip(params, torch.autograd.grad(loss, list(params.values()), allow_unused=True), strict=True):
            if grad is not None:
                total[name] += grad
    return {n: t / len(data) for n, t in total.items()}


def hold(session: Session, names: list[str]) -> None:
    """Leave only these tensors in the session: no optimizer sees the others."""
    for name in set(session.params) - set(names):
        session.params.pop(name).requires_grad_(False)
        session.masks.pop(name)


def _cost(n, s) -> tuple[float, float]:
    forward, backward = cost()(n, {**s, "lora": 0})
    passes = s["copies"] * (n["forget"] + n["retain"])
    return forward + passes, backward + passes


@method(
    paper="arXiv:2407.01920",
    tasks=("causal_lm",),
    needs=("forget", "retain"),
    cost=_cost,
    toy={"lr": 2e-3, "epochs": 10, "batch_size": 4},
    forgets=("records",),
    published={"select": "absolute", "batch_size": 1, "accumulate": 16},
    place="code: zjunlp/KnowUnDo",
    lacks="on tofu-tiny it costs a quarter of the utility (0.91 to 0.69), and D is 1.19 of its critical value",
)
def memflex(
    model: nn.Module, task: Task, split: Split, *, select: str = "quantile", share: float = 0.5, mu: float = 0.92, sigma: float = 6e-4, copies: int = 3,
    noise: float = 0.5, seed: int = 0,
    tuning: Tuning = Tuning(epochs=2.0, lr=3e-4, batch_size=16, alpha=2.0, gamma=0.4, lora=8, schedule="cosine", warmup=0.03),
) -> Patch:  # fmt: skip
    """See the module's docstring."""
    if select not in SELECT:
        raise SettingError(suggest("memflex has no select", select, SELECT))
    if tuning.lora < 1 or copies < 1:
        raise SettingError(f"memflex needs lora and copies of 1 or more; found {tuning.lora} and {copies}")
    if not 0 < share <= 1 or not 0 < noise <= 1:
        raise SettingError(f"memflex needs share and noise in (0, 1]; found {share:g} and {noise:g}")
    generator = torch.Generator().manual_seed(seed)
    width = model.get_input_embeddings().weight.shape[0]  # pyright: ignore
    sets = [noisy(part, width, copies=copies, share=noise, generator=generator) for part in (split.forget, split.retain)]
    kept: list[str] = []

    @contextlib.contextmanager
    def opened() -> Iterator[Session]:
        with started(model, tuning, singular(model, linears(model, tuning.layers), tuning, seed)) as e:
            forget, retain = (gradients(model, task, data, e.params, tuning.batch_size) for data in sets)
            kept.extend(largest(forget, retain, mu, share) if select == "quantile" else located(forget, retain, mu, sigma))
            if not kept:
                cosines, sizes = zip(*statistics(forget, retain).values(), strict=True)
                raise ScopeError(
                    f"no adapter matrix is located: the smallest cosine is {min(cosines):.3g} (mu {mu:g}), the largest mean |g_f| {max(sizes):.3g}"
                    + (f" (sigma {sigma:g}); lower sigma, raise mu or set select=quantile" if select == "absolute" else "; raise mu")
                )
            hold(e, kept)
            yield e

    def mean(batch: Batch) -> Tensor:
        return task.forward(model, batch).mean.mean()

    keep = mean if tuning.retain == "ce" else None
    patch = tune(model, task, split, lambda batch: -mean(batch), based(tuning), seed=seed, session=opened(), keep=keep)
    return replace(patch, meta={**patch.meta, "kept": kept})


def singular(model: nn.Module, names: list[str], tuning: Tuning, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer name -> (B, A) whose scaled product is the best rank-r fit to the layer's weight."""
    scale = (tuning.lora_alpha or 2.0 * tuning.lora) / tuning.lora
    weights = {n: model.get_parameter(f"{n}.weight") for n in names}
    return {n: fit(w, torch.ones(len(w)), tuning.lora, scale, eps=0.0, seed=seed) for n, w in weights.items()}
