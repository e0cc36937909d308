"""Retention between requests: the card's numbers, GEM's programme against scipy, the memory, GS-LoRA's pieces, and streams on digits."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import make_data, make_net
from torch import nn
from torch.nn import functional as F

from expunge.core.errors import DataError, ScopeError, SettingError, SplitError
from expunge.core.registry import METHODS
from expunge.core.session import scratch
from expunge.core.types import Out
from expunge.data.records.memory import FisherSum, Memory
from expunge.guarantees import streams as continual
from expunge.guarantees.streams import Course, Request, play, read, schedule
from expunge.methods.classifiers.gs_lora import adapted, alive, bounded, divergence, group_norm, shrink
from expunge.modalities.classification.task import classification
from expunge.modalities.examples import Examples
from expunge.parts.losses.continual import der, derpp, ewc, lwf
from expunge.parts.updates import episodic
from expunge.parts.updates.combine import combine
from expunge.parts.updates.descend import descend
from expunge.parts.updates.gradients import fisher, rows


def out(logits: torch.Tensor) -> Out:
    return Out(nll=torch.ones(len(logits)), count=torch.ones(len(logits)), logits=logits)


# losses


def test_lwf_is_the_tempered_cross_entropy_and_its_gradient_is_the_gap():
    """Old (.8, .2) at T = 2 is (2/3, 1/3): ln 2 against (.5, .5); the gradient over the new logits is (q_new - q_old) / T; other classes get none."""
    new = torch.tensor([[0.5, 0.5]]).log().requires_grad_()
    loss = lwf(out(new), torch.tensor([[0.8, 0.2]]).log())
    assert float(loss.detach()) == pytest.approx(0.693147, abs=1e-6)
    assert torch.autograd.grad(loss.sum(), new)[0].flatten().tolist() == pytest.approx([(0.5 - 2 / 3) / 2, (0.5 - 1 / 3) / 2], abs=1e-6)
    wide = torch.tensor([[0.1, 9.0, 0.1]], requires_grad=True)
    loss = lwf(out(wide), torch.tensor([[math.log(0.8), 5.0, math.log(0.2)]]), classes=torch.tensor([0, 2]))
    assert float(loss.detach()) == pytest.approx(0.693147, abs=1e-6)
    assert float(torch.autograd.grad(loss.sum(), wide)[0][0, 1]) == 0


def test_ewc_der_and_derpp():
    assert float(ewc({"w": torch.tensor([1.2])}, {"w": torch.tensor([1.0])}, {"w": torch.tensor([0.5])}, strength=100.0)) == pytest.approx(2.0, abs=1e-5)
    f, z = torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 3.0]])
    assert der(out(f), z).tolist() == [2.5]
    assert derpp(out(f), z, out(f), alpha=0.1, beta=0.5).tolist() == pytest.approx([0.75])


# GEM, A-GEM, refresh


def test_the_cards_steps():
    g, m = [torch.tensor([1.0, 0.0])], [torch.tensor([-1.0, 1.0])]
    bent = episodic.rule("agem")([g, m])[0]
    assert bent.tolist() == [0.5, 0.5] and float(bent @ m[0]) == 0
    assert torch.equal(bent, combine([g, m], "project", whole=True)[0])
    assert episodic.rule("gem", margin=0.5)([g, m])[0].tolist() == [0.5, 0.5]
    assert float(episodic.gem(torch.tensor([[1.0, -1.0], [-1.0, 2.0]]), margin=0.4)[1]) == pytest.approx(1 / 2.001)
    for name in episodic.RULES:
        assert episodic.rule(name)([g, [torch.tensor([1.0, 1.0])]])[0].tolist() == [1.0, 0.0]  # no memory is harmed
    moved = episodic.refreshed(torch.tensor([3.0, 4.0]), torch.tensor([0.3, 0.4]), torch.zeros(2)) - torch.tensor([3.0, 4.0]).double()
    assert moved.tolist() == pytest.approx([3e-5, 4e-5], rel=1e-6)
    assert torch.equal(episodic.refreshed(torch.ones(2), torch.zeros(2), torch.zeros(2)), torch.ones(2).double())
    with pytest.raises(SettingError, match="rule must be one of gem, agem, not 'gam'"):
        episodic.rule("gam")
    with pytest.raises(SettingError, match="margin of 0 or more"):
        episodic.rule("gem", margin=-1.0)


def test_the_programme_is_solved_exactly():
    """Against scipy's non-negative least squares, and by the conditions of Karush, Kuhn and Tucker, with memories that nearly coincide among them."""
    from scipy.optimize import nnls

    generator = torch.Generator().manual_seed(0)
    for trial in range(60):
        K, low = 1 + trial % 20, (0.0, 0.5)[trial % 2]
        M = torch.randn(K, max(2, K // (1 + trial % 3)), generator=generator, dtype=torch.double)
        g = torch.randn(M.shape[1], generator=generator, dtype=torch.double)
        P, q = M @ M.T + 1e-3 * torch.eye(K), M @ g
        v = episodic.quadratic(P, q, low)
        slope = P @ v + q
        assert bool((v >= low).all()) and float(slope.min()) > -1e-8
        assert float((slope * (v - low)).abs().max()) < 1e-8
        L = torch.linalg.cholesky(P)
        found = nnls(L.T.numpy(), torch.linalg.solve(L, -(q + low * P.sum(1))).numpy())[0] + low
        assert v.tolist() == pytest.approx(found.tolist(), abs=1e-6)


def test_gem_takes_a_step_that_harms_no_memory():
    """Two memories pull against the new loss: descent on it alone raises one of them, under the rule neither rises to first order."""
    G = torch.tensor([[1.0, 0.0], [-1.0, 0.2], [-1.0, -0.2]])
    w = episodic.gem(G @ G.T, margin=0.0, eps=1e-9)
    assert float((G @ (w.float() @ G))[1:].min()) > -1e-4
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    descend(scratch(model), lambda _: (model.weight[0, 0], -model.weight[0, 0] + model.weight[0, 1]), range(1), lr=1.0, combine=episodic.rule("agem"))
    assert model.weight.tolist() == [[-0.5, -0.5]]


def test_refreshing_follows_the_ascent_before_a_step():
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, 4.0]]))
    e, held = scratch(model), {}
    stir = episodic.refreshing(e, lambda b: model(b).sum(), sigma=0.0, delta=0.1, fisher=held, tau=0.5)
    stir(torch.tensor([[3.0, 4.0]]))  # the gradient of the loss is (3, 4): the weights go 0.1 * 5 / (1 + .001 F) along it
    assert held["weight"].tolist() == [[4.5, 8.0]]
    assert model.weight.flatten().tolist() == pytest.approx([3 + 0.3 / 1.0045, 4 + 0.4 / 1.008], abs=1e-6)
    assert model.weight.grad is None


# memory


def test_a_reservoir_is_uniform_also_after_deletions():
    """Each of 12 records is among 4 with the same chance, first ones, last ones and ones added after a deletion alike (the reference code favours the last)."""
    data, hits = make_data(12), torch.zeros(12)
    logits = torch.zeros(12, 3)
    for k in range(600):
        g = torch.Generator().manual_seed(k)
        m = Memory(4).add(data.take(range(8)), logits[:8], generator=g).without(torch.tensor([0, 7])).add(data.take(range(8, 12)), logits[8:], generator=g)
        assert len(m) <= 4 and m.num_seen == 10 and not bool(torch.isin(m.ids, torch.tensor([0, 7])).any())
        hits[m.ids] += 1
    kept = hits[[1, 2, 3, 4, 5, 6, 8, 9, 10, 11]]
    expected = float(kept.mean())
    assert float(((kept - expected) ** 2 / expected).sum()) < 21.7  # chi-square of 9 degrees of freedom, 99 %


def test_memory_says_which_logits_had_seen_what_was_deleted(tmp_path):
    g, data = torch.Generator().manual_seed(0), make_data(9)
    m = Memory(9).add(data.take(range(3)), torch.zeros(3, 3), part=0, generator=g).add(data.take(range(3, 6)), torch.ones(3, 3), part=1, generator=g)
    less = m.without(torch.tensor([4, 77]))
    assert less.ids.tolist() == [0, 1, 2, 3, 5] and less.stale.tolist() == [False] * 3 + [True] * 2  # part 0 was labelled before record 4 came
    assert bool(m.without(torch.tensor([0])).stale.all())
    new = less.relabelled(less.stale, torch.full((2, 3), 7.0))
    assert not bool(new.stale.any()) and new.logits[:, 0].tolist() == [0, 0, 0, 7, 7] and m.logits[3, 0] == 1
    assert new.rows(1).ids.tolist() == [3, 5]
    again = Memory.load(new.save(tmp_path / "m.safetensors"))
    assert again.packed()[1] == new.packed()[1] and all(torch.equal(t, new.packed()[0][n]) for n, t in again.packed()[0].items())
    with pytest.raises(DataError, match="record 3 was offered twice"):
        m.add(data.take([6, 3]), torch.zeros(2, 3), generator=g)
    with pytest.raises(DataError, match="do not fit 1 records"):
        m.add(data.take([6]), torch.zeros(2, 3), generator=g)
    with pytest.raises(SettingError, match="at least 1 record, not 0"):
        Memory(0)
    raw = bytearray((tmp_path / "m.safetensors").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "m.safetensors").write_bytes(bytes(raw))
    with pytest.raises(DataError, match="was changed after it was written"):
        Memory.load(tmp_path / "m.safetensors")


def test_fisher_sums_give_records_back():
    """The sum less some records is the sum over the others, at the same weights, whatever the model has become; with p_y it is weighted."""
    net, task, data = make_net().eval(), classification(), make_data(10)
    whole = FisherSum.of(net, task, data)
    rest = FisherSum.of(net, task, data.take(range(6)))
    with torch.no_grad():
        later = make_net(5).eval()
    less = whole.without(later, task, data.take(range(6, 10)))
    assert less.count == 6
    assert all(torch.allclose(less.total[n], rest.total[n], rtol=1e-4, atol=1e-6) for n in rest.total)
    mean = fisher(net, task, data)
    assert all(torch.allclose(whole.total[n] / 10, mean[n]) for n in mean)
    p = net(data.x).softmax(-1).gather(1, data.y[:, None])
    slow = (p * rows(net, task, data).square()).sum(0)
    weighted = FisherSum.of(net, task, data, weighted=True)
    assert torch.allclose(torch.cat([t.flatten() for t in weighted.total.values()]), slow, rtol=1e-4, atol=1e-7)
    with pytest.raises(DataError, match="cannot take 10 records out of a sum over 6"):
        less.without(net, task, data)


# GS-LoRA


def test_gs_lora_pieces():
    two = torch.tensor([2.0], requires_grad=True)
    loss = 0.15 * bounded(two, 110.0)
    assert float(loss.detach()) == pytest.approx(16.2)
    assert float(torch.autograd.grad(loss, two)[0]) == pytest.approx(-0.15)
    far = torch.tensor([120.0], requires_grad=True)
    assert float(bounded(far, 110.0).detach()) == 0 and float(torch.autograd.grad(bounded(far, 110.0), far)[0]) == 0
    group = [torch.tensor([3.0], requires_grad=True), torch.tensor([[4.0]], requires_grad=True)]
    assert float(group_norm(group).detach()) == 5
    assert [round(float(g), 6) for g in torch.autograd.grad(group_norm(group), group)] == [0.6, 0.8]
    zero = torch.zeros(2, requires_grad=True)
    assert torch.autograd.grad(group_norm([zero], 1e-12), zero)[0].tolist() == [0, 0]
    shrink(group, 1.0)
    assert [round(float(t.detach()), 6) for t in group] == [2.4, 3.2]
    small = [torch.tensor([0.6]), torch.tensor([0.8])]
    shrink(small, 1.0)
    assert [float(t) for t in small] == [0.0, 0.0]
    p, e = torch.zeros(1, 2), torch.tensor([[2.0, 0.0]])
    assert float(divergence(p, e)) == pytest.approx(0.4338, abs=1e-4)
    assert float(divergence(p, e)) == pytest.approx(float(F.kl_div(F.log_softmax(e, -1), F.log_softmax(p, -1), log_target=True, reduction="batchmean")))


class Blocks(nn.Module):
    """(B, 1, 4, 4) -> (B, 3) through some blocks of two linear layers each."""

    def __init__(self, n: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"fc1": nn.Linear(16, 8), "fc2": nn.Linear(8, 16)}) for _ in range(n)])
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = x.flatten(1)
        for b in self.blocks:
            x = x + b["fc2"](F.relu(b["fc1"](x)))
        return self.head(x)


def test_gs_lora_prunes_by_alpha_and_not_at_its_default(task, split):
    """Four blocks: the published weight leaves all alive, a larger one some, the largest none."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Blocks(4).eval()
    options = {"rank": 2, "epochs": 20, "batch_size": 8, "lr": 0.05, "warmup": 0.0}
    left = {a: len(alive(METHODS["gs_lora"](model, task, split, alpha=a, **options))) for a in (METHODS["gs_lora"].defaults["alpha"], 1.0, 5.0, 10.0)}
    assert left[1e-4] == left[1.0] == 4 and 0 < left[5.0] < 4 and left[10.0] == 0


@pytest.mark.slow
def test_gs_lora_penalties_and_what_it_cannot_adapt(task, split):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Blocks().eval()
    assert adapted(model, "") == ["blocks.0.fc1", "blocks.0.fc2", "blocks.1.fc1", "blocks.1.fc2"] and adapted(model, "1.fc2") == ["blocks.1.fc2"]
    options = {"rank": 2, "epochs": 3, "batch_size": 8, "lr": 0.05, "warmup": 0.0}
    free = METHODS["gs_lora"](model, task, split, alpha=0.0, **options)
    assert alive(free) == ["blocks.0", "blocks.1"]
    assert not METHODS["gs_lora"](model, task, split, alpha=1e3, **options).edits  # real zeros: nothing is left to merge
    soft = METHODS["gs_lora"](model, task, split, alpha=1e3, penalty="sqrt", **options)
    assert len(soft.edits) == 4
    assert METHODS["gs_lora"](model, task, split, prototypes=True, **options).digest != METHODS["gs_lora"](model, task, split, **options).digest
    with pytest.raises(SettingError, match="prototypes need w_f and w_r above 0"):
        METHODS["gs_lora"](model, task, split, prototypes=True, w_r=0.0)
    with pytest.raises(SettingError, match="penalty must be one of proximal, sqrt"):
        METHODS["gs_lora"](model, task, split, penalty="l1")
    bare = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))
    with pytest.raises(ScopeError, match="only its head '2'"):
        METHODS["gs_lora"](bare, task, split)


# streams


STREAM = (Request(0, "learn", "class:0+class:1"), Request(1, "learn", "class:2+class:3"), Request(2, "forget", "class:1"), Request(3, "learn", "class:4"))
QUICK = {"epochs": 6.0, "method": "random_label", "settings": {"epochs": 1}, "memory": 40, "replay": 20}


def small_digits() -> tuple[nn.Module, Examples, Examples]:
    """An untrained network of two layers, 60 records of each of five digits, and unseen ones."""
    from expunge.modalities.worlds import world

    w = world("digits")
    pick = torch.cat([(w.train.y == c).nonzero().squeeze(1)[:60] for c in range(5)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    return model, w.train.take(pick), w.test


def test_retention_helps_against_none():
    """What is kept after learning on: replay keeps most, GEM more than nothing; deleted records are in no memory; the model given is as it was."""
    model, train, test = small_digits()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    found = {t: play(model, classification(), train, STREAM, Course(term=t, **QUICK), test=test) for t in ("none", "derpp", "gem")}
    kept = {t: p.steps[-1].kept for t, p in found.items()}
    assert kept["derpp"].low > kept["none"].high and kept["gem"].low > kept["none"].high
    assert found["derpp"].lost < found["none"].lost
    gone = train.ids[train.y == 1]
    for name in ("derpp", "gem"):
        memory = found[name].memory
        assert len(memory) and not bool(torch.isin(memory.ids, gone).any()) and not set(gone.tolist()) & set(memory.seen)
        assert found[name].steps[-1].stale == 0
    last = found["derpp"].steps[-1]
    assert last.forgotten.n == 60 and last.kept.n == 240 and last.forgotten.high < 0.5 and last.forgotten.low <= last.forgotten.value
    assert last.test.n == int(torch.isin(test.y, torch.tensor([0, 2, 3, 4])).sum()) and list(last.parts) == ["0", "1", "3"]
    assert found["derpp"].steps[0].passes == 2 * 120 * 6 + 120  # training, and the logits of what enters the memory
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def timeless(played: continual.Played) -> str:
    return json.dumps(replace(played, steps=tuple(replace(s, seconds=0.0) for s in played.steps)).document())


@pytest.mark.parametrize("term", continual.TERMS)
def test_resume_equals_uninterrupted(term, tmp_path):
    """A stream killed after two requests goes on to the same weights, memory and rows, bit for bit (seconds apart); only the newest state stays."""
    model, train, test = small_digits()
    course = Course(term=term, **{**QUICK, "epochs": 1.0})
    whole = play(model, classification(), train, STREAM, course, test=test)

    def killed(text: str, k: int, total: int) -> None:
        if k == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        play(model, classification(), train, STREAM, course, test=test, folder=tmp_path, progress=killed)
    again = play(model, classification(), train, STREAM, course, test=test, folder=tmp_path)
    assert timeless(again) == timeless(whole)
    assert all(torch.equal(t, again.model.state_dict()[n]) for n, t in whole.model.state_dict().items())
    assert all(torch.equal(t, again.memory.packed()[0][n]) for n, t in whole.memory.packed()[0].items())
    assert all(torch.equal(t, again.fisher[k].total[n]) for k, f in whole.fisher.items() for n, t in f.total.items())
    assert [p.name for p in tmp_path.iterdir()] == ["state-0003.safetensors"]
    if term == "ewc":
        assert {k: f.count for k, f in whole.fisher.items()} == {0: 60, 1: 120, 3: 60} and whole.steps[2].stale == 2
    if term == "none":
        with pytest.raises(DataError, match="is of another stream"):
            play(model, classification(), train, STREAM, course, test=test, folder=tmp_path, seed=1)
        raw = bytearray((tmp_path / "state-0003.safetensors").read_bytes())
        raw[-1] ^= 1
        (tmp_path / "state-0003.safetensors").write_bytes(bytes(raw))
        with pytest.raises(DataError, match="was changed after it was written"):
            play(model, classification(), train, STREAM, course, test=test, folder=tmp_path)


def test_the_report_is_written(tmp_path):
    model, train, _ = small_digits()
    played = play(model, classification(), train, STREAM[:1], Course(term="none", epochs=1.0), test=None)
    played.save(tmp_path)
    doc = json.loads((tmp_path / "stream.json").read_text())
    assert doc["steps"][0]["forgotten"] == {"value": None, "low": 0.0, "high": 1.0, "n": 0} and doc["lost"] is None
    head, line = (tmp_path / "stream.csv").read_text().splitlines()
    assert dict(zip(head.split(","), line.split(","), strict=True))["kept.n"] == "120"
    assert "<svg" in (tmp_path / "stream.html").read_text()


def test_requests_are_read_and_refused_with_their_line(tmp_path):
    path = tmp_path / "requests.csv"
    path.write_text('time,kind,what\n2,forget,"ids:1,2"\n0,learn,class:3\n\n')
    assert read(path) == (Request(0, "learn", "class:3"), Request(2, "forget", "ids:1,2"))
    for text, error in (
        ("time,what\n", "must begin with the columns time,kind,what; it has time,what"),
        ("time,kind,what\n", "holds no request"),
        ("time,kind,what\n0,learn,class:1\n1,forget,ids:1,2\n", "line 3: 4 columns in place of 3; put ids in quotes"),
        ("time,kind,what\nsoon,learn,class:1\n", "line 2: time must be a whole number, not 'soon'"),
        ("time,kind,what\n0,drop,class:1\n", "line 2: kind must be one of learn, forget, not 'drop'"),
        ("time,kind,what\n-1,learn,class:1\n", "line 2: time must be 0 or more, not -1"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=error):
            read(path)
    with pytest.raises(DataError, match=r"cannot read none\.csv"):
        read(tmp_path / "none.csv")


def test_streams_that_make_no_sense_are_refused(task, net):
    data = Examples(torch.randn(9, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 3, torch.arange(9))
    learn, forget = Request(0, "learn", "class:0"), Request(1, "forget", "ids:0")
    assert [r.tolist() for r in schedule([learn, forget, Request(2, "learn", "ids:1+class:0+random:2@1")], data)][:2] == [[0, 3, 6], [0]]
    for stream, error in (
        ([forget], r"request 0 \(forget ids:0 at 1\): none of these records is held"),
        ([learn, learn], "all of these records are held or were forgotten"),
        ([forget, learn], "none of these records is held"),
        ([learn, Request(0, "forget", "class:7")], "no class '7'"),
        ([learn, forget, Request(2, "learn", "ids:0")], "all of these records are held or were forgotten"),
    ):
        with pytest.raises(SplitError, match=error):
            schedule(stream, data)
    with pytest.raises(DataError, match="must be in order of time"):
        schedule([Request(1, "learn", "class:0"), Request(0, "learn", "class:1")], data)
    with pytest.raises(DataError, match="ids of the training data must be unique"):
        schedule([learn], replace(data, ids=torch.zeros(9, dtype=torch.long)))
    with pytest.raises(SplitError, match="lacks retain"):  # the only held class goes, and the method needs what stays
        play(net, task, data, [learn, Request(1, "forget", "class:0")], Course(epochs=1.0))
    for bad, error in (
        ({"term": "derp"}, "did you mean .der"),
        ({"retain": "memory"}, "needs a term with a memory"),
        ({"repair": -1.0}, "repair must be a finite number of 0 or more, not -1.0"),
        ({"settings": {"epoch": 1}}, "salun has no setting 'epoch'"),
    ):
        with pytest.raises(SettingError, match=error):
            Course(**bad)
