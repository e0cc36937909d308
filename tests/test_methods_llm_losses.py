"""Language methods of the cards rmu, undial and llm-others: their numbers, slow oracles, unequal lengths and padding, and what each keeps or refuses."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from worlds import copied, same, small, state

import expunge.methods.language.altpo as altpo
import expunge.methods.language.pdu as pdu
import expunge.methods.language.rmu as rmu
from expunge.core import guard, journal
from expunge.core.edits import LowRank, Replace
from expunge.core.errors import ModelError, ScopeError, SettingError, SplitError
from expunge.core.guard import Guard
from expunge.core.patch import Patch
from expunge.core.registry import METHODS
from expunge.core.types import IGNORE, Out
from expunge.engine.run import unlearn
from expunge.methods.language.ce_u import later, struck
from expunge.methods.language.jensun import refusals, to_teacher, to_token
from expunge.methods.language.llmu import choose, mismatched
from expunge.methods.language.npo_sam import sharp
from expunge.methods.language.satimp import reweighted
from expunge.methods.language.task_vector import away
from expunge.methods.language.tnpo import token_npo
from expunge.methods.language.undial import adjusted, distil
from expunge.methods.language.wga import weighted
from expunge.modalities.language.records.format import split
from expunge.modalities.language.task import aligned, blocks, collate, padded
from expunge.parts.losses import language as losses

V = 7


def made(seed: int = 0, lengths=(3, 1, 5), extra: int = 0, fill: float = 0.0, scale: float = 3.0) -> Out:
    """Random float64 logits for answers of unequal length; padding logits hold `fill`."""
    g = torch.Generator().manual_seed(seed)
    z = scale * torch.randn(len(lengths), max(lengths), V, generator=g, dtype=torch.float64)
    y = torch.randint(V, z.shape[:2], generator=g)
    for k, n in enumerate(lengths):
        z[k, n:], y[k, n:] = fill, IGNORE
    return aligned(F.pad(z, (0, 0, 0, extra), value=fill).requires_grad_(), F.pad(y, (0, extra), value=IGNORE))


def tokens_of(out: Out, seed: int) -> torch.Tensor:
    """One token per position, the same for the same positions whatever the padding."""
    first = torch.randint(V, (8, 16), generator=torch.Generator().manual_seed(seed))
    return first[: out.labels.shape[0], : out.labels.shape[1]]


def teacher_of(out: Out) -> torch.Tensor:
    """Log-probabilities of a teacher, the same for the same positions whatever the padding."""
    z = torch.randn(8, 16, V, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return (2 * z[: out.labels.shape[0], : out.labels.shape[1]]).log_softmax(-1)


def undialled(out: Out, k: int = V, beta: float = 3.0) -> torch.Tensor:
    whole, y = teacher_of(out), out.labels.clamp(min=0)
    top = whole.topk(k, -1)
    return distil(out, *adjusted(top.indices, top.values, y, whole.gather(-1, y[..., None]).squeeze(-1), beta=beta))


def taught(out: Out, k: int = V) -> torch.Tensor:
    top = teacher_of(out).topk(k, -1)
    return to_teacher(out, top.indices, top.values)


LOSSES = {
    "wga": lambda out: weighted(out, beta=2.0),
    "tnpo": lambda out: token_npo(out, teacher_of(out).exp()[..., 0], b=4.0),
    "wtnpo": lambda out: token_npo(out, teacher_of(out).exp()[..., 0], b=4.0, weighted=True),
    "satimp": lambda out: reweighted(out, b1=5.0, b2=1.0),
    "ce_u": struck,
    "undial": undialled,
    "undial-top": lambda out: undialled(out, k=3),
    "pdu": pdu.spread,
    "jensun": lambda out: to_token(out, tokens_of(out, 4)),
    "jensun-retain": taught,
    "jensun-retain-top": lambda out: taught(out, k=3),
}


def slow(name: str, out: Out) -> torch.Tensor:
    """The same losses token by token, from their formulas."""
    found = []
    for b in range(len(out.labels)):
        total = torch.zeros((), dtype=torch.float64)
        n = int(losses.kept(out)[b].sum())
        for t in range(n):
            z, y = out.logits[b, t], int(out.labels[b, t])
            p = z.softmax(0)
            w, ref = p.detach()[y], teacher_of(out)[b, t].exp()
            if name == "wga":
                total = total + w**2 * p[y].log()
            elif name in ("tnpo", "wtnpo"):
                total = total + 2 * w**4 / (w**4 + ref[0] ** 4 + 1e-5) * (w**1.5 if name == "wtnpo" else 1) * p[y].log()
            elif name == "satimp":
                total = total + w**5 * (1 - w) * p[y].log()
            elif name == "ce_u":
                q = z.detach().clone()
                q[y] = -math.inf
                total = total - (q.softmax(0) * p.log()).sum()
            elif name == "undial":
                d = 1 - ref[y] + ref[y] * math.exp(-3)
                q = ref / d
                q[y] = ref[y] * math.exp(-3) / d
                total = total - (q * p.log()).sum() / n
            elif name == "pdu":
                total = total + (z.max() - z.mean()) ** 2
            else:
                other = F.one_hot(tokens_of(out, 4)[b, t], V).double() if name == "jensun" else ref
                m = (p + other) / 2
                total = total + (p * (p / m).log()).sum() / 2 + (other[other > 0] * (other / m)[other > 0].log()).sum() / 2
        found.append(total)
    return torch.stack(found)


@pytest.mark.parametrize("name", [n for n in LOSSES if not n.endswith("-top")])
def test_losses_and_their_gradients_equal_the_slow_form(name):
    """Values and gradients: a weight that is not detached, a wrong position or a wrong reduction shows in one of the two."""
    for seed in range(3):
        out = made(seed)
        fast, by_hand = LOSSES[name](out), slow(name, out)
        torch.testing.assert_close(fast, by_hand)
        weight = torch.arange(1.0, 4.0, dtype=torch.float64)
        a, b = (torch.autograd.grad((weight * v).sum(), out.logits, retain_graph=True)[0] for v in (fast, by_hand))
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", list(LOSSES))
def test_losses_are_those_of_a_batch_of_one_and_ignore_padding(name):
    out, other = made(1), made(1, extra=3, fill=50.0)
    torch.testing.assert_close(LOSSES[name](out), LOSSES[name](other), rtol=0, atol=0)
    (g,) = torch.autograd.grad(LOSSES[name](other).sum(), other.logits)
    assert not g[~losses.kept(other)].any()
    alone = aligned(out.logits[:1, :3], out.labels[:1, :3])
    torch.testing.assert_close(LOSSES[name](alone), LOSSES[name](out)[:1])


@pytest.mark.parametrize("name", list(LOSSES))
def test_losses_stay_finite_for_extreme_logits(name):
    for scale in (0.0, 300.0):
        out = made(2, scale=scale)
        value = LOSSES[name](out)
        (g,) = torch.autograd.grad(value.sum(), out.logits)
        assert torch.isfinite(value).all() and torch.isfinite(g).all()


# undial


def test_undial_without_beta_teaches_the_teacher_and_with_a_large_one_is_ce_u():
    out = made(3)
    own, y = out.logits.detach().log_softmax(-1), out.labels.clamp(min=0)
    every = torch.arange(V).expand_as(own)
    mine = own.gather(-1, y[..., None]).squeeze(-1)
    (g,) = torch.autograd.grad(distil(out, *adjusted(every, own, y, mine, beta=0.0)).sum(), out.logits)
    assert g.abs().max() < 1e-12
    limit = distil(out, *adjusted(every, own, y, mine, beta=1000.0))
    torch.testing.assert_close(limit, struck(out) / out.count)


def test_undial_keeps_the_true_token_apart_and_all_the_mass():
    """A teacher that ranks the true token last: among its 3 likeliest it takes the place of the third."""
    whole = torch.tensor([[[4.0, 3.0, 2.0, 1.0, 0.0, -1.0, -2.0]]], dtype=torch.float64).log_softmax(-1)
    top, y = whole.topk(3, -1), torch.tensor([[6]])
    index, logq, rest = adjusted(top.indices, top.values, y, whole[..., 6], beta=3.0)
    assert index.flatten().tolist() == [0, 1, 6]
    _, exact, none = adjusted(torch.arange(V).view(1, 1, -1), whole, y, whole[..., 6], beta=3.0)
    torch.testing.assert_close(logq, exact[..., [0, 1, 6]])
    torch.testing.assert_close(rest, exact[..., [2, 3, 4, 5]].exp().sum(-1))
    assert abs(float(logq.exp().sum() + rest) - 1) < 1e-12 and float(none) < 1e-12
    torch.testing.assert_close(undialled(made(0), k=V - 1), undialled(made(0)))


# ce_u


def test_ce_u_skips_the_first_answer_token_but_never_the_last():
    targets = torch.tensor([False, False, True, True, False, True])
    assert [later(targets, k).nonzero().flatten().tolist() for k in (0, 1, 2, 3, 99)] == [[2, 3, 5], [3, 5], [5], [5], [5]]
    model, task, cut = small("causal_lm")
    digests = {k: METHODS["ce_u"](model, task, cut, epochs=1, skip_first=k).digest for k in (0, 1, 10_000)}
    assert len(set(digests.values())) == 3
    with pytest.raises(SettingError, match="skip_first must be 0 or larger, not -1"):
        METHODS["ce_u"](model, task, cut, skip_first=-1)


# what a first step costs and sees


class Recording(Guard):
    """A guard that writes down the loss of every step."""

    def check_loss(self, value: float, step: int, lr: float) -> None:
        self.__dict__.setdefault("losses", {})[step] = value
        super().check_loss(value, step, lr)


def first_loss(name: str, cut, **settings) -> float:
    model, task, _ = small("causal_lm")
    watch = Recording()
    assert unlearn(name, model, task, cut, guard=watch, epochs=1, batch_size=8, **settings).outcome == "ok"
    return watch.losses[0]


def test_preference_losses_start_at_two_ln_two_over_beta():
    """At the first step the model is its own reference: 20 ln 2, for the pair as for NPO; SAM's is taken uphill, by little."""
    _, _, cut = small("causal_lm")
    for name, settings in (("altpo", {"source": "anchor"}), ("altpo", {"answers": 2, "new": 8}), ("npo", {})):
        assert first_loss(name, cut, retain="none", **settings) == pytest.approx(20 * math.log(2), abs=1e-4)
    assert 20 * math.log(2) < first_loss("npo_sam", cut, retain="none", rho=1e-3) < 20 * math.log(2) + 0.5


def test_retain_terms_that_compare_with_the_start_model_start_at_zero():
    _, _, cut = small("causal_lm")
    for name in ("jensun", "rmu"):
        alone = first_loss(name, cut, retain="none")
        assert first_loss(name, cut, alpha=100.0) == pytest.approx(alone, abs=1e-5)
        assert first_loss(name, cut, alpha=100.0, **{"jensun": {"jsd": False}, "rmu": {"match": False}}[name]) > alone + 1


# jensun


def test_jensun_is_bounded_by_ln_two_and_zero_at_its_target():
    for seed in range(20):
        out = made(seed, scale=10.0)
        for value in (to_token(out, tokens_of(out, seed)), taught(out)):
            assert (value >= -1e-12).all() and (value <= out.count * math.log(2) + 1e-12).all()
    out = made(0)
    own = out.logits.detach().log_softmax(-1)
    assert to_teacher(out, torch.arange(V).expand_as(own), own).abs().max() < 1e-12
    assert (taught(out, 3) <= taught(out) + 1e-12).all()


def test_jensun_refusals_go_round_over_the_targets():
    _, task, cut = small("causal_lm")
    data = cut.forget
    found = refusals(data, ["No idea"] * len(data))
    once = data.format.tokenizer(" No idea", add_special_tokens=False)["input_ids"]
    for r, targets in zip(found, data.targets, strict=True):
        assert r.tolist() == (once * 40)[: int(targets.sum())]
    out = task.forward(small("causal_lm")[0], collate(data, torch.tensor([2, 0]), None))
    placed = losses.place(found, {"i": torch.tensor([2, 0])}, out)
    assert placed[losses.kept(out)].tolist() == found[2].tolist() + found[0].tolist()
    text = data.format.texts([{"text": "Ann was born in Norhaven."}])
    assert len(refusals(text, ["No idea"])[0]) == int(text.targets[0].sum())


def test_jensun_takes_the_anchors_answers_and_says_what_is_missing():
    model, task, cut = small("causal_lm")
    by_words, by_anchor = (METHODS["jensun"](model, task, cut, epochs=1, source=s).digest for s in ("refusal", "anchor"))
    assert by_words != by_anchor
    with pytest.raises(SplitError, match="split lacks anchor"):
        METHODS["jensun"](model, task, replace(cut, anchor=None), source="anchor")
    with pytest.raises(SplitError, match="anchor has no answer to the question of forget record 2"):
        METHODS["jensun"](model, task, replace(cut, anchor=cut.anchor.take([0, 2, 3])), source="anchor")
    with pytest.raises(SettingError, match="source must be one of refusal, anchor and refusal not empty; found 'words' and 'No idea'"):
        METHODS["jensun"](model, task, cut, source="words")
    with pytest.raises(SplitError, match="forget has no format"):
        METHODS["jensun"](model, task, replace(cut, forget=replace(cut.forget, format=None)))


# altpo


def stub(monkeypatch, said: list[str], tokenizer) -> list[float]:
    """`generate` that gives these texts in turn, the last one for ever; returns the temperatures it was asked for."""
    left, heats = list(said), []

    def generate(model, prompts, *, temperature, **_):
        heats.append(temperature)
        texts = [left.pop(0) if len(left) > 1 else left[0] for _ in prompts]
        return [torch.tensor(tokenizer(t, add_special_tokens=False)["input_ids"], dtype=torch.long) for t in texts]

    monkeypatch.setattr(altpo, "generate", generate)
    return heats


def test_altpo_draws_again_until_no_alternate_tells_the_fact(monkeypatch):
    model, _, cut = small("causal_lm")
    one = cut.forget.take([1])
    row, tokenizer = one.rows[0], one.format.tokenizer
    settings = {"answers": 2, "temperature": 1.0, "new": 8, "ask": "", "seed": 0}
    heats = stub(monkeypatch, [f"It is {row['fact'].upper()}.", "  ", "in Corwick", "perhaps Ulford"], tokenizer)
    with guard.watching(Guard()) as watch:
        assert altpo.made_up(model, one, **settings) == [["in Corwick", "perhaps Ulford"]]
        assert altpo.made_up(model, one, **settings) == [["in Corwick", "perhaps Ulford"]]
    assert heats == [1.0, 1.5] and watch.meter.forward == 4
    heats = stub(monkeypatch, [f"It is {row['fact']}."], tokenizer)
    with pytest.raises(SplitError, match="the model gave the old answer to forget record 1 in 12 draws; set ask"):
        altpo.made_up(model, one, **settings)
    assert len(heats) == altpo.TRIES


def test_altpo_makes_up_the_same_answers_for_the_same_seed():
    model, _, cut = small("causal_lm")
    settings = {"answers": 3, "temperature": 1.0, "new": 6, "ask": "", "seed": 1}
    found = altpo.made_up(model, cut.forget, **settings)
    assert [len(f) for f in found] == [3] * len(cut.forget)
    assert not any(altpo.tells(a, row) for have, row in zip(found, cut.forget.rows, strict=True) for a in have)
    assert found == altpo.made_up(model, cut.forget, **settings)
    assert found != altpo.made_up(model, cut.forget, **{**settings, "seed": 2})
    assert found != altpo.made_up(model, cut.forget, **{**settings, "ask": "Not {answer}, but: {question}"})


def test_altpo_counts_its_draws(monkeypatch):
    model, task, cut = small("causal_lm")
    stub(monkeypatch, ["perhaps Ulford"], cut.forget.format.tokenizer)
    watch = Guard()
    attempt = unlearn("altpo", model, task, cut, guard=watch, answers=3, epochs=1)
    assert (watch.meter.forward, watch.meter.backward) == METHODS["altpo"].expected(cut, attempt.settings)
    assert watch.meter.forward == 12 + (4 + 12) + 2 * 12 + watch.meter.seen["retain"]


def test_altpo_takes_all_answers_of_the_anchor_and_checks_them():
    model, task, cut = small("causal_lm")
    rows = cut.forget.rows
    form = cut.forget.format
    said = [{**rows[0], "answer": "Who knows."}, {**rows[1], "answer": "No."}, {**rows[0], "answer": "Nobody knows."}]
    assert altpo.given(cut.forget.take([1, 0]), form.texts(said)) == [["No."], ["Who knows.", "Nobody knows."]]
    with pytest.raises(SplitError, match="anchor has no answer to the question of forget record 3"):
        altpo.given(cut.forget, form.texts(said))
    with pytest.raises(SplitError, match="an answer of anchor holds the old answer of forget record 1"):
        altpo.given(cut.forget.take([0]), form.texts([rows[0]]))
    texts = split(form, forget=[{"text": "Ann was born in Norhaven."}])
    with pytest.raises(SplitError, match="altpo needs question-answer records"):
        METHODS["altpo"](model, task, texts, retain="none")


# pdu


@pytest.mark.parametrize(("every", "calls"), [("step", 4), ("epoch", 2)])
@pytest.mark.parametrize("parts", [1, 2])
def test_pdu_moves_lambda_after_the_first_epochs_by_the_mean_since(every, calls, parts, monkeypatch):
    """4 records by 2, 3 epochs of 2 steps, the first held. With lr 0 the model stays, so CE of a step is the plain CE of its retain batches."""
    model, task, cut = small("causal_lm")
    seen: list[tuple[float, float]] = []
    monkeypatch.setattr(pdu, "moved", lambda dual, ce, **_: seen.append((dual, ce)) or dual + 1)
    tuned = {"epochs": 3, "batch_size": 2 // parts, "accumulate": parts, "hold": 1.0, "every": every, "lr": 0.0, "alpha": 7.0}
    METHODS["pdu"](model, task, cut, seed=2, **tuned)
    batches = task.batches(cut.retain, 2 // parts, epochs=0.5, seed=3)
    with torch.no_grad():
        outs = [[task.forward(model, batches[k * parts + j]) for j in range(parts)] for k in range(6)]
    ce = [float(sum(o.nll.sum() for o in step) / sum(o.count.sum() for o in step)) for step in outs]
    wanted = ce[2:] if every == "step" else [(ce[2] + ce[3]) / 2, (ce[4] + ce[5]) / 2]
    assert len(seen) == calls and [d for d, _ in seen] == [7.0 + k for k in range(calls)]
    assert [c for _, c in seen] == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("every", ["step", "epoch"])
@pytest.mark.parametrize("kill", [1, 2, 3])
def test_pdu_resumes_with_its_lambda(every, kill, tmp_path, monkeypatch):
    """lambda moves from the first step on; a run killed after any step and called again ends at the same bits."""
    model, task, cut = small("causal_lm")
    before = state(model)
    settings = {"epochs": 3, "batch_size": 2, "accumulate": 1, "hold": 0.0, "every": every, "alpha": 2.0, "lr": 1e-3, "eta": 1.0}
    whole = unlearn("pdu", model, task, cut, seed=5, **settings)
    assert unlearn("pdu", model, task, cut, seed=5, **{**settings, "eta": 0.0}).patch.digest != whole.patch.digest
    step = journal.Journal.step

    def killed(self, session, stepper, recorded, watch, done):
        step(self, session, stepper, recorded, watch, done)
        if done == kill:
            raise KeyboardInterrupt

    monkeypatch.setattr(journal.Journal, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        unlearn("pdu", model, task, cut, seed=5, folder=tmp_path, checkpoint_every=1, **settings)
    assert same(before, state(model)) and pdu.NAME not in dict(model.named_buffers())
    monkeypatch.setattr(journal.Journal, "step", step)
    assert unlearn("pdu", model, task, cut, seed=5, folder=tmp_path, checkpoint_every=1, **settings).patch.digest == whole.patch.digest
    assert same(before, state(model))


def test_pdu_keeps_its_lambda_out_of_patches_and_best_weights():
    model, task, cut = small("causal_lm")
    scores = iter([3.0, 2.0, 1.0, 0.0, -1.0])
    attempt = unlearn("pdu", model, task, cut, guard=Guard(validate=lambda m: next(scores), every=1), epochs=2, batch_size=2, hold=0.0, lr=1e-3)
    assert attempt.outcome == "ok" and {e.name for e in attempt.patch.edits} <= {n for n, _ in model.named_parameters()}
    for settings, words in (({"every": "day"}, "every must be one of step, epoch"), ({"retain": "kl"}, "it needs retain=ce and alpha above 0, not kl")):
        with pytest.raises(SettingError, match=words):
            METHODS["pdu"](model, task, cut, **settings)


# task_vector


def test_task_vector_goes_the_other_way():
    """scale -1 is fine-tuning itself, which lowers the loss: weights, and products under LoRA, of another scale follow from it."""
    model, task, cut = small("causal_lm")
    settings = {"epochs": 2, "lr": 1e-3}

    def loss(patch) -> float:
        twin = copied(model)
        patch.apply(twin)
        with torch.no_grad():
            return float(task.forward(twin, collate(cut.forget, torch.arange(4), None)).mean.mean())

    tuned, away_from = (METHODS["task_vector"](model, task, cut, scale=s, **settings) for s in (-1.0, 2.0))
    base = dict(model.named_parameters())
    for a, b in zip(tuned.edits, away_from.edits, strict=True):
        assert isinstance(a, Replace) and a.mask is None
        torch.testing.assert_close(b.values, away(base[a.name].detach(), a.values, 2.0), rtol=1e-5, atol=1e-6)
    tuned, away_from = (METHODS["task_vector"](model, task, cut, scale=s, lora=2, **settings) for s in (-1.0, 2.0))
    assert loss(tuned) < loss(Patch(())) < loss(away_from)
    for a, b in zip(tuned.edits, away_from.edits, strict=True):
        assert isinstance(a, LowRank)
        torch.testing.assert_close(b.up @ b.down, -2 * a.up @ a.down)
    with pytest.raises(SettingError, match="task_vector trains on the forget set alone: set retain=none, not ce"):
        METHODS["task_vector"](model, task, cut, retain="ce")


def test_task_vector_is_validated_at_its_end_alone():
    model, task, cut = small("causal_lm")
    seen = []

    def validate(m: nn.Module) -> float:
        seen.append(task.forward(m, collate(cut.forget, torch.arange(4), None)).mean.mean().item())
        return 0.0

    unlearn("task_vector", model, task, cut, guard=Guard(validate=validate, every=1), epochs=5, lr=1e-3, scale=2.0)
    start = task.forward(model, collate(cut.forget, torch.arange(4), None)).mean.mean().item()
    assert len(seen) == 1 and seen[0] > start


# llmu


def test_llmu_answers_are_others():
    _, _, cut = small("causal_lm")
    data = mismatched(cut, 3, seed=0)
    known = {row["answer"] for row in cut.retain.rows}
    assert len(data) == 3 * len(cut.forget) and all(row["answer"] in known for row in data.rows)
    assert [row["question"] for row in data.rows] == [row["question"] for row in cut.forget.rows] * 3
    assert not {row["answer"] for row in data.rows} & {row["answer"] for row in cut.forget.rows}
    with pytest.raises(SplitError, match="retain has no answer that forget does not have; set mismatch=0"):
        choose(["a"], {"a"}, 1, 1, 0)
    form = cut.forget.format
    texts = split(form, forget=[{"text": "Ann was born in Norhaven."}], retain=[dict(r) for r in cut.retain.rows])
    model, task, _ = small("causal_lm")
    with pytest.raises(SplitError, match="set mismatch=0 for plain text"):
        METHODS["llmu"](model, task, texts)
    assert unlearn("llmu", model, task, texts, mismatch=0, epochs=1, lr=1e-3).outcome == "ok"


def test_llmu_ends_at_its_bound():
    """An untrained model has some 6 nats per token: a bound below that ends after one step, one above or none at all does not."""
    model, task, cut = small("causal_lm")
    steps = {}
    for bound in (5.0, 50.0, 0.0):
        watch = Guard()
        unlearn("llmu", model, task, cut, guard=watch, epochs=3, accumulate=2, batch_size=1, bound=bound)
        steps[bound] = watch.meter.steps
    assert steps == {5.0: 1, 50.0: 6, 0.0: 6}


# npo_sam


def test_sam_takes_the_gradient_uphill_and_leaves_the_weights():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    unused = torch.ones(2, dtype=torch.float64, requires_grad=True)
    x = torch.randn(5, 3, dtype=torch.float64)
    params = list(net.parameters())
    before = [p.detach().clone() for p in params]
    value = sharp([*params, unused], lambda: net(x).square().sum(), rho=0.3)
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    found = torch.autograd.grad(value, params)
    twin = copied(net)
    g = torch.autograd.grad(net(x).square().sum(), params)
    norm = torch.cat([d.flatten() for d in g]).norm()
    with torch.no_grad():
        for p, d in zip(twin.parameters(), g, strict=True):
            p.add_(0.3 * d / norm)
    there = twin(x).square().sum()
    torch.testing.assert_close(value.detach(), there.detach())
    for a, b in zip(found, torch.autograd.grad(there, list(twin.parameters())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_sam_without_a_move_is_npo():
    """But for rounding: npo's two parts share a forward pass."""
    model, task, cut = small("causal_lm")
    sgd = {"epochs": 2, "lr": 0.1, "optimizer": "sgd"}
    runs = [METHODS[n](model, task, cut, **sgd, **s) for n, s in (("npo", {}), ("npo_sam", {"rho": 0.0}), ("npo_sam", {"rho": 0.1}))]
    found = [copied(model) for _ in runs]
    for patch, twin in zip(runs, found, strict=True):
        patch.apply(twin)
    first, still, far = (twin.state_dict() for twin in found)
    gap = [max(float((first[n] - other[n]).abs().max()) for n in first) for other in (still, far)]
    assert gap[0] < 1e-6 and gap[1] > 1e-5, gap


# rmu


def test_rmu_means_are_per_sequence_where_the_port_takes_all_pairs():
    """Token losses 1 1 and 2 2 2 2: 1.5; the port divides every row's sum by every row's length: 1.875."""
    lengths = torch.tensor([2, 4])
    mask = torch.arange(4) < lengths[:, None]
    h = torch.tensor([[1.0, 1.0, 9.0, 9.0], [2.0**0.5] * 4])[..., None]
    assert float(rmu.steer(h, torch.zeros(1), mask).mean()) == pytest.approx(1.5, abs=1e-6)
    sums = (h.squeeze(-1).square() * mask).sum(1)
    assert float((sums / lengths[:, None]).mean()) == pytest.approx(1.875, abs=1e-6)


def test_rmu_reads_the_block_that_the_whole_model_has():
    model, _, cut = small("causal_lm")
    batch = collate(cut.forget, torch.arange(4), None)
    with guard.watching(Guard()) as watch:
        for number, (name, _) in enumerate(blocks(model)[:-1]):
            whole = model(batch["x"], attention_mask=(torch.arange(batch["x"].shape[1]) < batch["n"][:, None]).long(), output_hidden_states=True)
            h = rmu.read(model, batch, name)
            torch.testing.assert_close(h, whole.hidden_states[number + 1])
        h.sum().backward()
    model.zero_grad()
    assert (watch.meter.forward, watch.meter.backward) == (4, 4)


def test_rmu_ignores_padding_and_its_batch():
    model, _, cut = small("causal_lm")
    name = blocks(model)[0][0]
    model.double()
    target = torch.linspace(-1, 1, 32, dtype=torch.float64)

    def each(batch) -> torch.Tensor:
        h = rmu.read(model, batch, name)
        return rmu.steer(h, target, torch.arange(h.shape[1]) < batch["n"][:, None]).detach()

    whole = collate(cut.forget, torch.arange(4), None)
    alone = torch.cat([each(collate(cut.forget, torch.tensor([k]), None)) for k in range(4)])
    torch.testing.assert_close(each(whole), alone)
    torch.testing.assert_close(each(padded(whole, 5, token=7)), alone)


def test_rmu_directions_are_positive_units_and_its_norm_is_the_loops():
    u = rmu.directions(3, 50, 4)
    assert (u > 0).all() and torch.allclose(u.norm(dim=1), torch.ones(3)) and torch.equal(u, rmu.directions(3, 50, 4))
    assert not torch.equal(u, rmu.directions(3, 50, 5)) and not torch.equal(u[0], u[1])
    model, task, cut = small("causal_lm")
    name = blocks(model)[1][0]
    norms = [rmu.read(model, collate(cut.forget, torch.tensor([k]), None), name)[0, 1:].norm(dim=1) for k in range(4)]
    with guard.watching(Guard()) as watch:
        assert rmu.natural(model, task, cut.forget, name, size=3) == pytest.approx(torch.cat(norms).mean().item(), rel=1e-5)
    assert watch.meter.forward == 4


@pytest.mark.parametrize("moe", [False, True])
def test_rmu_moves_the_output_projections_alone(moe):
    model, task, cut = small("causal_lm", moe)
    inner = "model.layers.{}.mlp.experts.down_proj" if moe else "model.layers.{}.mlp.down_proj.weight"
    for settings, numbers in (({}, [0]), ({"layer": 1}, [0, 1]), ({"layer": 1, "span": 1}, [1])):
        patch = METHODS["rmu"](model, task, cut, epochs=1, **settings)
        assert {e.name for e in patch.edits} == {inner.format(n) for n in numbers}
    patch = METHODS["rmu"](model, task, cut, epochs=1, layers=r"q_proj", layer=1)
    assert {e.name for e in patch.edits} == {f"model.layers.{n}.self_attn.q_proj.weight" for n in (0, 1)}
    patch = METHODS["rmu"](model, task, cut, epochs=2, lora=2, layer=1)
    assert all(isinstance(e, LowRank) for e in patch.edits) and {e.name for e in patch.edits} == {inner.format(n) for n in (0, 1)}


def test_rmu_finds_projections_of_other_builds():
    class Block(nn.Module):
        def __init__(self, out: str) -> None:
            super().__init__()
            self.attn = nn.ModuleDict({"c_proj": nn.Linear(8, 4)})
            self.mlp = nn.ModuleDict({"first": nn.Linear(4, 16), out: nn.Linear(16, 4)})

    for out in ("c_proj", "fc2", "second"):
        model = nn.ModuleDict({"h": nn.ModuleList([Block(out) for _ in range(3)])})
        assert rmu.projections(model, range(1, 3)) == [f"h.{n}.mlp.{out}.weight" for n in (1, 2)]
    with pytest.raises(ScopeError, match=r"no feed-forward output projection in h\.0; name the weights with layers"):
        rmu.projections(nn.ModuleDict({"h": nn.ModuleList([nn.LayerNorm(3)])}), range(1))
    with pytest.raises(ModelError, match="no list of decoder blocks"):
        rmu.projections(nn.Linear(2, 2), range(1))


def test_rmu_settings():
    model, task, cut = small("causal_lm")
    digests = {str(s): METHODS["rmu"](model, task, cut, epochs=1, **s).digest for s in ({}, {"tokens": "answer"}, {"c": 3.0}, {"kappa": 2.0}, {"layer": 1})}
    assert len(set(digests.values())) == 5
    rows = [{**row, "topic": str(k % 2)} for k, row in enumerate(cut.forget.rows)]
    two = replace(cut, forget=replace(cut.forget, rows=tuple(rows)))
    assert METHODS["rmu"](model, task, two, epochs=1).digest != digests["{}"]
    one = replace(cut, forget=replace(cut.forget, rows=tuple({**row, "topic": "0"} for row in rows)))
    assert METHODS["rmu"](model, task, one, epochs=1).digest == digests["{}"]
    for settings, words in (
        ({"layer": 2}, r"layer must be -1 or in 0..1, and span 1 or larger; found 2 and 3"),
        ({"tokens": "some"}, "tokens must be one of all, answer, not 'some'"),
        ({"kappa": 0.0}, "kappa above 0"),
    ):
        with pytest.raises(SettingError, match=words):
            METHODS["rmu"](model, task, cut, **settings)
    with pytest.raises(SplitError, match="split lacks retain"):
        METHODS["rmu"](model, task, replace(cut, retain=None))
    assert METHODS["rmu"](model, task, replace(cut, retain=None), retain="none", epochs=1).edits


NAMES = ("altpo", "ce_u", "jensun", "llmu", "npo_sam", "pdu", "rmu", "satimp", "task_vector", "tnpo", "undial", "wga")


@pytest.mark.parametrize("name", NAMES)
def test_cost_is_exact_and_lora_leaves_low_rank(name):
    """What a method declares is what the meter counts, with KL, LoRA and parts of a step too; no record of test is drawn."""
    model, task, cut = small("causal_lm")
    own = {"altpo": {"source": "anchor"}, "pdu": {}, "task_vector": {}}
    for extra in ({}, {"lora": 2}, {"accumulate": 2} if name in ("task_vector", "pdu") else {"retain": "kl", "accumulate": 2}):
        watch = Guard()
        attempt = unlearn(name, model, task, cut, guard=watch, epochs=1, batch_size=3, lr=1e-3, **own.get(name, {}), **extra)
        assert attempt.outcome == "ok", attempt.reason
        assert (watch.meter.forward, watch.meter.backward) == METHODS[name].expected(cut, attempt.settings)
        assert set(watch.meter.seen) <= {"forget", "retain", "other"}
        assert all(isinstance(e, LowRank) for e in attempt.patch.edits) == ("lora" in extra)
