"""Scopes for language models and their methods: the numbers of cards wagle, memflex, loku and uoe-moe, fast paths against slow loops, what must not move."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from worlds import copied, same, small, state

from expunge.core import guard
from expunge.core.errors import ModelError, ScopeError, SettingError, SplitError
from expunge.core.guard import Guard
from expunge.core.registry import METHODS
from expunge.core.types import Out, concat
from expunge.engine.run import unlearn
from expunge.methods.language.loku import hinge, started
from expunge.methods.language.memflex import gradients, largest, located, noisy, statistics
from expunge.methods.language.seuf import chosen, pinned
from expunge.modalities.language.experts import affinity, expert, layers, probabilities, real_mean, watched
from expunge.modalities.language.remember import top_logits
from expunge.modalities.language.task import padded
from expunge.modalities.language.tuning import Tuning, named
from expunge.modalities.language.worlds import tiny
from expunge.parts.losses.language import top_kl
from expunge.parts.scopes.attribution import attributed, attribution
from expunge.parts.scopes.fila import fila, fit, groups, importance
from expunge.parts.scopes.lora import linears, lora, off

language = functools.partial(small, "causal_lm")
mixture = functools.partial(small, "causal_lm", True)


def gradient_of(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    params = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(params.items(), found, strict=True)}


def wrap(*values: float) -> dict[str, torch.Tensor]:
    return {"w": torch.tensor(values, dtype=torch.double)}


# wagle

THETA, G_F, G_R = wrap(1, -2, 0.5), wrap(0.2, 0.1, -0.4), wrap(0.01, -0.3, 0.02)


def test_the_two_readings_of_the_score_choose_other_weights():
    """Card wagle: scores (.198, .170, .192) and order 0, 2, 1 at mu = 1; (1999.8, 29999.8, 7999.8) and order 1, 2, 0, that of |g_r g_f|, at 1e-6."""
    one = attributed(THETA, G_F, G_R, form="published", mu=1.0)["w"]
    assert one.tolist() == pytest.approx([0.198, 0.170, 0.192])
    assert one.argsort(descending=True).tolist() == [0, 2, 1]
    small_mu = attributed(THETA, G_F, G_R, form="published")["w"]
    assert small_mu.tolist() == pytest.approx([1999.8, 29999.8, 7999.8])
    assert small_mu.argsort(descending=True).tolist() == [1, 2, 0] == (G_R["w"] * G_F["w"]).abs().argsort(descending=True).tolist()


def test_the_paper_keeps_the_sign_and_its_default_weighs_both_terms_alike():
    assert attributed(THETA, G_F, G_R, mu=1.0)["w"].tolist() == pytest.approx([0.198, -0.170, -0.192])
    first, second = THETA["w"] * G_F["w"], G_R["w"] * G_F["w"]
    mu = second.abs().sum() / first.abs().sum()
    torch.testing.assert_close(attributed(THETA, G_F, G_R)["w"], first - second / mu)
    louder = {n: 1000 * g for n, g in G_R.items()}
    torch.testing.assert_close(attributed(THETA, G_F, louder)["w"], attributed(THETA, G_F, G_R)["w"])
    assert attributed(THETA, G_F, wrap(0, 0, 0))["w"].tolist() == pytest.approx(first.tolist())
    for wrong, message in (({"form": "papr"}, "did you mean 'paper'"), ({"mu": -1.0}, "mu must be 0 or larger")):
        with pytest.raises(SettingError, match=message):
            attributed(THETA, G_F, G_R, **wrong)


@pytest.mark.parametrize("form", ["paper", "published"])
def test_attribution_equals_the_slow_way(form):
    """paper: one gradient of the mean token loss of the whole set; published: the sum of the gradients of batch means."""
    model, task, split = language()
    model.double()
    theta = dict(model.named_parameters())
    sides = []
    for data in (split.forget, split.retain):
        total = {n: torch.zeros_like(p) for n, p in theta.items()}
        for batch in task.batches(data, len(data) if form == "paper" else 3):
            out = task.forward(model, batch)
            for n, g in gradient_of(model, out.nll.sum() / out.count.sum()).items():
                total[n] += g
        sides.append(total)
    before = state(model)
    scope = attribution(model, task, split.forget, split.retain, keep=0.3, form=form, size=3)
    assert same(before, state(model))
    scores = attributed(theta, *sides, form=form)
    flat, mask = (torch.cat([v[n].flatten() for n in theta]) for v in (scores, scope.masks))
    assert int(mask.sum()) == int(0.3 * len(flat)) == scope.count(model)
    assert float(flat[mask].min()) >= float(flat[~mask].max()) - 1e-9


def test_attribution_stays_within_the_named_layers_and_refuses_a_wrong_share():
    model, task, split = language()
    names = named(model, "mlp").masks
    scope = attribution(model, task, split.forget, split.retain, keep=0.5, names=names)
    assert set(scope.masks) == set(names)
    assert scope.count(model) == sum(p.numel() for n, p in model.named_parameters() if "mlp" in n) // 2
    for keep in (0.0, 1.5):
        with pytest.raises(SettingError, match=r"keep must be in \(0, 1\]"):
            attribution(model, task, split.forget, split.retain, keep=keep)


@pytest.mark.parametrize("loss", ["npo", "graddiff", "idk"])
def test_wagle_leaves_what_is_frozen_bit_for_bit_under_weight_decay(loss):
    """Card wagle: masked gradients alone would let AdamW turn 1 into 0.99 at lr 0.1 and decay 0.1."""
    p = nn.Parameter(torch.ones(1))
    p.grad = torch.zeros(1)
    torch.optim.AdamW([p], lr=0.1, weight_decay=0.1).step()
    assert float(p.detach()) == pytest.approx(0.99)

    model, task, split = language()
    attempt = unlearn("wagle", model, task, split, loss=loss, keep=0.3, epochs=2, lr=0.01, weight_decay=0.1, batch_size=4)
    assert attempt.outcome == "ok", attempt.reason
    data = split.anchor if loss == "idk" else split.forget
    scope = attribution(model, task, data, split.retain, keep=0.3, size=4)
    moved = {e.name: torch.ones_like(e.values, dtype=torch.bool) if e.mask is None else e.mask for e in attempt.patch.edits}
    for name, mask in scope.masks.items():
        assert not bool((moved.get(name, torch.zeros_like(mask)) & ~mask).any()), name
    assert attempt.patch.places > 0.9 * scope.count(model)
    if loss == "npo":
        assert attempt.patch.digest != unlearn("wagle", model, task, split, loss=loss, keep=0.3, epochs=2, lr=0.01, batch_size=4).patch.digest


def test_wagle_moves_each_loss_the_right_way():
    model, task, split = language()
    batch = task.collate(split.forget, torch.arange(4), None)
    refusals = task.collate(split.anchor, torch.arange(4), None)
    for loss, data, sign in (("npo", batch, 1), ("graddiff", batch, 1), ("idk", refusals, -1)):
        twin = copied(model)
        METHODS["wagle"](model, task, split, loss=loss, epochs=3, lr=3e-3, retain="none").apply(twin)
        rise = task.forward(twin, data).mean.mean() - task.forward(model, data).mean.mean()
        assert sign * float(rise.detach()) > 0.02, loss


def test_wagle_refuses_what_it_cannot_do():
    model, task, split = language()
    with pytest.raises(SettingError, match="wagle has no loss 'ndo'; did you mean 'npo'"):
        METHODS["wagle"](model, task, split, loss="ndo")
    with pytest.raises(SettingError, match="set lora to 0"):
        METHODS["wagle"](model, task, split, lora=4)
    with pytest.raises(SplitError, match="split lacks anchor"):
        METHODS["wagle"](model, task, replace(split, anchor=None), loss="idk")


# memflex


def test_selector_of_both_cards():
    """Cards memflex (cosines .707107 and .995037, means .5 and 5e-5) and knowundo (A alone)."""
    f = {"a": wrap(1, 0)["w"], "b": wrap(1, 0)["w"], "c": wrap(1e-4, 0)["w"]}
    r = {"a": wrap(1, 1)["w"], "b": wrap(1, 0.1)["w"], "c": wrap(0, 1)["w"]}
    found = statistics(f, r)
    assert [round(found[n][0], 6) for n in "ab"] == [0.707107, 0.995037]
    assert [found[n][1] for n in "ac"] == pytest.approx([0.5, 5e-5])
    assert located(f, r, 0.92, 6e-4) == ["a"]
    u = {"A": wrap(1, 0)["w"], "B": wrap(1, 1)["w"], "C": wrap(1e-5, 0)["w"]}
    v = {"A": wrap(0, 1)["w"], "B": wrap(1, 1)["w"], "C": wrap(0, 1)["w"]}
    assert located(u, v, 0.92, 6e-4) == ["A"]
    assert statistics(u, v)["C"] == pytest.approx((0.0, 5e-6))


def test_a_zero_gradient_is_never_located():
    zero, one = wrap(0, 0), wrap(1, 0)
    assert statistics(zero, one)["w"] == (1.0, 0.0) and statistics(one, zero)["w"] == (1.0, 0.5)
    assert located(one, zero, 0.92, 0.0) == [] == largest(zero, one, 2.0, 1.0)


def test_quantiles_are_taken_within_each_kind():
    """B is a thousand times larger than A throughout: one threshold for both would keep no A."""
    f = {f"{k}.q_proj.lora_{t}": torch.tensor([s * (k + 1.0), 0]) for k in range(4) for t, s in (("A", 1e-3), ("B", 1.0))}
    r = {n: torch.tensor([0.0, 1.0]) for n in f}
    assert largest(f, r, 0.92, 0.5) == [f"{k}.q_proj.lora_{t}" for k in (2, 3) for t in "AB"]
    r["3.q_proj.lora_A"] = f["3.q_proj.lora_A"]
    assert largest(f, r, 0.92, 0.34) == ["2.q_proj.lora_A", "3.q_proj.lora_B"]


def test_noisy_copies_replace_half_of_the_answer_alone():
    _, _, split = language()
    data, special = split.forget, set(split.forget.format.tokenizer.all_special_ids)
    width = len(data.format.tokenizer)
    made = noisy(data, width, copies=3, share=0.5, generator=torch.Generator().manual_seed(0))
    assert len(made) == 3 * len(data) and torch.equal(made.ids, data.ids.repeat(3))
    for k, tokens in enumerate(made.tokens):
        old, targets = data.tokens[k % len(data)], data.targets[k % len(data)]
        free = targets & torch.tensor([int(t) not in special for t in old])
        changed = tokens != old
        assert not bool((changed & ~free).any())
        assert 0 < int(changed.sum()) <= max(1, round(0.5 * int(free.sum())))
        assert not special & set(tokens[changed].tolist())
    again = noisy(data, width, copies=3, share=0.5, generator=torch.Generator().manual_seed(0))
    assert again.digest == made.digest
    assert len({made.take([k]).digest for k in range(0, 12, 4)}) == 3


def test_gradients_are_the_mean_over_records_at_every_batch_size():
    model, task, split = language()
    model.double()
    names = [n for n, _ in model.named_parameters() if "q_proj" in n]
    params = {n: model.get_parameter(n) for n in names}
    slow = {n: torch.zeros_like(p) for n, p in params.items()}
    for k in range(len(split.retain)):
        out = task.forward(model, task.collate(split.retain, torch.tensor([k]), None))
        for n, g in gradient_of(model, out.mean[0]).items():
            if n in slow:
                slow[n] += g / len(split.retain)
    for size in (1, 7):
        found = gradients(model, task, split.retain, params, size)
        for n in names:
            torch.testing.assert_close(found[n], slow[n])


def test_at_b_zero_no_gradient_reaches_a_but_it_does_from_the_singular_start():
    """Card memflex, pitfall: adapters at B = 0 have zero gradients on A, so that no A would ever be located."""
    model, task, split = language()
    with lora(model, "q_proj", rank=4) as e:
        g = gradients(model, task, split.forget, e.params, 4)
    assert not any(bool(g[n].any()) for n in g if n.endswith("A")) and all(bool(g[n].any()) for n in g if n.endswith("B"))
    patch = METHODS["memflex"](model, task, split, epochs=1, layers="q_proj", lora=4, share=1.0, mu=2.0)
    assert [n.rsplit("_", 1)[1] for n in patch.meta["kept"]] == ["A", "B", "A", "B"]


def test_memflex_trains_the_kept_matrices_alone():
    """Under weight decay: in each edit, a matrix that is not kept stands twice, trained and first, and both are the same bits."""
    model, task, split = language()
    attempt = unlearn("memflex", model, task, split, epochs=2, weight_decay=0.1, lr=1e-2, lora=4)
    assert attempt.outcome == "ok", attempt.reason
    kept = set(attempt.patch.meta["kept"])
    assert {e.name.removesuffix(".weight") for e in attempt.patch.edits} == {n.rsplit(".", 1)[0] for n in kept}
    alone = 0
    for edit in attempt.patch.edits:
        name = edit.name.removesuffix(".weight")
        assert torch.equal(edit.down[:4], edit.down[4:]) == (f"{name}.lora_A" not in kept)
        assert torch.equal(edit.up[:, :4], -edit.up[:, 4:]) == (f"{name}.lora_B" not in kept)
        alone += len({f"{name}.lora_A", f"{name}.lora_B"} - kept)
    assert alone > 0, "the test needs a layer of which one matrix is kept"


def test_memflex_refuses_what_it_cannot_do():
    model, task, split = language()
    attempt = unlearn("memflex", model, task, split, select="absolute", sigma=1e3)
    assert attempt.outcome == "refused"
    assert "no adapter matrix is located: the smallest cosine is" in attempt.reason and "lower sigma" in attempt.reason
    for settings, message in (
        ({"lora": 0}, "lora and copies of 1 or more"),
        ({"share": 0.0}, r"share and noise in \(0, 1\]"),
        ({"select": "all"}, "no select"),
    ):
        with pytest.raises(SettingError, match=message):
            METHODS["memflex"](model, task, split, **settings)


# loku


def logits(*values: float) -> Out:
    return Out(torch.zeros(1), torch.ones(1), torch.tensor([[values]], requires_grad=True), torch.tensor([[0]]))


def test_inverted_hinge_numbers():
    """Card loku: logits (1, 0, 0) and (1, .5, 0), label 0."""
    for values, loss, slope in (
        ((1.0, 0.0, 0.0), 1.364175, (0.366309, -0.183155, -0.183155)),
        ((1.0, 0.5, 0.0), 1.199285, (0.405547, -0.368415, -0.037131)),
    ):
        out = logits(*values)
        found = hinge(out).sum()
        assert found.item() == pytest.approx(loss, abs=1e-6)
        assert torch.autograd.grad(found, out.logits)[0].flatten().tolist() == pytest.approx(slope, abs=1e-6)


def test_inverted_hinge_takes_the_softmax_of_what_looks_like_probabilities_and_stays_within_0_and_2():
    assert hinge(logits(0.2, 0.7, 0.1)).item() == pytest.approx(1 + (p := torch.tensor([0.2, 0.7, 0.1]).softmax(0))[0].item() - p[1].item())
    assert hinge(logits(60.0, 0.0, 0.0)).item() == pytest.approx(2.0) and hinge(logits(0.0, 60.0, 0.0)).item() == pytest.approx(0.0)


def test_inverted_hinge_equals_the_loop_and_ignores_padding():
    model, task, split = language()
    batch = task.collate(split.forget, torch.arange(4), None)
    out = task.forward(model, batch)
    found = hinge(out)
    for b in range(4):
        p = task.forward(model, task.collate(split.forget, torch.tensor([b]), None)).logits.softmax(-1)[0]
        answer = split.forget.tokens[b][split.forget.targets[b]]
        slow = [1 + float(row[y]) - max(float(v) for k, v in enumerate(row) if k != y) for row, y in zip(p.tolist(), answer.tolist(), strict=True)]
        assert found[b][out.labels[b] != -100].tolist() == pytest.approx(slow, abs=1e-5)
    torch.testing.assert_close(hinge(task.forward(model, padded(batch, 5, 7))).sum(1), found.sum(1))


def test_fila_residual_of_the_card():
    """Card loku: W = diag(3, 1), w = (2, 2), r = 1, scale 2: singular values (6, 2), residual [[1.5e-5, 0], [0, 1]]."""
    w = torch.diag(torch.tensor([3.0, 1.0], dtype=torch.double))
    rows = torch.diag(torch.tensor([4.0, 4.0], dtype=torch.double)).sum(1).sqrt()
    assert rows.tolist() == [2.0, 2.0] and torch.linalg.svdvals(rows[:, None] * w).tolist() == pytest.approx([6.0, 2.0])
    b, a = fit(w, rows, 1, 2.0)
    torch.testing.assert_close(w - 2 * b @ a, torch.tensor([[1.5e-5, 0.0], [0.0, 1.0]], dtype=torch.double), rtol=1e-4, atol=1e-9)
    b, a = fit(w, rows, 1, 2.0, eps=0.0)
    torch.testing.assert_close(w - 2 * b @ a, torch.diag(torch.tensor([0.0, 1.0], dtype=torch.double)), rtol=0, atol=1e-12)


def test_fit_is_the_best_weighted_fit_the_same_every_time_and_draws_nothing():
    g = torch.Generator().manual_seed(0)
    w, rows = torch.randn(40, 30, generator=g, dtype=torch.double), torch.rand(40, generator=g, dtype=torch.double) + 0.1
    rng = torch.get_rng_state()
    b, a = fit(w, rows, 6, 2.0, eps=0.0)
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(x, y) for x, y in zip((b, a), fit(w, rows, 6, 2.0, eps=0.0), strict=True))
    best = float(torch.linalg.svdvals(rows[:, None] * w)[6:].norm())
    assert best <= float((rows[:, None] * (w - 2 * b @ a)).norm()) < 1.001 * best
    with pytest.raises(ScopeError, match="rank 31 is larger than a side of a 40 x 30 weight"):
        fit(w, rows, 31, 2.0)


def test_importance_equals_the_slow_way_whatever_the_groups():
    """Empirical Fisher of batches, weighted by their tokens, for batches of unequal token counts."""
    model, task, split = language()
    model.double()
    names = linears(model)[:9]
    fishers = []
    for data in (split.forget, split.retain):
        total, tokens = {n: torch.zeros_like(model.get_parameter(f"{n}.weight")) for n in names}, 0.0
        for batch in task.batches(data, 2):
            out = task.forward(model, batch)
            n = float(out.count.sum())
            g = gradient_of(model, out.nll.sum() / out.count.sum())
            tokens += n
            for name in names:
                total[name] += n * g[f"{name}.weight"].square()
        fishers.append({n: t / tokens for n, t in total.items()})
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    before = state(model)
    small_budget = 3.5 * 8 * 32 * 32 / 2**30
    cut = list(groups({n: model.get_parameter(f"{n}.weight").numel() for n in names}, small_budget))
    assert len(cut) > 2 and [n for group in cut for n in group] == names
    for budget, times in ((4.0, 1), (small_budget, len(cut))):
        with guard.watching(Guard()) as g:
            w = importance(model, guard.metered(task, split, g.meter), split.forget, split.retain, names, budget=budget)
        assert g.meter.forward == g.meter.backward == times * (len(split.forget) + len(split.retain))
        assert same(before, state(model))
        for n in names:  # the model's norms compute in float32
            torch.testing.assert_close(w[n], (fishers[0][n] / (1e-5 + fishers[1][n])).sum(1).sqrt(), rtol=1e-5, atol=1e-7)
    assert not any(m._backward_hooks for m in model.modules()) and not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_fila_start_leaves_the_function_and_the_patch_is_the_trained_model():
    model, task, split = language()
    before = state(model)
    batch = task.collate(split.retain, torch.arange(8), None)
    with torch.no_grad():
        base = task.forward(model, batch).logits
    names = linears(model, "mlp")
    start = fila(model, task, split.forget, split.retain, names, rank=4, scale=2.0)
    tuning = Tuning(lora=4)
    with started(model, tuning, start) as e, torch.no_grad():
        torch.testing.assert_close(task.forward(model, batch).logits, base, rtol=1e-4, atol=1e-5)
        assert set(e.params) == {f"{n}.lora_{t}" for n in names for t in "AB"}
    assert same(before, state(model)) and len(e.patch) == 0
    with started(model, tuning, start) as e, torch.no_grad():
        for k, p in enumerate(e.params.values()):
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(k)))
        trained = task.forward(model, batch).logits
    assert same(before, state(model)) and {x.up.shape[1] for x in e.patch.edits} == {8}
    twin = copied(model)
    e.patch.apply(twin)
    with torch.no_grad():
        torch.testing.assert_close(task.forward(twin, batch).logits, trained, rtol=1e-4, atol=1e-5)
        assert float((trained - base).abs().max()) > 1e-3


def test_fila_starts_where_the_forget_gradient_is():
    """An adapter on a layer that no gradient reaches has nothing to start from."""
    model, task, split = language()
    model.spare = nn.Linear(32, 32)
    names = [*linears(model, "q_proj"), "spare"]
    start = fila(model, task, split.forget, split.retain, names, rank=2, scale=2.0)
    assert set(start) == set(linears(model, "q_proj"))
    with pytest.raises(ScopeError, match="nothing to start LoRA from"):
        fila(model, task, split.forget, split.retain, ["spare"], rank=2, scale=2.0)


def test_retain_kl_compares_with_the_model_as_it_was():
    """Under a reduced base, LoRA's off view is another model: KL to it would not be 0 at the start. So a run on KL alone stays where it is."""
    model, task, split = language()
    model.double()
    teacher, batch = top_logits(model, task, split.retain, 0), task.collate(split.retain, torch.arange(4), None)
    start = fila(model, task, split.forget, split.retain, linears(model), rank=4, scale=2.0)

    def divergence() -> float:
        return float(top_kl(out := task.forward(model, batch), *teacher.at(batch, out)).max())

    with started(model, Tuning(lora=4), start), torch.no_grad():
        assert abs(divergence()) < 1e-5
        with off(model):
            assert divergence() > 1e-4
    settings = {"gamma": 0.0, "epochs": 3, "lr": 1e-3, "lora": 4, "top": 0, "optimizer": "sgd", "weight_decay": 0.0}
    size = {}
    for retain in ("kl", "ce"):
        edits = METHODS["loku"](model, task, split, retain=retain, **settings).edits
        size[retain] = max((float((e.scale * e.up @ e.down).abs().max()) for e in edits), default=0.0)
    assert size["kl"] < 0.01 * size["ce"]


def test_loku_refuses_what_it_cannot_do():
    model, task, split = language()
    for settings, message in (({"lora": 0}, "set lora to 1 or more"), ({"loss": "hinge"}, "loku has no loss")):
        with pytest.raises(SettingError, match=message):
            METHODS["loku"](model, task, split, **settings)
    assert "rank 33 is larger than a side" in unlearn("loku", model, task, split, lora=33).reason


# experts


class Block(nn.Module):
    """A mixture of experts as a list of modules, with a shared expert and its gate."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.shared_expert_gate = nn.Linear(width, 1)
        self.gate = nn.Linear(width, count, bias=False)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(count))
        self.shared_experts = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x):
        weight, index = self.gate(x).softmax(-1).max(-1)
        out = self.shared_experts[0](x) * self.shared_expert_gate(x).sigmoid()
        for k, one in enumerate(self.experts):
            out = out + one(x) * (weight * (index == k))[..., None]
        return out


def test_layers_of_fused_experts():
    model = mixture()[0]
    found = layers(model)
    assert [layer.name for layer in found] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert found[1].router == "model.layers.1.mlp.gate" and len(found[1].experts) == 8
    assert found[1].experts[5] == {"model.layers.1.mlp.experts.gate_up_proj": 5, "model.layers.1.mlp.experts.down_proj": 5}


def test_layers_of_listed_experts_leave_shared_ones_out():
    model = nn.Sequential(nn.Embedding(10, 6), Block(6, 3), nn.Linear(6, 10))
    (found,) = layers(model)
    assert (found.name, found.router) == ("1", "1.gate")
    assert found.experts[2] == {"1.experts.2.weight": None, "1.experts.2.bias": None}
    scope = expert(model, 0, 2)
    assert scope.masks == {"1.experts.2.weight": None, "1.experts.2.bias": None, "1.gate.weight": None}
    assert scope.count(model) == 36 + 6 + 18


def test_layers_with_shared_experts_and_biases_of_transformers():
    from transformers import GptOssConfig, GptOssForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

    common = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    qwen = Qwen2MoeForCausalLM(Qwen2MoeConfig(**common, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, shared_expert_intermediate_size=8))
    assert not any("shared" in n for layer in layers(qwen) for one in layer.experts for n in one)
    assert expert(qwen, 0, 1).count(qwen) == 3 * 16 * 8 + 4 * 16
    scaling = {"rope_type": "default", "rope_theta": 10000.0}
    oss = GptOssForCausalLM(GptOssConfig(**common, num_local_experts=4, num_experts_per_tok=2, head_dim=8, rope_parameters=scaling))
    assert expert(oss, 1, 3).count(oss) == 3 * 16 * 24 + 2 * 24 + 16 + 4 * 16 + 4


def test_models_without_experts_or_router_are_refused():
    model, task, split = language()
    with pytest.raises(ModelError, match="LlamaForCausalLM has no experts"):
        METHODS["seuf"](model, task, split)
    block = Block(6, 3)
    block.gate = nn.Linear(6, 4)
    with pytest.raises(ModelError, match="holds 3 experts, but no router with a weight of 3 rows"):
        layers(nn.Sequential(block))
    with pytest.raises(ScopeError, match=r"no expert 8 in layer 0; layers are 0\.\.1 and experts 0\.\.7"):
        expert(mixture()[0], 0, 8)


def test_affinity_of_the_card():
    """Card uoe-moe: token means (.6, .4) and (.2, .8), here of records of 2 and 1 tokens, give s = (.4, .6) and expert 1."""
    g = torch.tensor([[[0.5, 0.5], [0.7, 0.3]], [[0.2, 0.8], [9.0, 9.0]]])
    s = real_mean(g, torch.tensor([2, 1])).mean(0)
    assert s.tolist() == pytest.approx([0.4, 0.6])
    found = layers(mixture()[0])
    assert chosen(found[:1], s[None], "") == (0, 1)
    two = torch.tensor([[0.1, 0.5], [0.3, 0.2]])
    assert chosen(found, two, "") == (0, 1) and chosen(found, two, r"layers\.1") == (1, 0)
    with pytest.raises(ScopeError, match="no mixture-of-experts layer fits layers 'attn'"):
        chosen(found, two, "attn")


def test_affinity_equals_the_models_own_router_one_record_at_a_time():
    model, task, split = mixture()
    slow = torch.zeros(2, 8)
    with torch.no_grad():
        for tokens in split.retain.tokens:
            router = model(tokens[None], output_router_logits=True).router_logits
            slow += torch.stack([F.softmax(r.float(), -1).mean(0) for r in router]) / len(split.retain)
    before = state(model)
    for size in (1, 5, 16):
        found = affinity(model, task, split.retain, size)
        torch.testing.assert_close(found.float(), slow)
    assert same(before, state(model)) and not any(m._forward_pre_hooks for m in model.modules())
    torch.testing.assert_close(found.sum(1), torch.ones(2, dtype=torch.double))


def test_affinity_of_other_data_is_another():
    """The control: records repeated once weigh twice."""
    model, task, split = mixture()
    one, rest = split.retain.take([0]), split.retain.take(range(1, 4))
    whole = affinity(model, task, concat(one, one, rest))
    torch.testing.assert_close(whole, (2 * affinity(model, task, one) + 3 * affinity(model, task, rest)) / 5)
    assert float((affinity(model, task, one) - affinity(model, task, rest)).abs().max()) > 1e-4


def test_anchor_numbers():
    """Card uoe-moe: four experts, logits 0: .75 as a sum, .1875 as a mean; gradient (.125, -.375, .125, .125) for target 1."""
    z = torch.zeros(1, 1, 4, requires_grad=True)
    value = pinned(z.softmax(-1), torch.tensor([1]), 1)
    assert value.item() == 0.75 and pinned(z.softmax(-1), torch.tensor([1]), 1, "mean").item() == 0.1875
    assert torch.autograd.grad(value, z)[0].flatten().tolist() == [0.125, -0.375, 0.125, 0.125]


def test_anchor_counts_no_padding():
    model, task, split = mixture()
    layer = layers(model)[0]
    batch = task.collate(split.forget, torch.arange(4), None)
    values = []
    with torch.no_grad():
        for b in (batch, padded(batch, 6, 3), padded(batch, 6, 9)):
            with watched(model, [layer]) as caught:
                task.forward(model, b)
            values.append(pinned(probabilities(model, layer, caught[layer.name], b), b["n"], 2))
        for k in range(4):
            alone = task.collate(split.forget, torch.tensor([k]), None)
            with watched(model, [layer]) as caught:
                task.forward(model, alone)
            torch.testing.assert_close(pinned(probabilities(model, layer, caught[layer.name], alone), alone["n"], 2)[0], values[0][k])
    torch.testing.assert_close(values[1], values[0])
    torch.testing.assert_close(values[2], values[0])


@pytest.mark.parametrize("loss", ["ga", "npo"])
def test_seuf_moves_one_expert_and_its_router_alone(loss):
    """Under weight decay: all other experts and routers are bit for bit what they were, and the patch holds the slices alone."""
    model, task, split = mixture()
    attempt = unlearn("seuf", model, task, split, loss=loss, epochs=2, weight_decay=0.1, lr=1e-2, batch_size=2)
    assert attempt.outcome == "ok", attempt.reason
    meta = attempt.patch.meta
    scores = affinity(model, task, split.forget)
    number = ["model.layers.0.mlp", "model.layers.1.mlp"].index(meta["layer"])
    assert float(scores.max()) == pytest.approx(meta["affinity"], abs=1e-6) and float(scores[number, meta["expert"]]) == float(scores.max())
    twin = copied(model)
    attempt.patch.apply(twin)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        if name == f"{meta['layer']}.gate.weight":
            assert not torch.equal(p, q)
        elif name.startswith(f"{meta['layer']}.experts"):
            others = [k for k in range(8) if k != meta["expert"]]
            assert torch.equal(p[others], q[others]) and not torch.equal(p[meta["expert"]], q[meta["expert"]])
        else:
            assert torch.equal(p, q), name
    assert attempt.patch.places <= expert(model, number, meta["expert"]).count(model) == 3 * 32 * 32 + 8 * 32


def test_the_anchor_holds_the_router_to_the_expert():
    """Without it, ascent alone moves the router freely; with it, the expert's share of the forget tokens rises."""
    model, task, split = mixture()
    share = {}
    for pin in (0.0, 1.0):
        patch = METHODS["seuf"](model, task, split, pin=pin, epochs=15, lr=1e-2)
        twin = copied(model)
        patch.apply(twin)
        number = [layer.name for layer in layers(model)].index(patch.meta["layer"])
        share[pin] = float(affinity(twin, task, split.forget)[number, patch.meta["expert"]])
    assert share[1.0] > max(share[0.0], patch.meta["affinity"]) + 0.2


def test_seuf_under_gradient_checkpointing_is_the_same():
    """The router's inputs are caught inside blocks that are computed twice."""
    model, task, split = mixture()
    plain, again = (METHODS["seuf"](model, task, split, epochs=1, lr=1e-3, checkpointing=c) for c in (False, True))
    for a, b in zip(plain.edits, again.edits, strict=True):
        assert a.name == b.name
        torch.testing.assert_close(a.values, b.values)


def test_seuf_scope_is_below_seven_per_cent_of_the_benchmark_twin():
    model = tiny.mixtral(900, width=128, layers=4, experts=8)
    total = sum(p.numel() for p in model.parameters())
    assert expert(model, 2, 7).count(model) == 3 * 128 * 128 + 8 * 128 < 0.07 * total


def test_seuf_refuses_what_it_cannot_do():
    model, task, split = mixture()
    for settings, message in (({"lora": 4}, "set lora to 0"), ({"loss": "gaa"}, "did you mean 'ga'"), ({"anchor": "max"}, "seuf has no anchor")):
        with pytest.raises(SettingError, match=message):
            METHODS["seuf"](model, task, split, **settings)
    with pytest.raises(ScopeError, match="no mixture-of-experts layer fits"):
        METHODS["seuf"](model, task, split, layers="attn")
