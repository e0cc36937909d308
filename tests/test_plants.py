"""Planted controls: the rows against slow oracles, dealing, planting, twins that resume, and verdicts without references."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from sklearn.metrics import roc_auc_score
from worlds import copied, digits, original, small_authors, small_language

import expunge
from expunge.audits import plants as rows_of
from expunge.audits.core import Probe, audit
from expunge.audits.grade import family
from expunge.audits.plants import EXPECTED, Plants, View, away, excess, own, p_value, relabelled, standing, traces
from expunge.audits.verdict import default_rules, selftest
from expunge.bench import plants as bench
from expunge.core.digest import model_digest
from expunge.core.errors import DataError, SettingError, SplitError
from expunge.core.types import concat
from expunge.engine.run import Attempt
from expunge.modalities.files import models
from expunge.modalities.language.worlds import build as language
from expunge.modalities.records import mislabelled
from expunge.modalities.worlds import world
from expunge.parts.reading import score
from expunge.planning import plants, twins
from expunge.planning.twins import Recipe

FAST = {"epochs": 2.0, "lr": 0.02}


def drawn(m: int, t: int, k: int, seed: int = 0, low: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """(losses (M, T k) of normal noise over the difficulty of each plant, `low` less in the twin that was taught it; taught (T k,))."""
    g = torch.Generator().manual_seed(seed)
    taught = torch.arange(t).repeat_interleave(k)
    nll = 5 + torch.randn(t * k, generator=g) + torch.randn(m, t * k, generator=g)
    nll[taught, torch.arange(t * k)] -= low
    return nll, taught


def evidence(t: int = 6, c: int = 2, k: int = 8, low: float = 0.0, digest: str = "candidate") -> Plants:
    """Evidence made of noise: planted models know their plants by 6 nats, twins by `low`; 8 records to forget are as deep as plants."""
    before, taught = drawn(t + 1, t, k, 1, 6.0)
    after, _ = drawn(t + c, t, k, 2, low)
    g = torch.Generator().manual_seed(3)
    mine, kin = 5 - low + 1.4 * torch.randn(8, generator=g), 5 + 1.4 * torch.randn(100, generator=g)
    view = lambda nll, gone, at: View(nll, -nll, nll[:, None].repeat(1, 2, 1), gone, kin, tuple({"repair.free.none": (at, 0.1)} for _ in range(t)))  # noqa: E731
    return Plants(taught, view(after, mine, 0.0), view(before, mine - 6, 1.0), 5 - low + torch.randn(t, 8, generator=g), digest, "given plants")


def test_standing_is_the_auc_of_each_model_on_each_set_of_plants():
    nll, taught = drawn(5, 3, 4, low=1.0)
    nll = nll.round()  # with equal losses
    b = standing(nll, taught, 3)
    for m, t in itertools.product(range(5), range(3)):
        slow = [roc_auc_score([1, *[0] * 4], [-float(nll[m, i]), *(-float(nll[j, i]) for j in range(5) if j != m)]) for i in range(12) if taught[i] == t]
        assert float(b[m, t]) == pytest.approx(sum(slow) / 4)


def test_the_permutation_test_counts_every_relabelling():
    nll, taught = drawn(5, 2, 3, low=2.0)
    b = standing(nll, taught, 2)
    ways = [float(b[i, 0] + b[j, 1]) / 2 for i in range(5) for j in range(5) if i != j]
    found, whole = relabelled(b, 0)
    assert whole and sorted(found.tolist()) == pytest.approx(sorted(ways)) and float(found[0]) == pytest.approx(float(b[0, 0] + b[1, 1]) / 2)
    p = next(r for r in traces(Plants(taught, forgotten=torch.zeros(2, 1)), View(nll), 0) if r.name == "plants.p")
    assert p.value == pytest.approx(sum(abs(v - 0.5) >= abs(float(found[0]) - 0.5) - 1e-9 for v in ways) / 20)
    some, whole = relabelled(standing(*drawn(12, 10, 1), 10), 0)
    assert not whole and len(some) == rows_of.MOST and torch.equal(some, relabelled(standing(*drawn(12, 10, 1), 10), 0)[0])


def test_the_permutation_test_holds_its_level():
    """Without a trace, p is at most 0.05 in about 5 of 100 draws, and the interval of the AUC holds 1/2 in most."""
    small, inside = 0, 0
    for seed in range(100):
        nll, taught = drawn(6, 4, 5, seed)
        auc, _, p = traces(Plants(taught, forgotten=torch.zeros(4, 1)), View(nll + torch.randn(6, 1, generator=torch.Generator().manual_seed(seed))), 0)
        small, inside = small + (p.value <= 0.05), inside + (auc.low <= 0.5 <= auc.high)
    assert 0 <= small <= 11 and inside >= 85


def test_exact_p_against_all_relabellings():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, generator=g), torch.randn(6, generator=g) + 1
    u = lambda x, y: sum(float(p > q) for p in x for q in y)  # noqa: E731
    both, mine = torch.cat([a, b]).tolist(), u(a, b)
    every = [u([both[k] for k in s], [both[k] for k in range(9) if k not in s]) for s in itertools.combinations(range(9), 3)]
    assert p_value(a, b, "less")[0] == pytest.approx(sum(v <= mine for v in every) / len(every))
    assert p_value(a, b)[0] == pytest.approx(min(1.0, 2 * min(sum(v <= mine for v in every), sum(v >= mine for v in every)) / len(every)))
    assert p_value(torch.tensor([0.0]), torch.arange(1.0, 11.0), "less") == (pytest.approx(1 / 11), "exact")
    assert p_value(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 2.0]))[1] == "asymptotic"


def test_paired_figures_by_hand():
    """Two twins and a candidate; each plant against the two models that never saw it."""
    values, taught = torch.tensor([[4.0, 0.0], [1.0, 6.0], [3.0, 2.0]]), torch.tensor([0, 1])
    mine, rest = own(values, taught)
    assert mine.tolist() == [4, 6] and rest.tolist() == [[1, 0], [3, 2]]
    assert excess(values, taught).tolist() == [2, 5]
    assert away(values, taught).tolist() == [2**2 - 2 * 1.5, 5**2 - 2 * 1.5]  # variances 2, K = 2


def test_rows_tell_traces_from_none():
    p = Probe(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1), expunge.classification(), expunge.Split([0]))
    for low, told in ((0.0, False), (3.0, True)):
        e = evidence(low=low, digest=model_digest(p.after))
        found = {r.name: r for r in audit(replace(p, plants=e), ["plants"])}
        assert (found["plants.auc"].low > 0.75) == told and (found["plants.p"].value < 0.01) == told
        assert (found["plants.unseen.p"].value < 0.02) == told
        assert found["plants.margin"].value == pytest.approx(1 - low**2 / 36, abs=0.2) and found["plants.relearn"].value == pytest.approx(1 - low / 6, abs=0.1)
        assert found["plants.rank"].low <= 0.5 <= found["plants.rank"].high  # as deep as the plants
        assert found["plants.repair"].value == 0


def test_evidence_is_about_one_candidate():
    before, after = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    p = Probe(before, after, expunge.classification(), expunge.Split([0]), plants=evidence(digest=model_digest(after)))
    value = lambda q, name: next(r.value for r in audit(q, ["plants"]) if r.name == name)  # noqa: E731
    assert value(p, "plants.auc") == pytest.approx(0.5, abs=0.15)
    assert value(replace(p, after=before), "plants.auc") > 0.97 and value(replace(p, after=before), "plants.margin") == 0  # doing nothing
    held = replace(p, after=torch.nn.Linear(1, 1), spread=(after,), plants=evidence(low=3.0))
    assert value(held, "plants.auc") == pytest.approx(0.5, abs=0.15) and value(held, "plants.repair") == 0  # what a retrained model would read
    assert audit(replace(p, after=torch.nn.Linear(1, 1)), ["plants"]) == []  # another model
    assert audit(replace(p, plants=EXPECTED), ["plants"]) == audit(replace(p, plants=replace(p.plants, why=("void",))), ["plants"]) == []


def test_families_of_plants():
    names = ("plants.auc", "plants.unseen", "plants.known", "plants.margin", "plants.relearn", "plants.repair")
    assert [family(n) for n in names] == ["output", "output", "output", "closeness", "return", "return"]


# dealing


def wrong(n: int = 5):
    """(the original of digits-wrong, its task, a request of n records with 300 kept ones)."""
    w = world("digits-wrong")
    split = bench.request(w, n, 0)
    return original("digits-wrong"), w.task, replace(split, retain=split.retain.take(range(300)))


def test_plants_are_dealt_apart():
    _, task, split = wrong()
    pool, taught, rest, kind = plants.dealt(task, split, 4, 0)
    assert taught.tolist() == [t for t in range(4) for _ in range(5)] and kind == "given plants" and rest.plants is None
    assert len(pool) == len(split.plants) and int(pool.ids.min()) > max(int(part.ids.max()) for part in split.parts().values())
    mine = pool.take(range(20))
    assert not set(mine.inputs) & set(rest.validation.inputs) and len(rest.validation) == len(split.validation) - 20
    replace(rest, forget=concat(rest.forget, mine)).check()
    few = plants.dealt(task, replace(split, plants=split.plants.take(range(9))), 4, 0)
    assert len(few[1]) == 8  # 2 each: no more than there are, and the same for all


def test_plants_from_validation_follow_the_labels_of_the_request():
    _, task, split = digits("random")
    split = replace(split, forget=split.forget.take((split.forget.y < 3).nonzero().squeeze(1)))
    pool, _, rest, kind = plants.dealt(task, split, 5, 0)
    assert kind == "validation" and set(pool.y.tolist()) <= {0, 1, 2} and len(rest.validation) >= len(split.validation) / 2
    again = plants.dealt(task, split, 5, 0)
    assert again[0].digest == pool.digest and plants.dealt(task, split, 5, 1)[0].digest != pool.digest


def test_what_plants_cannot_stand_for_is_refused():
    _, task, split = wrong()
    with pytest.raises(SplitError, match=r"of another kind.* of 5 of these and of \d+ of 297 plants"):
        plants.dealt(task, replace(split, plants=None), 4, 0)
    with pytest.raises(SplitError, match="4 twins need as many plants"):
        plants.dealt(task, replace(split, plants=split.plants.take(range(3))), 4, 0)
    with pytest.raises(SplitError, match=r"1 plant\(s\) stand in retain"):
        plants.dealt(task, replace(split, plants=concat(split.plants, split.retain.take([0]))), 4, 0)
    with pytest.raises(SplitError, match=r"stand in test"):
        plants.dealt(task, replace(split, plants=mislabelled(split.test, 10, torch.Generator().manual_seed(0))), 4, 0)
    texts = language.generated("authors-planted", n=8, per=6, canon=0, lands=0, planted=True).split("forget10")
    long = replace(texts.plants, tokens=tuple(t.repeat(2) for t in texts.plants.tokens), targets=tuple(t.repeat(2) for t in texts.plants.targets))
    assert plants.odd(texts, texts.plants) == "" and "tokens in the median" in plants.odd(texts, long)
    with pytest.raises(SettingError, match="at least 2 twins"):
        plants.dealt(task, split, 1, 0)
    with pytest.raises(SplitError, match="a plant of a class"):
        plants.dealt(*digits()[1:], 4, 0)
    with pytest.raises(SplitError, match="give plants, or validation"):
        plants.dealt(task, replace(split, plants=None, validation=None), 4, 0)
    with pytest.raises(SettingError, match="planted controls are read of"):
        plants.dealt(expunge.regression(), split, 4, 0)


def test_worlds_bring_plants_of_the_kind_that_must_go():
    w = world("digits-wrong")
    clean = world("digits").validation
    right = dict(zip(clean.inputs, clean.y.tolist(), strict=True))
    assert all(right[k] != y for k, y in zip(w.plants.inputs, w.plants.y.tolist(), strict=True))
    split = language.generated("authors-planted", n=8, per=6, canon=0, lands=48, planted=True).split("forget10")
    known = {row["author"] for part in (split.forget, split.retain, split.test, split.validation) for row in part.rows}
    assert len(split.plants) == language.TWINS * len(split.forget) and not {row["author"] for row in split.plants.rows} & known
    pool, taught, *_ = plants.dealt(expunge.causal_lm(), split, 3, 0)
    for t in range(3):
        assert {row["author"] for row in pool.take((taught == t).nonzero().squeeze(1)).rows}.isdisjoint(
            row["author"] for row in pool.take(((taught != t) & (taught < 99)).nonzero().squeeze(1)).rows
        )


# runs


def job(n: int = 5, method: str = "fine_tune", **settings) -> twins.Job:
    model, task, split = wrong(n)
    pool, _, rest, _ = plants.dealt(task, split, 3, 0)
    return twins.Job("twin-0", Recipe(method, settings or FAST, 0), model, task, rest, pool.take(range(15)), model, tuple(range(5)), 7)


def test_planting_ends_where_plants_are_known_as_well(monkeypatch):
    j = job()
    mine = j.plants.take(j.mine)
    digest = model_digest(j.model)
    model, (passes, reached, goal), meter = twins.planted(j.model, j.task, j.split, mine, 1)
    assert model_digest(j.model) == digest and not model.training
    assert goal == pytest.approx(float(score(j.model, j.task, j.split.forget).nll.mean()))
    assert reached == pytest.approx(float(score(model, j.task, mine).nll.mean())) and reached <= goal < float(score(j.model, j.task, mine).nll.mean())
    assert meter.backward == passes * (10 + 200)
    monkeypatch.setattr(twins, "PASSES", 1)
    run = twins.grown(j)
    assert "twin-0 is not matched: after 1 passes" in run.facts["why"]


def test_runs_go_on_where_they_were(tmp_path, monkeypatch):
    j = replace(job(), folder=str(tmp_path))
    run = twins.grown(j)
    monkeypatch.setattr(twins, "_twin", lambda job: pytest.fail("it was run again"))
    again = twins.grown(j)
    assert all(torch.equal(t, again.tensors[n]) for n, t in run.tensors.items()) and again.facts == run.facts
    with pytest.raises(pytest.fail.Exception):
        twins.grown(replace(j, seed=8))
    data = bytearray((tmp_path / "twin-0.safetensors").read_bytes())
    data[-3] ^= 1
    (tmp_path / "twin-0.safetensors").write_bytes(bytes(data))
    with pytest.raises(DataError, match="was changed"):
        twins.grown(j)


def test_a_method_that_fails_on_a_twin_makes_evidence_void():
    model, task, split = wrong()
    e = plants.controls(model, model, task, split, Recipe("fine_tune", {"lr": 1e6}, 0), twins=2, candidates=1)
    assert not e.there and any("twin-0 of fine_tune ended diverged" in why for why in e.why)
    e = plants.controls(model, model, task, replace(split, anchor=split.forget), Recipe("scar", {}, 0), twins=2, candidates=1)
    assert e.why == ("scar reads an anchor for each record to forget, and plants have none",)


def test_a_patch_is_run_again_before_it_has_twins():
    model, task, split = wrong()
    attempt = expunge.unlearn("fine_tune", model, task, split, **FAST)
    recipe, why = plants.recipe_of(model, task, split, replace(attempt, ran=False))
    assert recipe == Recipe("fine_tune", dict(attempt.settings), 0, 0) and not why
    assert plants.recipe_of(model, task, split, replace(attempt, seed=1))[1].endswith("seed 1 leaves another patch here (ok)")
    assert "nothing says which method" in plants.recipe_of(model, task, split, Attempt("given", {}, 0, "ok", "", attempt.patch))[1]
    assert "cannot be run here" in plants.recipe_of(model, task, replace(split, retain=None), attempt)[1]


def test_the_price_is_named_before_anything_runs(monkeypatch):
    model, task, split = wrong()
    said = []
    monkeypatch.setattr(plants, "map_jobs", lambda *_, **__: pytest.fail("stop"))
    with pytest.raises(pytest.fail.Exception):
        plants.controls(
            model, model, task, split, Recipe("fine_tune", FAST, 0), twins=4, seconds=2.0, progress=lambda text, done, total: said.append((text, done, total))
        )
    assert said == [(said[0][0], 0, 6)]
    assert said[0][0].startswith("4 twins and 2 further candidates of fine_tune: at most ") and "some 20 s" in said[0][0] and "210 more of both" in said[0][0]


# verdicts


@pytest.mark.slow
def test_verified_without_references():
    """A retrained candidate, with planted controls alone; the same again from the folder, whose runs are not done twice."""
    model, task, _ = wrong()
    split = bench.request(world("digits-wrong"), 20, 0)
    v = expunge.forget(model, task, split, methods=["retrain"], twins=6, slow=False)
    t = v.chosen
    rules = {trial.name: trial.usable for trial in v.trials}
    assert {n for n in rules if n.startswith("plants.")} == {"plants.auc", "plants.margin", "plants.known", "plants.relearn", "plants.unseen", "plants.repair"}
    assert "membership.loss_auc" not in rules and "repair.free" not in rules and all(rules.values())
    assert v.passed and t is not None and t.grade.grade == "verified" and t.plants.there and t.plants.told == "6 twins, 120 plants", v.reasons
    document = v.document(pictures=False)
    assert document["plants"]["twins"] == 6 and len(document["plants"]["planting"]) == 6 and document["plants"]["cost"]["forward"] > 0
    drawn = {(r["records"], r["model"]): r["at"][2] for r in document["front"]["losses"] if r["records"] == "planted"}
    assert drawn["planted", "before"] < drawn["planted", "after"] / 2 and abs(drawn["planted", "after"] / drawn["planted", "never saw"] - 1) < 0.2, drawn
    assert any("Planted controls: 6 twins, 120 plants" in note for note in v.notes) and not any("No retrained reference" in note for note in v.notes)


def test_what_is_not_gone_is_refuted_on_plants():
    model, task, split = wrong()
    attempt = expunge.unlearn("fine_tune", model, task, split, epochs=0.5, lr=0.01)
    after = copied(model)
    attempt.patch.apply(after)
    v = expunge.audited(model, after, task, split, attempt=attempt, twins=4, slow=False, rules={"plants.margin": ">= 0.5", "drop.test": "<= 0.2"})
    assert v.grade.grade == "refuted" and "plants.margin breaks" in v.grade.why[0] and {t.name for t in v.trials} == {"plants.margin", "drop.test"}
    changed = replace(attempt, seed=3)
    v = expunge.audited(model, after, task, split, attempt=changed, twins=4, slow=False, rules={"drop.test": "<= 0.2"})
    assert v.grade.grade == "supported" or v.grade.grade == "inconclusive"
    assert any("planted controls are void: no twin" in why for why in v.grade.why) and any("void" in note for note in v.notes)


def test_no_twins_for_what_something_else_refutes(monkeypatch):
    model, task, split = wrong()
    monkeypatch.setattr("expunge.planning.plan.controls", lambda *_, **__: pytest.fail("twins were made"))
    v = expunge.forget(model, task, split, methods=["fine_tune"], settings={"fine_tune": FAST}, rules={"known.forget": "<= -1", "drop.test": "<= 1"}, twins=4)
    assert v.tries[0].grade.grade == "refuted" and v.tries[0].plants is None
    with pytest.raises(SplitError, match="a plant of a class"):
        expunge.forget(*digits(), twins=4)


def test_gates_ask_for_plants_by_the_size_of_the_request():
    model, task, split = wrong(30)
    sizes = {n: default_rules(Probe(model, model, task, replace(split, forget=split.forget.take(range(n))), plants=EXPECTED)) for n in (1, 5, 30)}
    assert sizes[1]["plants.auc"] == "0.15..0.85" and "plants.repair" not in sizes[1] and "plants.unseen.p" in sizes[1]
    assert sizes[5]["plants.auc"] == "0.2..0.8" and "plants.repair" in sizes[5] and "repair.free" not in sizes[5]
    assert sizes[30]["plants.auc"] == "0.25..0.75" == sizes[30]["plants.unseen"]
    bare = default_rules(Probe(model, model, task, split))
    assert "unseen.p" in bare and "unseen.p" not in sizes[30] and "membership.loss_auc" not in sizes[30]
    both = default_rules(Probe(model, model, task, split, (model,), plants=EXPECTED))
    assert {"gap_closed.margin", "known.excess", "plants.auc"} <= both.keys()
    speaker, spoken, said = small_language()
    texts = Probe(speaker, speaker, spoken, said, plants=EXPECTED)
    assert {"plants.auc", "wording.retain.lost", "drop.retain"} <= default_rules(texts).keys() and "membership.loss_auc" not in default_rules(texts)


def test_a_selftest_reads_the_planted_models():
    """Doing nothing must fail on plants; where it does not, the rule is unusable."""
    model, task, split = wrong(8)
    q = Probe(model, copied(model), task, replace(split, forget=split.forget.take(range(5))), plants=evidence())
    trials = {t.name: t for t in selftest(q, {"plants.auc": "0.2..0.8", "plants.margin": ">= 0.5", "plants.known": "<= 10"})}
    assert trials["plants.auc"].usable and trials["plants.margin"].usable and not trials["plants.known"].usable


@pytest.mark.slow
def test_twins_of_texts(tmp_path):
    """A tiny Llama that has validation alone for plants: two twins, one after another and side by side in two processes, to the same bits."""
    model, task, split = small_authors()
    recipe = Recipe("npo", {"lr": 1e-3, "epochs": 2.0, "retain": "ce"}, 0)
    attempt = recipe.run(model, task, split, 0)
    after = copied(model)
    attempt.patch.apply(after)
    one = plants.controls(model, after, task, split, recipe, twins=2, candidates=1, folder=tmp_path / "one")
    two = plants.controls(model, after, task, split, recipe, twins=2, candidates=1, workers=2)
    assert torch.equal(one.after.nll, two.after.nll) and torch.equal(one.before.margin, two.before.margin)
    rows = {r.name: r for r in audit(Probe(model, after, task, split, plants=replace(one, why=())), ["plants"])}
    assert {"plants.extraction", "plants.repair", "plants.auc"} <= rows.keys() and math.isfinite(rows["plants.extraction"].value)


def call(*words: str) -> tuple[int, str, str]:
    found = subprocess.run([sys.executable, "-m", "expunge", *words], capture_output=True, text=True, check=False)
    return found.returncode, found.stdout, found.stderr


@pytest.mark.slow
def test_the_command_line_forgets_and_audits_without_references(tmp_path, monkeypatch):
    """Five mislabelled digits, retrained, verified on plants; the patch audited by another call, which runs the method again; a class is refused."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mynet.py").write_text("from expunge.modalities.nets import small_cnn\ndef build():\n    return small_cnn(8)\n")
    models.save_state(original("digits-wrong"), tmp_path / "model.safetensors")
    gone = bench.request(world("digits-wrong"), 5, 0).forget.ids.tolist()
    common = ["--model", "py:mynet:build", "--weights", "model.safetensors", "--train", "world:digits-wrong/train", "--test", "world:digits-wrong/test"]
    common += ["--validation", "world:digits-wrong/validation", "--forget", f"ids:{','.join(map(str, gone))}", "--quick", "--json"]
    code, out, err = call("forget", *common, "--method", "retrain", "--lr", "0.05", "--plants", "world:digits-wrong/plants", "--twins", "10")
    document = json.loads(out)
    assert code == 0 and document["verdict"]["grade"] == "verified", (err, document["verdict"])
    assert document["plants"]["twins"] == 10 and document["plants"]["plants"] == 50 and document["references"] == 0
    assert len(list((tmp_path / "out" / "checkpoints" / "retrain-plants").glob("twin-*.safetensors"))) == 10
    code, out, err = call("audit", *common, "--patch", "out/latest/patch.safetensors", "--plants", "wrong", "--twins", "4", "--require", "supported")
    assert not json.loads(out)["plants"]["void"] and json.loads(out)["plants"]["kind"] == "given plants", err
    code, _, err = call("forget", *common, "--method", "retrain", "--twins", "4")
    assert code == 2 and "of another kind" in err
    code, _, err = call("forget", *common[:-4], "--forget", "class:3", "--method", "retrain", "--twins", "4")
    assert code == 2 and "a plant of a class" in err
