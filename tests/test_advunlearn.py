"""AdvUnlearn, the inner search, and attacks on prompts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from worlds import copied, same, small, state, toy

from expunge.audits.core import Probe, audit
from expunge.audits.pictures import prompt_attack
from expunge.core.errors import ModelError, SettingError
from expunge.core.registry import CHECKS, METHODS
from expunge.core.session import scratch
from expunge.core.stats import wilson
from expunge.engine.run import unlearn
from expunge.methods.diffusion.advunlearn import nearest
from expunge.modalities.diffusion import attacks
from expunge.modalities.diffusion.task import PREDICTIONS, Schedule, diffusion, embedded_states, predict, roomy, states, word_table
from expunge.parts.scopes.attention import part
from expunge.parts.updates.bilevel import NAME, attacked, bilevel, seek

QUICK = {"steps": 5, "trajectories": 3, "path": 3, "batch_size": 6, "inner": 2}


def test_the_toy_of_the_card():
    """U(s) = s, E(delta) = w (c + delta): at -0.5 the attack's loss is 0.25 with slope -1, the first step is lr long; outer loss 4 with slope 4."""
    w, seen = torch.tensor(1.0, requires_grad=True), []

    def regained(d, k):
        value = (w * (1 + d) - 1) ** 2
        seen.append((float(value.detach()), float(torch.autograd.grad(value, d, retain_graph=True)[0])))
        return value

    found = seek(regained, torch.tensor(-0.5), steps=1, lr=1e-3)
    assert seen == [(0.25, -1.0)] and float(found) == pytest.approx(-0.499) and w.grad is None
    outer = (w * (1 + 0.0) + 1) ** 2
    assert float(outer.detach()) == 4 and float(torch.autograd.grad(outer, w)[0]) == 4


def test_gradients_of_the_search_do_not_add_up():
    """Adam sees each step's own gradient: its path is that of Adam by hand; with the sum of all gradients so far, as published, it is another."""

    def path(summed: bool) -> float:
        d, m, v, total = 2.0, 0.0, 0.0, 0.0
        for k in range(1, 31):
            total = 2 * d + (total if summed else 0.0)
            m, v = 0.9 * m + 0.1 * total, 0.999 * v + 0.001 * total**2
            d -= 0.3 * (m / (1 - 0.9**k)) / ((v / (1 - 0.999**k)) ** 0.5 + 1e-8)
        return d

    found = float(seek(lambda d, k: d**2, torch.tensor(2.0, dtype=torch.double), steps=30, lr=0.3))
    assert found == pytest.approx(path(summed=False), abs=1e-6) and abs(found - path(summed=True)) > 0.1


def test_the_last_step_of_a_search_counts():
    """n steps of Adam on a constant slope go n * lr, and none go nowhere."""
    walk = [float(seek(lambda d, k: 3 * d, torch.tensor(0.0), steps=n, lr=0.01)) for n in (0, 1, 5)]
    assert walk == pytest.approx([0, -0.01, -0.05], abs=1e-6)


def test_the_sign_variant_forgets_the_size_of_slopes():
    """Adam's second step after slopes 1 and 100 differs from that after 1 and 1; of signs both are the same."""
    ends = {
        sign: [float(seek(lambda d, k, s=s: d * (s if k else 1.0), torch.tensor(0.0), steps=2, lr=0.1, sign=sign)) for s in (1.0, 100.0)]
        for sign in (False, True)
    }
    assert ends[True][0] == ends[True][1] and abs(ends[False][0] - ends[False][1]) > 1e-3


def test_bilevel_attacks_when_it_is_told_and_holds_delta_otherwise():
    net, delta, calls, given = nn.Linear(1, 1), torch.zeros(1), [], []

    def attack(d, number):
        calls.append((number, float(d)))
        return d + 1

    def loss(batch, d):
        given.append(None if d is None else float(d))
        return net(torch.ones(1, 1)).sum()

    bilevel(scratch(net), attack, loss, range(6), delta, idle=1, every=2, lr=0.0)
    assert calls == [(0, 0.0), (1, 1.0), (2, 2.0)] and given == [None, 1, 1, 2, 2, 3]
    with pytest.raises(SettingError, match="every must be at least 1"):
        bilevel(scratch(net), attack, loss, range(6), delta, every=0, lr=0.0)


def test_delta_is_among_the_buffers_while_the_session_is_open():
    """So that checkpoints hold it; afterwards there is no trace of it, in the model or in the patch."""
    model, _, _ = small("diffusion")
    before, delta = state(model), torch.zeros(2)
    with attacked(model, part(model, "text"), delta) as e:
        assert e.tensors()[NAME] is delta
        e.params["text_encoder.final.weight"].data.add_(1)
    assert same(before, state(model)) and [x.name for x in e.patch.edits] == ["text_encoder.final.weight"]


def test_a_run_that_starts_at_the_latest_attack_resumes(tmp_path, monkeypatch):
    """What an attack found is state of the run: killed and called again, the patch is the same, bit for bit."""
    from expunge.core import journal

    model, task, split = small("diffusion")
    wanted = {**QUICK, "start": "latest", "every": 2, "warmup": 0.0, "seed": 5}
    whole = unlearn("advunlearn", model, task, split, **wanted)
    step, seen = journal.Journal.step, []

    def killed(self, *args):
        step(self, *args)
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(journal.Journal, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        unlearn("advunlearn", model, task, split, folder=tmp_path, checkpoint_every=1, **wanted)
    monkeypatch.setattr(journal.Journal, "step", step)
    again = unlearn("advunlearn", model, task, split, folder=tmp_path, checkpoint_every=1, **wanted)
    assert again.patch.digest == whole.patch.digest
    fresh = unlearn("advunlearn", model, task, split, **{**wanted, "start": "random"})
    assert fresh.patch.digest != whole.patch.digest


def test_free_embeddings_of_words_give_what_the_words_give():
    """Two words' own embeddings before a prompt have the states of the prompt with these words; other embeddings have others; padding gives way."""
    model, _, split = small("diffusion")
    encode = split.forget.encode
    table = word_table(model).weight
    short, long = encode(["a seven", "seven"]), encode(["small one a seven", "small one seven"])
    extra = table[long[0, :2]]
    torch.testing.assert_close(embedded_states(model, short, extra), states(model, long))
    torch.testing.assert_close(embedded_states(model, short, torch.stack([extra, extra.flip(0)]))[0], states(model, long)[0])
    assert not torch.allclose(embedded_states(model, short, extra.flip(0)), states(model, long))
    slope = torch.autograd.grad(embedded_states(model, short, free := extra.detach().requires_grad_()).sum(), free)[0]
    assert slope.shape == extra.shape and bool(slope.any())
    with pytest.raises(SettingError, match="3 words more do not fit into every prompt of 8 places"):
        embedded_states(model, encode(["a drawing of a seven"]), table[:3])
    assert roomy(encode(["a drawing of a seven", "seven"]), 3).tolist() == [False, True] and not bool(roomy(short, 8).any())
    with pytest.raises(ModelError, match="no table of word embeddings"):
        word_table(nn.Linear(1, 1))


def test_free_embeddings_in_a_text_encoder_of_transformers():
    """CLIPTextModel takes tokens alone: free embeddings stand after its start token, and no hook stays."""
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        vocab_size=20, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=6, bos_token_id=18,
        eos_token_id=19,
    )  # fmt: skip
    torch.manual_seed(0)
    model = nn.Module()
    model.text_encoder = transformers.CLIPTextModel(config).eval()
    tokens, longer = torch.tensor([[18, 3, 19, 19, 19, 19]]), torch.tensor([[18, 7, 9, 3, 19, 19]])
    table = word_table(model)
    with torch.no_grad():
        torch.testing.assert_close(embedded_states(model, tokens, table.weight[[7, 9]]), states(model, longer))
        torch.testing.assert_close(states(model, tokens), model.text_encoder(tokens).last_hidden_state)
    assert not table._forward_hooks


def test_the_words_of_the_card():
    """Simplex: (0.5, 0.8, -0.2) -> (0.35, 0.65, 0). Times 10, 30, 50 .. 990. Slopes are cut: 3 -> 1, -0.2 stays. 29 + 79 of 142 are 76.06 %."""
    torch.testing.assert_close(attacks.simplex(torch.tensor([[0.5, 0.8, -0.2], [0.2, 0.3, 0.5]])), torch.tensor([[0.35, 0.65, 0.0], [0.2, 0.3, 0.5]]))
    assert attacks.GRID[:3] == (10, 30, 50) and attacks.GRID[-1] == 990 and len(attacks.GRID) == 50
    u = torch.tensor([[0.5, 0.5]], requires_grad=True)
    x = attacks.sampled(u, torch.eye(2), 3, torch.Generator().manual_seed(0))
    assert x.shape == (3, 1, 2) and bool(((x == 0) | (x == 1)).all())
    (slope,) = torch.autograd.grad((x * torch.tensor([3.0, -0.2])).sum(), u)
    torch.testing.assert_close(slope, torch.tensor([[1.0, -0.2]]))
    plain, tried = torch.arange(142) < 29, torch.arange(142) < 108
    assert round(100 * wilson(int(plain.sum()), 142)[0], 2) == 20.42 and round(100 * wilson(int((plain | tried).sum()), 142)[0], 2) == 76.06


def test_projected_rows_are_probabilities():
    u = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)) * 3
    p = attacks.simplex(u)
    assert bool((p >= 0).all()) and torch.allclose(p.sum(1), torch.ones(50)) and torch.allclose(attacks.simplex(p), p, atol=1e-6)
    other = torch.softmax(torch.randn(50, 7, generator=torch.Generator().manual_seed(1)), 1)
    assert bool(((u - p).norm(dim=1) <= (u - other).norm(dim=1)).all())  # no other point of the simplex is nearer


class Telling(nn.Module):
    """A model whose text decides everything: at word `key` anywhere in the prompt it predicts the very image, else noise of its own."""

    def __init__(self, schedule: Schedule, image: torch.Tensor, key: int):
        super().__init__()
        self.schedule, self.image = schedule, image
        self.text_encoder = Table(12)
        self.key = self.text_encoder.embedding.weight.detach()[key].clone()

    def unet(self, x, t, encoder_hidden_states):
        near = torch.exp(-(encoder_hidden_states - self.key).square().sum(-1)).amax(1).view(-1, 1, 1, 1)
        a, b = self.schedule.mix(t)
        return near * self.schedule.wanted(self.image.expand_as(x), (x - a * self.image) / b, t)


class Table(nn.Module):
    def __init__(self, n: int):
        super().__init__()
        self.embedding = nn.Embedding(n, 4)
        with torch.no_grad():
            self.embedding.weight.copy_(torch.randn(n, 4, generator=torch.Generator().manual_seed(2)))

    def forward(self, tokens):
        return self.embedded(self.embedding(tokens))

    def embedded(self, x):
        return x


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_every_attack_finds_the_word_that_gives_the_image_away(kind):
    """Whatever the model predicts: the one word of twelve is found by gradients and by trying, and free embeddings end beside it."""
    _, _, split = small("diffusion")
    schedule, image = Schedule(kind), torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(1)) - 0.5
    task, key = diffusion(schedule, shape=(1, 8, 8), null=torch.zeros(4, dtype=torch.long)), 7
    model = Telling(schedule, image, key)
    data = replace(split.forget.take(range(4)), x=image.expand(4, -1, -1, -1).clone(), tokens=torch.tensor([[3, 0, 0, 0]]).repeat(4, 1))
    assert attacks.greedy(model, task, data, 1).tolist() == [key]
    assert attacks.words(model, task, data, 1, steps=100, lr=0.05, size=16).tolist() == [key]
    found = attacks.soft(model, task, data, 1, steps=60, tries=6, size=8)
    others = model.text_encoder.embedding.weight.detach()[:7]
    assert float((found - model.key).norm()) < 0.3 < float((others - model.key).norm(dim=1).min())
    assert torch.equal(found, attacks.soft(model, task, data, 1, steps=60, tries=6, size=8))
    with pytest.raises(SettingError, match="needs images"):
        attacks.greedy(model, task, replace(data, x=None), 1)


def test_the_published_order_of_times_is_followed(monkeypatch):
    """grid: the times rise from 10 to 990, one for a whole batch."""
    model, task, split = small("diffusion")
    seen, inner = [], attacks.loss

    def spy(model, task, batch, delta):
        if batch["t"].unique().numel() == 1:
            seen.append(float(batch["t"][0]))
        return inner(model, task, batch, delta)

    monkeypatch.setattr(attacks, "loss", spy)
    attacks.words(model, task, split.forget.take([0, 1]), 1, steps=50, size=2, grid=True)
    assert tuple(seen) == attacks.GRID


def test_attacks_leave_the_model_alone():
    model, task, split = small("diffusion")
    before, rng = state(model), torch.get_rng_state()
    attacks.soft(model, task, split.forget.take([0]), steps=2, tries=1, size=2)
    attacks.words(model, task, split.forget.take([0]), steps=5, size=2)
    attacks.greedy(model, task, split.forget.take([0]), most=2, size=2)
    prompt_attack.ATTACKS["random"](model, task, split.forget.take([0]), 0)
    assert same(before, state(model)) and torch.equal(rng, torch.get_rng_state())


def test_settings_of_advunlearn_are_checked():
    model, task, split = small("diffusion")
    run = METHODS["advunlearn"]
    for wrong, message in (
        ({"attack": "fgsm"}, "attack must be one of adam, sign, nearest, not 'fgsm'"), ({"start": "zero"}, "start must be one of random, latest"),
        ({"tokens": 4}, "4 words more do not fit"), ({"copies": 0}, "copies must be at least 1"), ({"warmup": 2.0}, "warmup in 0..1"),
    ):  # fmt: skip
        with pytest.raises(SettingError, match=message.split(",")[0]):
            run(model, task, split, **QUICK, **wrong)


@pytest.mark.parametrize("attack", ["adam", "sign", "nearest"])
def test_advunlearn_moves_the_text_encoder_alone(attack):
    model, task, split = small("diffusion")
    patch = METHODS["advunlearn"](model, task, split, attack=attack, **QUICK)
    assert patch.edits and all(e.name.startswith("text_encoder.") for e in patch.edits)
    assert patch.digest != METHODS["advunlearn"](model, task, split, attack=attack, **{**QUICK, "warmup": 1.0}).digest  # the attack matters


def test_the_nearest_words_are_words():
    table = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    found = nearest(table[[4, 2]].view(2, 1, 3) + 0.01, table)
    assert torch.equal(found, table[[4, 2]].view(2, 1, 3))


@pytest.mark.slow
def test_the_audit_tells_robust_from_not(monkeypatch):
    """A model that still draws sevens is attacked with success without any attack; all rows are shares of the drawings, the published OR holds."""
    monkeypatch.setattr(prompt_attack, "DRAWN", 10)
    monkeypatch.setitem(prompt_attack.ATTACKS, "soft", lambda m, t, d, s: attacks.soft(m, t, d, 2, steps=25, tries=1, seed=s))
    monkeypatch.setitem(prompt_attack.ATTACKS, "words", lambda m, t, d, s: attacks.words(m, t, d, 2, steps=4, size=8, seed=s))
    monkeypatch.setitem(prompt_attack.ATTACKS, "search", lambda m, t, d, s: attacks.greedy(m, t, d, 2, most=4, size=8, seed=s))
    model, task, split = toy("diffusion")
    twin = copied(model)
    METHODS["uce"](model, task, split).apply(twin)
    rows = {r.name: r for r in audit(Probe(model, twin, task, split), ["prompt_attack"])}
    assert len(rows) == 10 and all(r.n == 10 and 0 <= r.low <= r.value <= r.high <= 1 for r in rows.values())
    assert rows["prompt_attack.none"].value < 0.5 < rows["prompt_attack.none_before"].value
    assert rows["prompt_attack.soft"].value > rows["prompt_attack.none"].value  # an edit in closed form does not hold against free embeddings
    assert all(rows[f"prompt_attack.{a}"].value >= rows["prompt_attack.none"].value for a in prompt_attack.ATTACKS)
    assert CHECKS["prompt_attack"].slow and "free embeddings" in rows["prompt_attack.soft"].note


def test_an_attack_without_images_of_its_own_takes_drawings_of_the_model_before(monkeypatch):
    monkeypatch.setattr(prompt_attack, "DRAWN", 6)
    model, task, split = small("diffusion")
    data = prompt_attack.shown(Probe(model, model, task, split), replace(split.forget, x=None))
    assert data.x is not None and data.x.shape == (6, 1, 8, 8) and set(data.prompts) <= set(split.forget.prompts)
    assert prompt_attack.shown(Probe(model, model, task, split), split.forget) is split.forget


def test_predictions_at_free_embeddings_are_those_of_states():
    model, task, split = small("diffusion")
    schedule = Schedule()
    batch = task.collate(split.forget, torch.tensor([0, 1]), None)
    extra = torch.randn(1, word_table(model).embedding_dim, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x = schedule.noised(batch["x"], batch["noise"], batch["t"])
        wanted = schedule.wanted(batch["x"], batch["noise"], batch["t"])
        by_hand = (predict(model, x, batch["t"], embedded_states(model, batch["y"], extra)) - wanted).square().flatten(1).mean(1)
        torch.testing.assert_close(attacks.loss(model, task, batch, extra), by_hand)
