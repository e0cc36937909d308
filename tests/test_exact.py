"""Exact deletion: what is left after a deletion is what a training without the records makes, bit for bit; and whatever else a store promises."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from killed import CUTS, deletions, sample
from torch import nn

from expunge.core.errors import DataError, ModelError, ScopeError, SettingError, SplitError, StoreError
from expunge.guarantees.exact import layout
from expunge.guarantees.exact.adapters import start
from expunge.guarantees.exact.capacity import costs
from expunge.guarantees.exact.design import design, s3t, safe, sisa
from expunge.guarantees.exact.ensemble import Exact, fit, load
from expunge.guarantees.exact.proof import read
from expunge.guarantees.exact.store import Store
from expunge.modalities import nets
from expunge.modalities.classification.task import classification
from expunge.modalities.examples import Examples
from expunge.parts.reading import score

TASK = classification()
SMALL = {
    "sisa": sisa(shards=3, slices=2, epochs=2),
    "sisa-detach": sisa(shards=2, slices=3, epochs=2, detach=True),
    "safe": safe(shards=4, clique=2, epochs=2),
    "safe-edges": safe(shards=3, edges=[[0, 1], [1, 2]], epochs=1),
    "s3t": s3t(shards=2, slices=2, budget=2, epochs=1),
}
CASES = [pytest.param(name, id=name) for name in SMALL]


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nets.mlp(4, 3, 8)


def deep() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))


def ensemble(name: str, folder: Path, data: Examples, **more) -> Exact:
    return fit(SMALL[name], network(), TASK, data, folder=folder, batch_size=8, lr=0.1, rank=2, **more)


def without(data: Examples, gone) -> Examples:
    return data.take([k for k, i in enumerate(data.ids.tolist()) if i not in set(gone)])


def files(e: Exact) -> dict[str, str]:
    return {n: e.store.digest(k) for n, k in e.state.keys.items()}


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=4)
@given(seed=st.integers(0, 99), rounds=st.lists(st.lists(st.integers(0, 29), min_size=1, max_size=4), min_size=1, max_size=2))
def test_law_a_deletion_leaves_what_a_training_without_the_records_makes(name, seed, rounds, tmp_path_factory):
    """Every method, random data, random records, sequences of deletions; untouched components stay to the bit, the proof says which."""
    folder, data = tmp_path_factory.mktemp("law"), sample(30, seed)
    e = ensemble(name, folder / "a", data)
    for ids in rounds:
        told, old = e.plan(ids), files(e)
        proof = e.forget(ids)
        assert proof.holds
        assert proof.trained == told.retrain
        assert set(proof.untouched) == {n for n, d in old.items() if files(e).get(n) == d}
        assert not any(set(ids) & set(e.records(n)) for n in e.state.keys)
    gone = {i for ids in rounds for i in ids}
    anew = ensemble(name, folder / "b", without(data, gone))
    assert files(e).items() <= files(anew).items(), "what stands is what a fresh training makes"
    e.refit()
    assert files(e) == files(anew)
    assert torch.equal(e.predict(data.x), anew.predict(data.x))
    again = load(folder / "a", network(), TASK, data)
    assert torch.equal(again.predict(data.x), e.predict(data.x))
    assert {p.stem for p in (folder / "a" / "parts").iterdir()} == set(e.state.keys.values()), "no checkpoint of a deleted record is left"


def test_the_law_test_can_fail(tmp_path):
    """One record more, and the components that hold it differ."""
    data = sample(30)
    a, b = ensemble("sisa", tmp_path / "a", data), ensemble("sisa", tmp_path / "b", without(data, [5]))
    differ = {n for n, d in files(a).items() if files(b)[n] != d}
    assert differ == {n for n in a.state.keys if 5 in a.records(n)}
    assert not torch.equal(a.predict(data.x), b.predict(data.x))


def test_a_deletion_keeps_the_keys_of_earlier_slices_and_changes_all_later_ones(tmp_path):
    """Card sisa: deleting an index of slice r leaves the r - 1 first keys unchanged."""
    data = sample(60)
    e = fit(sisa(shards=1, slices=4, epochs=4), network(), TASK, data, folder=tmp_path)
    before, victim = dict(e.state.keys), next(i for i in e.ids if e.state.places[i] == (0, 2))
    proof = e.forget([victim])
    assert [before[f"0/{r}"] == e.state.keys[f"0/{r}"] for r in range(4)] == [True, True, False, False]
    assert proof.touched == ("0/2", "0/3")
    assert proof.untouched == ("0/0", "0/1")


def test_s3t_falls_back_to_the_longest_prefix_without_a_step(tmp_path):
    """Card s3t: sequences (0,1,2), (2,0,1), (1,2,0); delete slice 0: (2), (1,2) are left; then 2: (1). Weights are those of the stored prefix."""
    data = sample(60)
    e = fit(s3t(shards=1, slices=3, budget=3, epochs=1), deep(), TASK, data, folder=tmp_path, rank=2, aggregate="logits")
    stored = {n: e.store.digest(k) for n, k in e.state.keys.items()}
    assert set(stored) == {"0/0", "0/0.1", "0/0.1.2", "0/2", "0/2.0", "0/2.0.1", "0/1", "0/1.2", "0/1.2.0"}
    of = lambda s: next(i for i in e.ids if e.state.places[i] == (0, s))  # noqa: E731
    proof = e.forget([of(0)])
    assert proof.trained == ()
    assert set(e.state.keys) == {"0/2", "0/1", "0/1.2"}
    assert e.tips()[0].name == "0/1.2"
    assert files(e)["0/1.2"] == stored["0/1.2"]
    e.forget([of(2)])
    assert set(e.state.keys) == {"0/1"}
    again = e.forget([of(1)])
    assert len(again.trained) == 9, "nothing was left: everything was trained anew on what remains"
    assert set(e.state.keys) == set(stored)


def test_adapter_blocks_move_nothing_else(tmp_path):
    model = network()
    e = fit(s3t(shards=1, slices=2, budget=1, epochs=2), model, TASK, sample(40), folder=tmp_path, rank=2)
    first, second = (e.store.get(e.state.keys[n]) for n in ("0/0", "0/0.1"))
    assert {n.split(".")[0] for n in first} == {"2", "4"}, "the top block and the head"
    assert {n.split(".")[0] for n in second} == {"0", "4"}
    member = e.members()[0]
    for n, p in member.named_parameters():
        if "base_layer" in n:
            assert torch.equal(p, dict(model.named_parameters())[n.replace(".base_layer", "")])
    with pytest.raises(ScopeError, match="3 blocks need as many linear layers"):
        start(model, 3)


def test_measured_cost_is_the_closed_form(tmp_path):
    """SISA, 5 shards x 6 cumulative slices: one random deletion retrains 14.4 % on average, measured over every record."""
    e = fit(sisa(shards=5, slices=6, epochs=6), network(), TASK, sample(600), folder=tmp_path, batch_size=64)
    shares = [e.plan([i]).share for i in e.ids]
    assert abs(sum(shares) / len(shares) - costs.share(5, 6)) < 0.01


def test_safe_touches_whoever_reads_the_shard(tmp_path):
    data = sample(40)
    e = ensemble("safe-edges", tmp_path, data)
    victim = next(i for i in e.ids if e.state.places[i][0] == 1)
    assert e.plan([victim]).retrain == ("0", "1"), "shard 0 reads 1; shard 2 does not"
    public = data.ids[:10].tolist()
    e = fit(safe(shards=3, graph="safe", epochs=1), network(), TASK, data, folder=tmp_path / "safe", safe=public)
    assert set(public) <= set(e.records("2"))
    with pytest.raises(SplitError, match="declared safe"):
        e.forget(public[:1])
    with pytest.raises(SplitError, match="name the records of the safe shard"):
        fit(safe(shards=3, graph="safe"), network(), TASK, data, folder=tmp_path / "x")


def test_a_frozen_backbone_is_read_once_and_one_record_at_a_time(tmp_path):
    data = sample(30)
    backbone = nn.Linear(4, 5).requires_grad_(False)
    head = nn.Linear(5, 3)
    e = fit(sisa(shards=2, epochs=2), head, TASK, data, folder=tmp_path / "a", backbone=backbone)
    e.forget([3, 4])
    anew = fit(sisa(shards=2, epochs=2), head, TASK, without(data, [3, 4]), folder=tmp_path / "b", backbone=backbone)
    assert files(e) == files(anew)
    assert e.predict(data.x).shape == (30, 3)
    with pytest.raises(ModelError, match="must be frozen"):
        fit(sisa(), head, TASK, data, folder=tmp_path / "c", backbone=nn.Linear(4, 5))
    with pytest.raises(StoreError, match="another model or backbone"):
        load(tmp_path / "a", head, TASK, data, backbone=nn.Linear(4, 5).requires_grad_(False))


@pytest.mark.parametrize("how", ["mean", "vote", "logits"])
def test_aggregates(how, tmp_path):
    """Probabilities that sum to one; audits take the ensemble as they take any classifier; votes (1, 1, 0) make class 1."""
    data = sample(30)
    e = fit(sisa(shards=3, epochs=3), network(), TASK, data, folder=tmp_path, aggregate=how)
    p = e.predict(data.x)
    torch.testing.assert_close(p.sum(1), torch.ones(30))
    logits = torch.stack([m(data.x) for m in e.members()])
    if how == "vote":
        assert torch.equal(p.argmax(1), nn.functional.one_hot(logits.argmax(-1), 3).sum(0).argmax(-1))
    if how == "mean":
        torch.testing.assert_close(p, logits.softmax(-1).mean(0))
    assert len(score(e.module(), TASK, data).nll) == 30
    out = e.save(tmp_path / "out")
    assert {p.name for p in out.iterdir()} == {"ensemble.json", "member-0-0.safetensors", "member-1-0.safetensors", "member-2-0.safetensors"}


def test_workers_change_no_bit(tmp_path):
    data = sample(30)
    a, b = ensemble("sisa", tmp_path / "a", data), ensemble("sisa", tmp_path / "b", data, workers=2)
    assert files(a) == files(b)


@pytest.mark.parametrize("name", ["sisa", "safe"])
def test_the_law_holds_in_a_stack(name, tmp_path):
    """Stacked training has bits of its own, but the same for a component whatever is trained beside it."""
    data = sample(60)
    e = ensemble(name, tmp_path / "a", data, stacked=True)
    e.forget([7, 12])
    anew = ensemble(name, tmp_path / "b", without(data, [7, 12]), stacked=True)
    assert files(e) == files(anew)
    with pytest.raises(SettingError, match="cannot be trained in a stack"):
        ensemble("s3t", tmp_path / "c", data, stacked=True)


def test_layouts():
    ids, chances = list(range(40)), [0.9 if k % 10 == 0 else 0.01 for k in range(40)]
    by = layout.prior(ids, chances, 4, 2)
    mass = [sum(c for i, c in zip(ids, chances, strict=True) if by[i][0] == d) for d in range(4)]
    assert max(mass) - min(mass) < 0.1
    assert all(by[i][1] == 1 for i in ids if chances[i] > 0.5), "those likely to go lie in the last slice"
    assert sorted(sum(by[i][0] == d for i in ids) for d in range(4)) == [10] * 4
    with pytest.raises(SettingError, match="40 finite numbers"):
        layout.prior(ids, chances[:3], 4, 2)


def test_a_layout_of_ones_own_is_kept(tmp_path):
    data = sample(20)
    places = layout.prior(data.ids.tolist(), [float(i) for i in range(20)], 2, 2)
    e = fit(sisa(shards=2, slices=2, epochs=2), network(), TASK, data, folder=tmp_path / "a", places=places)
    e.forget([19])
    anew = fit(sisa(shards=2, slices=2, epochs=2), network(), TASK, without(data, [19]), folder=tmp_path / "b", places=places)
    assert files(e) == files(anew)
    with pytest.raises(SplitError, match="no place for record 19"):
        fit(sisa(shards=2, slices=2), network(), TASK, data, folder=tmp_path / "c", places={k: v for k, v in places.items() if k != 19})


def test_unknown_twice_a_whole_shard_and_everything(tmp_path):
    data = sample(30)
    e = ensemble("sisa", tmp_path, data)
    before = files(e)
    with pytest.raises(SplitError, match="record 999 is not in this ensemble"):
        e.forget([3, 999])
    assert files(e) == before, "nothing changed"
    e.forget([3])
    after = files(e)
    proof = e.forget([3])
    assert "deleted before" in str(proof)
    assert proof.already == (3,)
    assert proof.holds
    assert files(e) == after
    assert read(proof.save(tmp_path / "proof.json")) == proof
    shard = [i for i in e.ids if e.state.places[i][0] == 0]
    e.forget(shard)
    assert len(e.members()) == 2
    e.forget(e.ids)
    assert e.state.keys == {}
    with pytest.raises(StoreError, match="every record was deleted"):
        e.predict(data.x)
    assert list((tmp_path / "parts").glob("*")) == []
    assert load(tmp_path, network(), TASK, data.take([])).ids == []


def test_a_store_that_is_not_what_it_says_is_refused(tmp_path):
    data = sample(30)
    e = ensemble("sisa", tmp_path, data)
    key = e.state.keys["1/0"]
    path = e.store.path(key)
    good, book = path.read_bytes(), (tmp_path / "book.json").read_text()
    flipped = bytearray(good)
    flipped[-1] ^= 1
    path.write_bytes(bytes(flipped))
    with pytest.raises(StoreError, match=f"checkpoint {key[:12]} was changed after it was written"):
        e.check()
    path.write_bytes(good[:100])
    with pytest.raises(StoreError, match=f"checkpoint {key[:12]} cannot be read"):
        e.store.get(key)
    path.write_bytes(e.store.path(e.state.keys["0/0"]).read_bytes())
    with pytest.raises(StoreError, match="was changed"):
        e.store.get(key)
    path.write_bytes(good)
    assert e.check() == 6
    with pytest.raises(StoreError, match="is no key"):
        e.store.get("../../etc/passwd")
    changed = data.take(range(30))
    changed.x[4] += 1
    with pytest.raises(DataError, match="data were changed since"):
        load(tmp_path, network(), TASK, changed)
    with pytest.raises(DataError, match=r"1 record\(s\) of the ensemble are not in the data, the first is 4"):
        load(tmp_path, network(), TASK, without(data, [4]))
    with pytest.raises(StoreError, match="another model"):
        load(tmp_path, nets.mlp(4, 3, 9), TASK, data)
    with pytest.raises(StoreError, match="holds another ensemble"):
        ensemble("safe", tmp_path, data)
    doc = json.loads(book)
    doc["book"]["version"] = 99
    (tmp_path / "book.json").write_text(json.dumps(doc))
    with pytest.raises(StoreError, match="written by another version"):
        load(tmp_path, network(), TASK, data)
    doc["book"]["version"], doc["book"]["gone"] = 1, [3]
    (tmp_path / "book.json").write_text(json.dumps(doc))
    with pytest.raises(StoreError, match=r"book\.json of .* was changed"):
        load(tmp_path, network(), TASK, data)
    (tmp_path / "book.json").write_text("[]")
    with pytest.raises(StoreError, match="cannot be read"):
        load(tmp_path, network(), TASK, data)
    with pytest.raises(StoreError, match="holds no ensemble"):
        load(tmp_path / "nowhere", network(), TASK, data)


def test_fit_goes_on_where_it_was_with_or_without_the_records_that_went(tmp_path):
    data = sample(30)
    e = ensemble("sisa", tmp_path, data)
    e.forget([3])
    for again in (data, without(data, [3])):
        assert ensemble("sisa", tmp_path, again).state == e.state
    for other in (without(data, [4]), sample(31), sample(29)):
        with pytest.raises(StoreError, match="holds another ensemble"):
            ensemble("sisa", tmp_path, other)


def test_a_missing_checkpoint_is_trained_again_to_the_same_bits(tmp_path):
    data = sample(30)
    e = ensemble("sisa", tmp_path, data)
    before = files(e)
    e.store.path(e.state.keys["1/1"]).unlink()
    assert files(load(tmp_path, network(), TASK, data)) == before


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: sisa(shards=0), "shards must be a whole number from 1 on"),
        (lambda: s3t(slices=2, budget=3), "budget is 3"),
        (lambda: s3t(choice="best"), "best"),
        (lambda: safe(graph="star"), "star"),
        (lambda: safe(shards=2, edges=[[0, 2]]), r"an edge is a pair of shards from 0 to 1"),
        (lambda: design("sisaa", {}), "did you mean 'sisa'"),
        (lambda: design("sisa", {"shard": 3}), "unexpected keyword"),
    ],
)
def test_bad_designs(make: Callable, said: str):
    with pytest.raises(SettingError, match=said):
        make()


@pytest.mark.parametrize("more", [{"lr": 0.0}, {"batch_size": 0}, {"optimizer": "adan"}, {"aggregate": "max"}, {"learning_rate": 1.0}])
def test_bad_settings(more, tmp_path):
    with pytest.raises(SettingError):
        fit(SMALL["sisa"], network(), TASK, sample(9), folder=tmp_path, **more)
    assert not (tmp_path / "book.json").exists()


def test_ids_must_be_unique(tmp_path):
    data = sample(9)
    with pytest.raises(SplitError, match="unique"):
        fit(SMALL["sisa"], network(), TASK, Examples(data.x, data.y, torch.zeros(9, dtype=torch.long)), folder=tmp_path)


def _killed(name: str, folder: Path, kills: int, seed: int) -> int:
    """Kill the run of `killed.deletions` at random moments until `kills` kills happened or it ended by itself; returns how many happened."""
    context, draw, done = multiprocessing.get_context("fork"), random.Random(seed), 0
    while done < kills:
        worker = context.Process(target=deletions, args=(name, folder))
        worker.start()
        time.sleep(draw.random() * CUTS[name])
        if not worker.is_alive():
            worker.join()
            assert worker.exitcode == 0
            break
        os.kill(worker.pid or 0, signal.SIGKILL)
        worker.join()
        done += 1
        for path in (folder / "parts").glob("*.safetensors"):
            Store(folder).get(path.stem)
    return done


def _same_end(name: str, folder: Path, kills: int, seed: int = 0) -> int:
    deletions(name, folder / "whole")
    happened, k = 0, 0
    while happened < kills:
        happened += _killed(name, folder / f"cut{k}", kills - happened, seed + k)
        deletions(name, folder / f"cut{k}")
        whole, cut = ({p.name: p.read_bytes() for p in (folder / at / "parts").iterdir()} for at in ("whole", f"cut{k}"))
        assert whole == cut
        assert (folder / "whole" / "book.json").read_bytes() == (folder / f"cut{k}" / "book.json").read_bytes()
        k += 1
    return happened


def apart(function, *arguments):
    """What the function returns in a process of its own: after a backward pass on another device, which starts threads, none can be forked here."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def test_killed_and_resumed(tmp_path):
    """SIGKILL at any moment of fit or forget: no half-written checkpoint is ever there, and what a rerun ends with is bit-identical."""
    assert apart(_same_end, "sisa", tmp_path, 4) == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sisa", "s3t", "safe", "sisa-detach"])
def test_fifty_kills_each(name, tmp_path):
    assert apart(_same_end, name, tmp_path, 50, 100) == 50
