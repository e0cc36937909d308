"""Language unlearning on a small Llama of about 2 M parameters: CPU seconds on one thread, ratios in one run.

1  NPO step, 8 + 8 records: S_ref looked up, one pass for both parts, no logits of prompts, fused AdamW   against   a live reference, all logits, plain AdamW
2  RMU step: both passes end at the layer that is read   against   a whole forward and backward pass of the same batches
3  TOFU evaluation of one model: every part read once, the prompt shared by its answers   against   one forward pass per metric
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from expunge.audits.core import Probe
from expunge.core.types import IGNORE, Split
from expunge.methods.language.rmu import steer
from expunge.modalities.language import remember
from expunge.modalities.language.records.format import Format
from expunge.modalities.language.task import blocks, causal_lm, hidden
from expunge.modalities.language.texts import Texts
from expunge.modalities.language.tuning import passes
from expunge.modalities.language.worlds import authors, tiny
from expunge.parts.losses import language as losses


def published_npo(model: nn.Module, reference: nn.Module, batch: dict, beta: float) -> Tensor:
    """The loss with a live reference: full logits of both models, labels shifted, summed over the answer."""

    def total(m: nn.Module) -> Tensor:
        mask = torch.arange(batch["x"].shape[1]) < batch["n"][:, None]
        logits = m(input_ids=batch["x"], attention_mask=mask.long()).logits[:, :-1]
        labels = batch["y"][:, 1:]
        return F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORE, reduction="none").sum(1)

    now = total(model)
    with torch.no_grad():
        then = total(reference)
    return -(2 / beta) * F.logsigmoid(beta * (now - then)).mean()


def published_ce(model: nn.Module, batch: dict) -> Tensor:
    """The mean over answer tokens from full logits."""
    mask = torch.arange(batch["x"].shape[1]) < batch["n"][:, None]
    logits = model(input_ids=batch["x"], attention_mask=mask.long()).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), batch["y"][:, 1:].flatten(), ignore_index=IGNORE)


def run(model: nn.Module, loss: Callable[[int], Tensor], steps: int, *, fused: bool) -> tuple[float, list[float]]:
    """CPU seconds per AdamW step (fused as in `parts.updates.descend`, or PyTorch's default), and the losses."""
    stepper, seen = torch.optim.AdamW(model.parameters(), 1e-4, fused=fused), []
    start = time.process_time()
    for k in range(steps):
        stepper.zero_grad()
        value = loss(k)
        value.backward()
        stepper.step()
        seen.append(float(value.detach()))
    return (time.process_time() - start) / steps, seen


def npo_steps(model: nn.Module, forget: Texts, retain: Texts, steps: int, *, keep: bool) -> None:
    """1: the same losses, cheaper. `keep`: with a retain loss on 8 records more."""
    task, beta = causal_lm(), 0.1
    gone, kept = task.batches(forget, 8, epochs=1e9, seed=0), task.batches(retain, 8, epochs=1e9, seed=1)
    results, parameters = [], sum(p.numel() * p.element_size() for p in model.parameters())
    for live in (True, False, True, False):
        mine, reference = copy.deepcopy(model), copy.deepcopy(model) if live else None
        start = time.process_time()
        values = None if live else remember.sequence_nll(mine, task, forget)
        once = time.process_time() - start

        def ours(k: int, mine=mine, values=values) -> Tensor:
            batch = gone[k]
            outs = passes(mine, task, {"forget": batch, **({"retain": kept[k]} if keep else {})})
            value = losses.npo(outs["forget"], values[batch["i"]], beta=beta).mean()
            return value + losses.pooled(outs["retain"].nll, outs["retain"]) if keep else value

        def theirs(k: int, mine=mine, reference=reference) -> Tensor:
            value = published_npo(mine, reference, gone[k], beta)
            return value + published_ce(mine, kept[k]) if keep else value

        seconds, seen = run(mine, theirs if live else ours, steps, fused=not live)
        results.append((seconds, seen, once, 2 * parameters if live else parameters + values.numel() * 4))
    (a, b), (c, d) = results[:2], results[2:]
    gap = max(abs(x - y) / max(1.0, abs(x)) for x, y in zip(a[1], b[1], strict=True))
    usual, quick = min(a[0], c[0]), min(b[0], d[0])
    what = "NPO and retain, 8 + 8" if keep else "NPO alone, 8"
    print(f"{what}: {1e3 * quick:.1f} ms a step, live reference {1e3 * usual:.1f} ms: {quick / usual:.2f}; model memory {b[3] / a[3]:.2f}")
    print(f"  once for the references {b[2]:.2f} s; largest difference of a loss, relative, over {steps} steps {gap:.1e}")


def rmu_steps(model: nn.Module, forget: Texts, retain: Texts, steps: int) -> None:
    """2: a step that ends at a layer, against one that runs through."""
    task, layer = causal_lm(), len(blocks(model)) // 2 - 1
    name = blocks(model)[layer][0]
    gone, kept = task.batches(forget, 8, epochs=1e9, seed=0), task.batches(retain, 8, epochs=1e9, seed=1)
    target = torch.rand(model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    target = 6.5 * target / target.norm()

    def mask(batch: dict) -> Tensor:
        return torch.arange(batch["x"].shape[1]) < batch["n"][:, None]

    def ours(k: int, mine: nn.Module, states: list[Tensor]) -> Tensor:
        f, r = gone[k], kept[k]
        held = nn.utils.rnn.pad_sequence([states[i] for i in r["i"].tolist()], batch_first=True)
        return steer(hidden(mine, f, name), target, mask(f)).mean() + 100 * steer(hidden(mine, r, name), held, mask(r)).mean()

    def whole(k: int, mine: nn.Module) -> Tensor:
        return published_ce(mine, gone[k]) + published_ce(mine, kept[k])

    states = remember.hidden_states(model, task, retain, name)
    a = [run(m := copy.deepcopy(model), lambda k, m=m: whole(k, m), steps, fused=False)[0] for _ in range(2)]
    b = []
    for _ in range(2):
        mine = copy.deepcopy(model)
        for n, p in mine.named_parameters():
            p.requires_grad_("down_proj" in n and any(f"layers.{j}." in n for j in range(layer + 1)))
        scoped = nn.ParameterList([p for p in mine.parameters() if p.requires_grad])
        b.append(run(scoped, lambda k, mine=mine: ours(k, mine, states), steps, fused=True)[0])
    print(
        f"RMU at block {layer} of {len(blocks(model))}: {1e3 * min(b):.1f} ms a step, whole forward and backward {1e3 * min(a):.1f} ms: {min(b) / min(a):.2f}"
    )


def evaluation(model: nn.Module, split: Split) -> None:
    """3: probability, truth ratio, extraction strength, exact memorisation and Min-K of forget and retain, without generated answers."""
    task = causal_lm(split.forget.format.tokenizer)
    from expunge.audits.language import memorisation, text_membership, tofu, tokens

    def shared() -> None:
        p = Probe(model, model, task, split)
        for part in ("forget", "retain"):
            tofu.log_of(p, model, part, texts=False)
            scores = tokens.seen(p, model, part)
            memorisation.extraction_strength(scores.hit)
            memorisation.exact_memorisation(scores.hit)
            text_membership.lowest(scores.logp)

    def per_metric() -> None:
        for data in (split.forget, split.retain):
            for _ in ("probability", "extraction strength", "exact memorisation", "min-k"):
                tokens.token_scores(model, task, data)
            right = [row["paraphrased_answer"] for row in data.rows]
            wrong = [[row["perturbed_answer"][k] for row in data.rows] for k in range(5)]
            for answers in (right, *wrong):
                tokens.plain_nll(model, task, data.format.answered(data, answers))

    timed = []
    for work in (per_metric, shared, per_metric, shared):
        start = time.process_time()
        work()
        timed.append(time.process_time() - start)
    usual, quick = min(timed[::2]), min(timed[1::2])
    print(
        f"TOFU evaluation of {len(split.forget)} + {len(split.retain)} records: {quick:.2f} s, one forward pass per metric {usual:.2f} s: {quick / usual:.2f}"
    )


def main() -> None:
    """Run all three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--records", type=int, default=160)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = authors.authors(options.records // 10)
    form = Format(tiny.tokenizer(rows, 2000))
    cut = len(rows) // 4
    split = Split(form.texts(rows[:cut]), form.texts(rows[cut:]))
    model = tiny.llama(2000, width=192, layers=4)
    print(f"Llama of {sum(p.numel() for p in model.parameters()):,} parameters, {split.retain!r}, one thread, torch {torch.__version__}")
    npo_steps(model, split.forget, split.retain, options.steps, keep=False)
    npo_steps(model, split.forget, split.retain, options.steps, keep=True)
    rmu_steps(model, split.forget, split.retain, options.steps)
    evaluation(model, split)


if __name__ == "__main__":
    main()
