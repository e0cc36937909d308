"""Random targets: teach the forget texts' positions other tokens, drawn at random once.

Paper    Yao et al., "Machine Unlearning of Pre-trained Large Language Models", ACL 2024, arXiv:2402.15159 (its second of seven methods).
Code     yaojin17/Unlearning_LLM, MIT, commit d4b1287.
Forgets  records.          Needs    forget; retain if retain=ce or kl.
Scope    all weights, LoRA or named layers.   Forget  mean over texts of 1 / |y| sum_t -log p(r_t | x_<t), r_t drawn once, uniformly from the vocabulary.
Retain   none; ce or kl if asked for.   Update  AdamW.   Leaves  Replace or LowRank.
Differs  Special tokens (the end token) keep their true target and inputs stay as they are, as in the code. A draw may hit the true token, as there. The
         vocabulary is the tokenizer's: spare rows of a padded embedding are no targets. Published: steps of 60 (arXiv) or 85 (GitHub) texts of 4,096
         tokens, one epoch. Random targets push towards a uniform vocabulary and harm more than adversarial ones (card llm-seven-methods).
Check
    >>> import torch; from expunge.methods.language.random_target import relabelled
    >>> batch = {"y": torch.tensor([[-100, 4, 5], [-100, -100, 6]]), "i": torch.tensor([1, 0])}
    >>> relabelled(batch, [torch.tensor([7]), torch.tensor([8, 9])])["y"].tolist()
    [[-100, 8, 9], [-100, -100, 7]]
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from expunge.core.guard import quiet
from expunge.core.patch import Patch
from expunge.core.registry import method
from expunge.core.types import IGNORE, Batch, Split, Task
from expunge.modalities.language.texts import Texts
from expunge.modalities.language.tuning import Tuning, cost, tune


def relabelled(batch: Batch, labels: Sequence[Tensor]) -> Batch:
    """The batch with other labels at its targets; `labels` holds one (T_i,) vector for each row of the data."""
    y = batch["y"].clone()
    y[y != IGNORE] = torch.cat([labels[k] for k in batch["i"].tolist()]).to(y)
    return {**batch, "y": y}


def draw(data: Texts, vocabulary: int, special: Collection[int], seed: int) -> list[Tensor]:
    """N vectors (T_i,): for each target a token drawn uniformly from 0 .. vocabulary - 1; a special token stays."""
    generator = torch.Generator().manual_seed(seed)
    true = [tokens[1:][targets[1:]] for tokens, targets in zip(data.tokens, data.targets, strict=True)]
    fixed = torch.tensor(sorted(special), dtype=torch.long)
    return [torch.where(torch.isin(t, fixed), t, torch.randint(vocabulary, t.shape, generator=generator)) for t in true]


@method(
    paper="arXiv:2402.15159", tasks=("causal_lm",), needs=("forget",), cost=cost(), toy={"lr": 1e-3, "epochs": 10, "accumulate": 1}, forgets=("records",),
    published={"batch_size": 1, "accumulate": 60}, place="code: yaojin17/Unlearning_LLM, arXiv texts (85 for GitHub)",
    lacks="on tofu-tiny it costs 0.12 of the probability per token of retain answers, where 0.05 is allowed",
)  # fmt: skip
def random_target(
    model: nn.Module, task: Task, split: Split, *, seed: int = 0,
    tuning: Tuning = Tuning(epochs=1.0, lr=2e-5, accumulate=8, retain="none", schedule="cosine", warmup=0.03),
) -> Patch:  # fmt: skip
    """See the module's docstring."""
    tokenizer = split.forget.format.tokenizer
    with quiet(model):
        width = task.forward(model, task.collate(split.forget, torch.tensor([0]), None)).logits.shape[-1]
    labels = draw(split.forget, min(width, len(tokenizer)), tokenizer.all_special_ids, seed)

    def forget(batch) -> Tensor:
        return task.forward(model, relabelled(batch, labels)).mean.mean()

    return tune(model, task, split, forget, tuning, seed=seed)
