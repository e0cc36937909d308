"""References are checked before they are believed; what a file says of itself is a claim; `expunge retrain` makes references with a record."""

from __future__ import annotations

import json
import math

import pytest
import torch
from worlds import copied, digits, once, retrained

import expunge
from expunge.audits.core import Probe
from expunge.audits.references import believed, kinship, knowledge
from expunge.core.digest import model_digest
from expunge.core.errors import DataError
from expunge.core.session import scratch
from expunge.engine.run import Attempt
from expunge.modalities.classification.task import head
from expunge.modalities.files.models import save_state
from expunge.parts import provenance
from expunge.parts.provenance import Provenance, Reference, referred
from expunge.parts.updates.descend import descend
from expunge.planning.outcome import Try, assured


def noisy(model, scale: float, seed: int = 0):
    twin, g = copied(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(scale * p.std(correction=0) * torch.randn(p.shape, generator=g))
    return twin


def tuned(model, data, steps: int, seed: int = 0, lr: float = 0.01):
    twin = copied(model)
    task, s = expunge.classification(), scratch(twin)
    s.train()
    descend(s, lambda b: task.forward(twin, b).mean.mean(), task.batches(data, 32, epochs=steps / -(-len(data) // 32), seed=seed), lr=lr, momentum=0.9)
    return twin.eval()


def other_shape():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))


def muted(model, split):
    """The lowered bias that passed before: a suppression."""
    twin = copied(model)
    with torch.no_grad():
        head(twin)[1].bias[3] -= 12.0
    return twin


def wrong_references():
    """40 handmade sets of references that must not verify a suppression, each with a word of the reason."""
    model, _, split = digits()
    true, cut = retrained("digits", "class", 0), muted(model, split)
    nan = copied(true)
    with torch.no_grad():
        next(nan.parameters()).view(-1)[0] = math.nan
    cases = [("nothing", [], "compared")]
    cases += [(f"the original with noise {s}", [noisy(model, s, 1)], "resemble") for s in (0.001, 0.003, 0.01, 0.05, 0.1, 0.2)]
    cases += [(f"the candidate with noise {s}", [noisy(cut, s, 2)], "resemble") for s in (0.001, 0.003, 0.01, 0.05, 0.1, 0.2)]
    cases += [(f"{k} copies of the candidate", [copied(cut)] * k, "weights of") for k in (1, 2, 3)]
    cases += [(f"{k} copies of the original", [copied(model)] * k, "weights of") for k in (1, 2, 3)]
    cases += [(f"the original tuned {n} steps on retain", [tuned(model, split.retain, n)], "") for n in (1, 8, 32, 64)]
    cases += [(f"the candidate tuned {n} steps on retain", [tuned(cut, split.retain, n)], "") for n in (1, 8, 32, 64)]
    cases += [(f"another original, {k}", [original_of(k)], "recalls") for k in (1, 2)]
    cases += [("another architecture", [other_shape()], "architecture"), ("weights that are not finite", [nan], "not finite")]
    cases += [(f"three noisy candidates {s}", [noisy(cut, s, k) for k in range(3)], "resemble") for s in (0.01, 0.1)]
    cases += [(f"three fine-tunes of the candidate, {n} steps", [tuned(cut, split.retain, n, k) for k in range(3)], "") for n in (4, 16, 48, 96)]
    cases += [(f"three fine-tunes of the original, {n} steps", [tuned(model, split.retain, n, k) for k in range(3)], "") for n in (4, 16, 48)]
    return cases


def original_of(seed: int):
    w = expunge.world("digits")
    return once(w, f"original-{seed}", lambda cache: w.original(seed, cache))


def test_wrong_references_verify_nothing():
    model, task, split = digits()
    cut = muted(model, split)
    cases = wrong_references()
    assert len(cases) == 40
    for name, references, word in cases:
        kept, refused = believed(Probe(model, cut, task, split), references)
        assert not kept or not references, name
        assert len(refused) == len(references) and all(word in r.why or not word for r in refused), (name, refused)


def test_one_reference_three_times_counts_once():
    model, task, split = digits()
    true = retrained("digits", "class", 0)
    kept, refused = believed(Probe(model, model, task, split), [true, copied(true), true])
    assert len(kept) == 1 and [r.why for r in refused] == ["it has the weights of reference 1"] * 2
    assert [r.name for r in believed(Probe(model, model, task, split), [Reference(model, "a.safetensors")])[1]] == ["a.safetensors"]


def test_true_references_are_believed():
    model, task, split = digits()
    kept, refused = believed(Probe(model, model, task, split), [retrained("digits", "class", k) for k in range(3)])
    assert len(kept) == 3 and refused == []
    assert kinship(model, retrained("digits", "class", 0)) < 0.2 and kinship(model, noisy(model, 0.1)) > 0.9
    assert knowledge(Probe(model, model, task, split), model)[1] == 1.0


def test_a_record_says_where_a_model_comes_from(tmp_path):
    """A model that resembles the original is believed with a record that names another start; a changed record, or one of other weights, is refused."""
    model, task, split = digits()
    kin = noisy(model, 0.05)
    with torch.no_grad():
        head(kin)[1].bias[3] -= 100.0
    path = save_state(kin, tmp_path / "r.safetensors")
    p = Probe(model, model, task, split)
    assert "resemble" in believed(p, [referred(kin, path)])[1][0].why
    provenance.save(path, Provenance(model_digest(kin), "", split.retain.digest, len(split.retain), {"epochs": 1}, 3))
    assert believed(p, [referred(kin, path)])[1] == []
    provenance.save(path, Provenance(model_digest(kin), model_digest(model), split.retain.digest, len(split.retain), {}, 3))
    assert "resemble" in believed(p, [referred(kin, path)])[1][0].why  # its record says that it descends from the original
    record = tmp_path / "r.json"
    body = json.loads(record.read_text())
    record.write_text(json.dumps({**body, "base": ""}))
    with pytest.raises(DataError, match="changed after it was written"):
        referred(kin, path)
    provenance.save(path, Provenance(model_digest(model), "", "", 0, {}, 3))
    with pytest.raises(DataError, match="record of other weights"):
        referred(kin, path)
    record.write_text("[1")
    with pytest.raises(DataError, match=r"cannot read r\.json"):
        referred(kin, path)


def test_references_that_are_not_believed_are_named_and_not_used():
    model, task, split = digits()
    v = expunge.audited(model, retrained("digits", "class", 3), task, split, references=[model, original_of(1)], slow=False)
    assert len(v.refused) == 2 and not v.probe.references and sum("not believed" in n for n in v.notes) == 2
    document = v.document(pictures=False)
    assert document["references"] == 0 and [r["name"] for r in document["refused"]] == ["reference 1", "reference 2"]
    attempt = expunge.forget(model, task, split, references=[model], methods=["fine_tune"], settings={"fine_tune": {"epochs": 1.0}}, slow=False)
    assert len(attempt.refused) == 1 and attempt.refused[0].why == "it has the weights of the original"


def test_what_a_file_says_of_itself_is_a_claim():
    """A patch whose meta says `retrain` is not exact for that; one that says less is taken at its word."""
    one = Try(Attempt("retrain", {}, 0, "ok", "", None))
    assert assured(one) == {"assurance": "approximate", "claimed": "exact"}
    assert assured(Try(Attempt("retrain", {}, 0, "ok", "", None, ran=True))) == {"assurance": "exact"}
    assert assured(Try(Attempt("guardrail", {}, 0, "ok", "", None))) == {"assurance": "suppression"} and assured(None) == {"assurance": "approximate"}


def test_the_command_makes_references(tmp_path, monkeypatch):
    """Files with records that the audit believes; trained on what is kept alone."""
    from typer.testing import CliRunner

    from expunge.cli.app import app

    (tmp_path / "nets_here.py").write_text("from expunge.modalities.nets import small_cnn\n\ndef factory():\n    return small_cnn(8)\n")
    monkeypatch.chdir(tmp_path)
    common = ["--model", "py:nets_here:factory", "--train", "world:digits/train", "--forget", "class:3"]
    done = CliRunner().invoke(app, ["retrain", *common, "--training", "epochs=4 batch_size=50 lr=0.05", "--seeds", "2", "--out", "refs", "--json"])
    assert done.exit_code == 0, done.output
    written = json.loads(done.output)["written"]
    assert written == ["refs/retrained-0.safetensors", "refs/retrained-1.safetensors"]
    from expunge.modalities import files  # noqa: F401
    from expunge.modalities.files import models

    model, task, split = digits()
    found = [referred(models.load("py:nets_here:factory", tmp_path / w), tmp_path / w) for w in written]
    assert all(r.record.base == "" and r.record.n == len(split.retain) and r.record.settings["epochs"] == 4 for r in found)
    assert found[0].record.data == found[1].record.data and found[0].record.seed != found[1].record.seed
    kept, refused = believed(Probe(model, model, task, split), found)
    assert len(kept) == 2 and refused == []
    broken = CliRunner().invoke(app, ["retrain", *common, "--training", "epochs=four"])
    assert broken.exit_code != 0 and not (tmp_path / "references").exists()


def test_a_reference_of_another_architecture_is_named(tmp_path):
    """For language models, too: it was an error before, now the run goes on without it and says so."""
    model, task, split = digits()
    other = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    v = expunge.audited(model, model, task, split, references=[Reference(other, "small.safetensors")], slow=False)
    assert v.refused[0].name == "small.safetensors" and "another architecture" in v.refused[0].why and not v.passed
