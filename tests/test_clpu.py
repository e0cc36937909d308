"""CLPU-DER++: what is left after a stream is what the stream without the forgotten tasks makes, bit for bit, whenever it was killed."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import make_data, make_net
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import nn

from expunge.core.errors import Diverged, ModelError, PatchError, SettingError, SplitError, StoreError
from expunge.core.stats import wilson
from expunge.core.types import Out
from expunge.data.records.memory import Memory
from expunge.guarantees.exact import clpu
from expunge.guarantees.exact import store as stores
from expunge.guarantees.exact.clpu import Clpu, begin, learning, load, replayed, restricted
from expunge.modalities import nets
from expunge.modalities.classification.task import classification
from expunge.modalities.examples import Examples
from expunge.modalities.regression.task import regression

TASK = classification()
QUICK = {"epochs": 2, "memory": 5, "batch_size": 4, "lr": 0.1}


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nets.mlp(4, 6, 8)


def rows(k: int, n: int = 10) -> Examples:
    """Task k: classes 2 (k mod 3) and one more."""
    g = torch.Generator().manual_seed(k)
    x = torch.randn(n, 4, generator=g)
    return Examples(x, 2 * (k % 3) + (x[:, 0] > 0).long(), torch.arange(n) + 100 * k)


def stream(folder: Path, steps: str, **more) -> Clpu:
    """Play "T1 R0 F1 R1": R of a temporary task has no data."""
    e = begin(network(), TASK, folder=folder, **{**QUICK, **more})
    for step in steps.split():
        play(e, step)
    return e


def play(e: Clpu, step: str) -> None:
    k = step[1:]
    if step[0] == "F":
        e.forget(k)
    elif step[0] == "T":
        e.learn(k, rows(int(k)), how="temporary")
    else:
        e.learn(k, None if k in e.of("temporary") else rows(int(k)))


def parts(e: Clpu | Path) -> dict[str, bytes]:
    folder = e if isinstance(e, Path) else e.store.folder
    return {p.name: p.read_bytes() for p in (folder / "parts").iterdir()}


# ---------------------------------------------------------------- the loss


def test_card_number_of_the_memory_loss():
    logits, label = torch.tensor([[2.0, 1.0]]), torch.tensor([0])
    out = restricted(Out(nll=torch.zeros(1), count=torch.ones(1), logits=logits, labels=label), torch.tensor([0, 1]))
    z = torch.tensor([[1.0, 3.0]])
    assert float(replayed(out, z, alpha=0.5, beta=0.0)) == 1.25
    assert float(replayed(out, z, alpha=0.5, beta=1.0)) == pytest.approx(1.563262, abs=1e-6)


def test_restricted_is_the_published_mask_and_writes_to_nothing():
    logits, classes = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 4])
    before, y = logits.clone(), torch.tensor([1, 4, 4, 1, 1])
    out = restricted(Out(nll=torch.zeros(5), count=torch.ones(5), logits=logits, labels=y), classes)
    hidden = torch.full((5, 6), -1e11).index_copy(1, classes, before[:, classes])
    torch.testing.assert_close(out.nll, nn.functional.cross_entropy(hidden, y, reduction="none"))
    assert torch.equal(logits, before), "the model's own output stays: no alias was written to"
    probabilities = clpu.masked(logits, (1, 4)).exp()
    assert torch.equal(logits, before)
    torch.testing.assert_close(probabilities, hidden.softmax(1))


def test_loss_of_a_step_is_the_formula(tmp_path):
    """One step of SGD from a fixed start against the formula written out: CE + (1/P) sum of the replayed losses, P = 2."""
    e = stream(tmp_path, "R0 R1", epochs=1, memory=3, replay=100, batch_size=100, weight_decay=0.0)
    before, memories = e.module(0).net, {k: e.parts.memory(k) for k in "01"}
    play(e, "R2")
    params = list(before.parameters())
    pick = lambda x, k: before(x)[:, [2 * k, 2 * k + 1]]  # noqa: E731
    loss = nn.functional.cross_entropy(pick(rows(2).x, 2), rows(2).y - 4)
    for k in (0, 1):
        m, x = memories[str(k)], memories[str(k)].rows().x
        z, y = m.logits, m.y - 2 * k
        loss = loss + 0.5 * (0.5 * (pick(x, k) - z).square().mean() + 1.0 * nn.functional.cross_entropy(pick(x, k), y))
    for p, g, new in zip(params, torch.autograd.grad(loss, params), e.module(2).net.parameters(), strict=True):
        torch.testing.assert_close(new, p - 0.1 * g, atol=1e-6, rtol=1e-5)


# ---------------------------------------------------------------- the memory


def test_a_rejected_record_does_not_go_over_the_last_slot():
    """The reference writes a rejected record to slot -1: then the last one offered would always be in. It must be in with chance size / n = 3/12."""
    x, inside = torch.zeros(12, 1), 0
    for seed in range(300):
        m = Memory(3).add(Examples(x, x[:, 0].long(), torch.arange(12)), torch.zeros(12, 2), generator=torch.Generator().manual_seed(seed))
        inside += 11 in m.ids.tolist()
    _, low, high = wilson(inside, 300)
    assert low < 3 / 12 < high < 0.5, inside


def test_memory_holds_the_records_with_the_logits_that_training_saw(tmp_path):
    """At a step size that moves nothing the logits of training are those of the start."""
    e = begin(network(), TASK, folder=tmp_path, epochs=3, memory=6, batch_size=4, lr=1e-30)
    e.learn("a", rows(1))
    m = e.parts.memory("a")
    assert (len(m), m.num_seen, m.logits.shape) == (6, 10, (6, 2))
    at = {i: k for k, i in enumerate(rows(1).ids.tolist())}
    took = [at[i] for i in m.ids.tolist()]
    assert torch.equal(m.rows().x, rows(1).x[took])
    assert torch.equal(m.y, rows(1).y[took])
    torch.testing.assert_close(m.logits, network()(rows(1).x[took])[:, 2:4].detach())


def test_temporary_tasks_are_never_replayed_and_each_memory_is_bounded(tmp_path):
    e = stream(tmp_path, "R0 T1 T2 R2")
    assert list(e.parts.memories()) == ["0", "2"]
    assert e.of("temporary") == ["1"]
    assert all(len(m) == 5 for m, _ in e.parts.memories().values())


# ---------------------------------------------------------------- the law


def test_card_case_t1_r0_f1_is_r0_alone(tmp_path):
    """With dropout, batch norm statistics, and somebody drawing from the global generator in between."""
    data = [Examples(make_data(9, s).x, make_data(9, s).y, torch.arange(9)) for s in (0, 1)]

    def fresh_stream(name: str) -> Clpu:
        return begin(make_net(), TASK, folder=tmp_path / name, **QUICK)

    a, b = fresh_stream("a"), fresh_stream("b")
    b.learn("0", data[0])
    a.learn("1", data[1], how="temporary")
    torch.rand(17)
    state = torch.get_rng_state()
    a.learn("0", data[0])
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left as it was"
    told = a.plan("1")
    proof = a.forget("1")
    assert proof.holds
    assert proof.removal == told
    assert (proof.removed, set(told.parts)) == (2, {"network of 1", "memory of 1"})
    assert set(proof.after) == {"main", "memory of 0"}
    assert parts(a) == parts(b), "keys and bytes of the main network and of the memory"
    assert (a.state.main, a.state.tasks) == (b.state.main, b.state.tasks)
    for p, q in zip(a.module("0").state_dict().values(), b.module("0").state_dict().values(), strict=True):
        assert torch.equal(p, q)
    assert torch.equal(a.parts.memory("0").logits, b.parts.memory("0").logits)


def test_the_law_test_can_fail(tmp_path):
    """A task that was remembered, and one record more, are in the main network."""
    a, b, c = (stream(tmp_path / n, s) for n, s in (("a", "R1 R0"), ("b", "R0"), ("c", "T1 R1 R0")))
    assert len({a.state.main, b.state.main, c.state.main}) == 3
    assert not torch.equal(a.predict(0, rows(0).x), b.predict(0, rows(0).x))
    d = begin(network(), TASK, folder=tmp_path / "d", **QUICK)
    d.learn(0, rows(0, 11))
    assert not torch.equal(d.predict(0, rows(0).x), b.predict(0, rows(0).x))


@st.composite
def streams(draw) -> tuple[str, str]:
    """A legal stream, and the same without all that led to forgetting."""
    stands, played = dict.fromkeys("0123", ""), []
    for _ in range(draw(st.integers(2, 9))):
        legal = [i + k for k, s in stands.items() for i in {"": "RT", "T": "RF", "R": ""}[s]]
        if not legal:
            break
        step = draw(st.sampled_from(legal))
        played.append(step)
        stands[step[1]] = {"R": "R", "T": "T", "F": ""}[step[0]]
    cut = list(played)
    for at in reversed([k for k, step in enumerate(played) if step[0] == "F"]):
        start = max(k for k in range(at) if played[k] == f"T{played[at][1]}")
        cut[at] = cut[start] = ""
    return " ".join(played), " ".join(s for s in cut if s)


@settings(max_examples=6)
@given(pair=streams(), pretrain=st.booleans())
def test_law_any_stream_is_the_stream_without_what_was_forgotten(pair, pretrain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("law")
    a, b = (stream(folder / n, s, use_pretrain=pretrain, epochs=1) for n, s in zip("ab", pair, strict=True))
    assert parts(a) == parts(b)
    assert (a.state.main, a.state.tasks) == (b.state.main, b.state.tasks)
    again = load(folder / "a", network(5), TASK)
    for k in a.state.tasks:
        assert torch.equal(again.predict(k, rows(0).x), b.predict(k, rows(0).x))


def test_order_of_records_and_threads_around_do_not_matter(tmp_path):
    a, b = begin(network(), TASK, folder=tmp_path / "a", **QUICK), begin(network(), TASK, folder=tmp_path / "b", **QUICK)
    a.learn(0, rows(0))
    b.learn(0, rows(0).take(torch.arange(9, -1, -1)))
    assert parts(a) == parts(b)


def test_side_networks_start_from_main_or_fresh(tmp_path):
    starts = {}
    for pretrain in (True, False):
        e = begin(network(), TASK, folder=tmp_path / str(pretrain), epochs=1, lr=1e-30, use_pretrain=pretrain)
        e.learn(1, rows(1), how="temporary")
        starts[pretrain] = next(e.module(1).parameters())
    assert torch.equal(starts[True], next(network().parameters()))
    assert not torch.equal(starts[False], next(network().parameters()))


# ---------------------------------------------------------------- what is refused


def test_forgetting_what_is_remembered_names_the_way_out(tmp_path):
    e = stream(tmp_path, "R0 T1 R1")
    for k in (0, 1):
        for act in (e.forget, e.plan):
            with pytest.raises(SplitError, match=rf"task {k} is remembered.*how='temporary'.*approximate method on module\('{k}'\) \(\w+, \w+.*new folder"):
                act(k)


def test_forgotten_twice_unknown_and_learned_again(tmp_path):
    e = stream(tmp_path, "T1 R0")
    with pytest.raises(SplitError, match=r"no task 'l'.* There are: 1, 0"):
        e.forget("l")
    assert "side network of" in str(e.forget(1))
    book = (tmp_path / "book.json").read_bytes()
    twice = e.forget("1")
    assert (twice.removal.already, twice.removed, twice.holds) == (True, 0, True)
    assert str(twice) == "nothing to do: task 1 was forgotten before"
    assert (tmp_path / "book.json").read_bytes() == book
    for at in (e, load(tmp_path, network(), TASK)):
        for act in (lambda at=at: at.predict(1, rows(1).x), lambda at=at: at.module("1")):
            with pytest.raises(SplitError, match="task 1 was forgotten: no network of it is left"):
                act()
    play(e, "T1")
    assert "1" not in e.state.forgotten
    assert e.predict(1, rows(1).x).shape == (10, 6)


@pytest.mark.parametrize(
    ("act", "error", "match"),
    [
        (lambda e: e.learn(0, rows(0)), SettingError, r"task 0 stands already \(remember\); learn another task id$"),
        (lambda e: e.learn(1, rows(1), how="temporary"), SettingError, r"task 1 stands already \(temporary\); .* or forget it first"),
        (lambda e: e.learn(1, rows(1)), SettingError, "consolidating reads its memory alone, so leave out data"),
        (lambda e: e.learn(2), SettingError, "task 2 is new: learning it needs data"),
        (lambda e: e.learn(2, rows(2), how="tempory"), SettingError, "no way to learn 'tempory'; did you mean 'temporary'"),
        (lambda e: e.learn("../x", rows(2)), SettingError, r"a task id is 1 to 64 .*found '\.\./x'"),
        (lambda e: e.learn(2, rows(2, 0)), SplitError, "the task has no records"),
        (lambda e: e.learn(2, rows(2).take([0, 0])), SplitError, "ids must be unique"),
        (lambda e: e.learn(2, rows(2), classes=(4, 3)), SplitError, "a record has label 5, which is not among the classes of the task: 3, 4"),
        (lambda e: e.learn(2, rows(2), classes=(4, 5, 6)), SplitError, "the model has classes 0 to 5; the task names 6"),
        (lambda e: e.learn(2, Examples(rows(2).x, rows(2).x[:, 0], rows(2).ids)), SplitError, r"labels must be whole numbers of shape \(N,\), not float32"),
    ],
)
def test_bad_requests_change_nothing(act, error, match, tmp_path):
    e = stream(tmp_path, "R0 T1", epochs=1)
    before = {p.name: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(error, match=match):
        act(e)
    assert {p.name: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_bad_settings_and_models(tmp_path):
    for setting, match in (
        ({"epochs": 0.5}, "epochs must be a whole number of 1 or more"),
        ({"alpha": -1.0}, "alpha must be a finite number of 0 or more"),
        ({"memroy": 3}, "no setting 'memroy'; did you mean 'memory'"),
        ({"stacked": True}, "no setting 'stacked'"),
    ):
        with pytest.raises(SettingError, match=match):
            begin(network(), TASK, folder=tmp_path, **setting)
    with pytest.raises(ModelError, match="clpu learns classifiers; the task is regression"):
        begin(network(), regression(), folder=tmp_path)
    with pytest.raises(ModelError, match="all weights of the model are frozen"):
        begin(network().requires_grad_(False), TASK, folder=tmp_path)
    with pytest.raises(StoreError, match="holds no stream"):
        load(tmp_path, network(), TASK)
    assert list(tmp_path.iterdir()) == []


def test_store_of_something_else_is_refused(tmp_path):
    stream(tmp_path, "R0")
    with pytest.raises(StoreError, match="holds something else"):
        stream(tmp_path, "", epochs=9)
    with pytest.raises(StoreError, match="begun with another model"):
        load(tmp_path, nets.mlp(4, 6, 9), TASK)
    assert stream(tmp_path, "").of("remember") == ["0"], "the same stream goes on"
    stores.Store(tmp_path).write_book({"config": {"design": "sisa"}})
    with pytest.raises(StoreError, match="is not that of a stream"):
        load(tmp_path, network(), TASK)


@pytest.mark.parametrize("part", ["main", "network of 1", "memory of 1", "memory of 0"])
def test_tampered_and_missing_parts_are_refused_by_name(part, tmp_path):
    e = stream(tmp_path, "R0 T1", epochs=1)
    path = e.store.path(e.state.files()[part])
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    e = load(tmp_path, network(), TASK)
    with pytest.raises(StoreError, match=f"^{part}: checkpoint .* was changed after it was written"):
        e.check()
    path.unlink()
    with pytest.raises(StoreError, match=f"^{part}: checkpoint .* is missing"):
        load(tmp_path, network(), TASK)


def test_a_changed_book_is_refused(tmp_path):
    stream(tmp_path, "R0 T1 F1", epochs=1)
    book = tmp_path / "book.json"
    book.write_text(book.read_text().replace('"forgotten": ["1"]', '"forgotten": []'))
    with pytest.raises(StoreError, match="was changed after it was written"):
        load(tmp_path, network(), TASK)


def test_a_consolidation_that_diverges_is_withdrawn(tmp_path):
    e = stream(tmp_path, "R0 T1", epochs=1, alpha=1e30)
    before = (tmp_path / "book.json").read_bytes()
    with pytest.raises(Diverged):
        e.learn(1)
    assert (tmp_path / "book.json").read_bytes() == before
    assert e.forget(1).holds


# ---------------------------------------------------------------- use


def test_consolidation_distils_the_side_network_and_keeps_the_past(tmp_path):
    """Answers of main come near those of the side network; replay of task 0 keeps its answers, which fade without it."""
    moved = {}
    for alpha in (1.0, 0.0):
        e = stream(tmp_path / str(alpha), "R0 T1", epochs=20, memory=10, alpha=alpha, beta=0.0)
        side, past, before = e.predict(1, rows(1).x), e.predict(0, rows(0).x), clpu.masked(e.module(0).net(rows(1).x).detach(), (2, 3)).exp()
        e.learn(1)
        assert (e.of("remember"), e.of("temporary"), set(e.state.files())) == (["0", "1"], [], {"main", "memory of 0", "memory of 1"})
        moved[alpha] = [float((a - b).abs().mean()) for a, b in ((e.predict(1, rows(1).x), side), (before, side), (e.predict(0, rows(0).x), past))]
    assert moved[1.0][0] < 0.3 * moved[1.0][1]
    assert moved[1.0][2] < 0.3 * moved[1.0][1]
    assert moved[0.0][0] > 0.9 * moved[0.0][1], "without a loss nothing is distilled"


def test_save_holds_what_predicts_and_a_later_save_drops_what_was_forgotten(tmp_path):
    from safetensors.torch import load_file

    e = stream(tmp_path / "store", "R0 T1", epochs=1)
    e.save(tmp_path / "out")
    net = network(3)
    net.load_state_dict(load_file(tmp_path / "out" / "network-1.safetensors"))
    assert torch.equal(clpu.masked(net(rows(1).x), (2, 3)).exp(), e.predict(1, rows(1).x))
    e.forget(1)
    e.save(tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"clpu.json", "network-main.safetensors"}
    assert '"1"' not in (tmp_path / "out" / "clpu.json").read_text()


# ---------------------------------------------------------------- killed and resumed

PLAYED = "T1 R0 T2 F1 R2"


def resumed(folder: Path) -> Clpu:
    """Begin or go on: what the book has is not played again."""
    torch.set_num_threads(1)
    e = begin(network(), TASK, folder=folder, **{**QUICK, "epochs": 1})
    for step in PLAYED.split():
        k = step[1:]
        done = {"T": k in e.state.tasks or k in e.state.forgotten, "R": k in e.of("remember"), "F": k in e.state.forgotten}[step[0]]
        if not done:
            play(e, step)
    return e


@pytest.mark.parametrize("late", [pytest.param(False, id="before", marks=pytest.mark.slow), pytest.param(True, id="after-book")])
def test_cut_at_every_write(late, tmp_path, monkeypatch):
    """The write number n raises before it writes (of the book: also after it has); what a new process ends with is bit-identical, for every n."""
    whole = resumed(tmp_path / "whole")
    book = (tmp_path / "whole" / "book.json").read_bytes()
    real, count, cut = stores.write, 0, 0

    def failing(path, data):
        nonlocal count
        count += not late or path.name == "book.json"
        if count == cut and not late:
            raise PatchError("the disk is full")
        out = real(path, data)
        if count == cut and path.name == "book.json":
            raise PatchError("the power is gone")
        return out

    monkeypatch.setattr(stores, "write", failing)
    happened = 0
    while happened == cut:
        count, cut, folder = 0, cut + 1, tmp_path / f"cut{cut}"
        try:
            resumed(folder)
        except PatchError:
            happened += 1
            assert resumed(folder).check()
        assert parts(folder) == parts(whole)
        assert (folder / "book.json").read_bytes() == book
    assert happened == (7 if late else 2 + 3 + 3 + 3 + 1 + 3), (
        "start and book; memory, network and book of T, R and T; book of F; book, network and book of R after T"
    )


def test_a_cut_consolidation_can_still_be_forgotten_and_others_finish_it(tmp_path, monkeypatch):
    def raising(*_):
        raise KeyboardInterrupt

    for name in "ab":
        e = stream(tmp_path / name, "R0 T1")
        with monkeypatch.context() as m:
            m.setattr(learning, "descend", lambda *_, **__: raising())
            with pytest.raises(KeyboardInterrupt):
                e.learn(1)
        assert e.state.pending == "1"
        if name == "a":
            assert e.forget(1).holds
            assert parts(e) == parts(stream(tmp_path / "c", "R0"))
        else:
            play(e, "R2")
            assert parts(e) == parts(stream(tmp_path / "d", "R0 T1 R1 R2"))


def test_killed_and_resumed(tmp_path):
    """SIGKILL at random moments: no part is ever half-written, the rerun ends with the same bits."""
    began = time.perf_counter()
    resumed(tmp_path / "whole")
    length, context, draw, happened = time.perf_counter() - began, multiprocessing.get_context("fork"), random.Random(0), 0
    for k in range(60):  # a run may end before its kill
        folder = tmp_path / f"cut{k}"
        worker = context.Process(target=resumed, args=(folder,))
        worker.start()
        time.sleep(0.7 * draw.random() * length)
        os.kill(worker.pid or 0, signal.SIGKILL)
        worker.join()
        happened += worker.exitcode == -signal.SIGKILL
        for path in (folder / "parts").glob("*.safetensors"):
            stores.Store(folder).get(path.stem)
        resumed(folder)
        assert parts(folder) == parts(tmp_path / "whole")
        if happened == 4:
            break
    assert happened == 4


# ---------------------------------------------------------------- measured


def test_digits_in_five_tasks(tmp_path):
    """scikit-learn's digits, two classes a task: R R T R F against R R R. Replay keeps the first tasks, and the accuracies are identical."""
    source = load_digits()
    x, y, ids = torch.tensor(source.data / 16, dtype=torch.float32), torch.tensor(source.target), torch.arange(len(source.target))
    train = {k: Examples(x, y, ids).take(((y // 2 == k) & (ids % 4 > 0)).nonzero().squeeze(1)) for k in range(5)}
    test = {k: (y // 2 == k) & (ids % 4 == 0) for k in range(5)}
    found, nets_of, temporary = {}, {}, 0.0
    for name, steps in {"with": "R0 R1 T2 R3 F2", "without": "R0 R1 R3"}.items():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            e = begin(nets.mlp(64, 10, 32), TASK, folder=tmp_path / name, lr=0.1, epochs=4)
        for step in steps.split():
            k = int(step[1])
            if step[0] == "F":
                temporary = float((e.predict(2, x[test[2]]).argmax(1) == y[test[2]]).float().mean())
                e.forget(k)
            else:
                e.learn(k, train[k], how={"R": "remember", "T": "temporary"}[step[0]])
        found[name] = {k: float((e.predict(k, x[test[k]]).argmax(1) == y[test[k]]).float().mean()) for k in (0, 1, 3)}
        nets_of[name] = parts(e)
    print("\nright on unseen digits, by task:", found, {k: int(test[k].sum()) for k in test}, f"task 2 while temporary: {temporary:.3f}")
    assert found["with"] == found["without"]
    assert nets_of["with"] == nets_of["without"]
    assert min(found["with"].values()) > 0.9
    assert temporary > 0.9
