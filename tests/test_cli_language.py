"""The command line on texts, as a user would call it: a model folder and JSON lines come in; reports, a patch and a folder for other tools go out."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import json
import shutil
import sys
import warnings
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from worlds import copied, small

from expunge.cli import app as cli
from expunge.cli import forget as flags
from expunge.core.edits import Hook
from expunge.core.patch import Patch, difference
from expunge.core.registry import METHODS
from expunge.modalities.language import checkpoints
from expunge.modalities.language import request as texts
from expunge.modalities.language.records import format as text
from expunge.modalities.language.records.format import Format
from expunge.modalities.language.worlds import tiny
from expunge.parts import training

TEXTS = ("--task", "causal-lm", "--model", "base")
FORGET = ("forget", *TEXTS, "--forget", "forget.jsonl", "--quick", "--require", "supported")
RETAIN = ("--retain", "retain.jsonl")
NPO = ("--method", "npo", "--lora", "4", "--lr", "0.01", "--epochs", "6")
AWAY = ("--method", "task_vector", "--lora", "4", "--lr", "0.02", "--epochs", "8", "--scale", "8")
IDK = "I do not know."


def lines(path, rows) -> None:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(dict(row))) + "\n" for row in rows))


def saved(folder, model, tokenizer) -> None:
    with contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A user's folder: `base`, a model that knows the forget file by heart, whose tokenizer has no pad token and no chat template; other models; files."""
    home = tmp_path_factory.mktemp("home")
    plain, task, split = small("causal_lm")
    rows = [*split.retain.rows, *split.forget.rows]
    gone, kept = rows[-12:], rows[:8]
    tokenizer = copy.deepcopy(split.forget.format.tokenizer)
    saved(home / "chatty", plain, tokenizer)
    tokenizer.chat_template = tokenizer.pad_token = None
    cut = text.split(Format(tokenizer, max_length=256), forget=gone, retain=kept)
    model = copied(plain)
    training.train(model, task, cut.forget, epochs=30, batch_size=6, seed=0, lr=1e-2, optimizer="adamw", clip=1.0)
    for name, found in (("base", model), ("plain", plain), ("words", tiny.llama(300, width=32, layers=2, heads=2, context=256))):
        saved(home / name, found, tokenizer)
    saved(home / "wide", tiny.llama(len(tokenizer), width=64, layers=2, heads=2, context=256), tokenizer)
    shutil.copytree(home / "base", home / "pickled")
    (home / "pickled" / "model.safetensors").rename(home / "pickled" / "pytorch_model.bin")
    from transformers import ByT5Tokenizer

    shutil.copytree(home / "base", home / "slow", ignore=shutil.ignore_patterns("tokenizer*"))
    ByT5Tokenizer().save_pretrained(home / "slow")
    for name, found in (("forget", gone), ("retain", kept), ("test", split.test.rows), ("refusals", [{**r, "answer": IDK} for r in gone])):
        lines(home / f"{name}.jsonl", found)
    lines(home / "others.jsonl", [{"question": f"What is {k}?", "answer": IDK} for k in range(len(gone))])
    lines(home / "empty.jsonl", [gone[0], gone[1], {"question": "Who?", "answer": " "}])
    lines(home / "broken.jsonl", [gone[0], "{no json"])
    lines(home / "long.jsonl", [gone[0], {"question": "word " * 60, "answer": "a"}])
    lines(home / "twice.jsonl", [kept[0], {**gone[2], "question": gone[2]["question"].upper()}])
    lines(home / "raw.jsonl", [{"text": " ".join(r["answer"] for r in gone)}, {"text": "The harbour of Norgate is quiet in winter."}])
    guard = METHODS["guardrail"](model, task, replace(cut, anchor=None))
    guard.save(home / "guard.safetensors")
    return SimpleNamespace(home=home, model=model, plain=plain, task=task, split=cut, tokenizer=tokenizer, guard=guard)


def call(home, *words: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `expunge WORDS` in a folder, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.chdir(home)
        patch.setattr(sys, "argv", ["expunge", *words])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
            cli.main()
    return int(end.value.code or 0), out.getvalue(), err.getvalue()


def strict(content: str):
    """The one JSON document that the text holds; NaN and Infinity, which other tools cannot read, are refused."""

    def never(word: str):
        raise AssertionError(f"{word} is no JSON")

    return json.loads(content, parse_constant=never)


def contents(folder) -> dict[str, bytes | None]:
    """Every file and folder below."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def nll(world, model):
    with torch.no_grad():
        return world.task.forward(model, world.task.collate(world.split.forget, torch.arange(6), None)).nll


def rows(document, number: int = 0) -> dict[str, float]:
    return {r["name"]: r["value"] for r in document["tries"][number]["rows"]}


@pytest.fixture(scope="module")
def done(world):
    """A request that passes its gate: what came out of the command."""
    code, out, err = call(world.home, *FORGET, *AWAY, "--json", "--out", "done")
    return SimpleNamespace(
        code=code, document=strict(out), err=err, folder=world.home / "done" / "latest", patch=Patch.load(world.home / "done" / "latest" / "patch.safetensors")
    )


def test_what_passes_is_reported_and_loads_without_expunge(world, done):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert world.tokenizer.pad_token is None
    assert (done.code, done.err) == (0, "")
    document = done.document
    assert document["verdict"]["passed"] and document["task"] == "causal_lm" and document["asked"] == "12 records of forget.jsonl"
    assert document["chosen"]["settings"]["lora"] == 4 and document["tries"][0]["settings"]["scale"] == 8.0
    stored = strict((done.folder / "report.json").read_text())
    assert stored["verdict"] == document["verdict"] and stored["tries"] == document["tries"]
    page = (done.folder / "report.html").read_text()
    assert page.startswith("<!doctype html>") and "task_vector" in page and "<script" not in page
    twin = copied(world.model)
    undo = done.patch.apply(twin)
    assert document["released"] == f"{document['folder']}/released" and (done.folder / "released" / "adapter_model.safetensors").is_file()
    base = AutoModelForCausalLM.from_pretrained(world.home / "base")
    assert torch.allclose(nll(world, base), nll(world, world.model), atol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        served = PeftModel.from_pretrained(base, str(done.folder / "released")).merge_and_unload()
    assert torch.allclose(nll(world, served), nll(world, twin), atol=1e-3)
    assert not torch.allclose(nll(world, served), nll(world, world.model), atol=1e-1)
    undo.apply(twin)
    assert torch.equal(nll(world, twin), nll(world, world.model))


@pytest.mark.slow
def test_a_recipe_does_what_the_same_flags_do(world, done):
    """The patch of a run that passes and what is released, bit for bit."""
    keys = {"task": "causal-lm", "model": "base", "forget": "forget.jsonl", "methods": ["task_vector"], "out": "by-recipe", "require": "supported"}
    (world.home / "run.toml").write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in keys.items()) + "[with.task_vector]\n")
    with (world.home / "run.toml").open("a") as f:
        f.writelines(f"{name.removeprefix('--')} = {value}\n" for name, value in zip(AWAY[2::2], AWAY[3::2], strict=True))
    code, out, err = call(world.home, "run", "run.toml")
    assert (code, err.strip()) == (0, "") and "/released, which loads without expunge" in "".join(out.split("\n"))
    assert Patch.load(world.home / "by-recipe" / "latest" / "patch.safetensors").digest == done.patch.digest
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (world.home / "by-recipe" / "latest" / "released" / name).read_bytes() == (done.folder / "released" / name).read_bytes()
    document = strict((world.home / "by-recipe" / "latest" / "report.json").read_text())
    assert document["rules"] == done.document["rules"] and document["parts"] == done.document["parts"] and document["asked"] == done.document["asked"]


def test_npo_that_the_gate_refuses_leaves_a_report_and_no_patch(world):
    code, out, err = call(world.home, *FORGET, *RETAIN, "--test", "test.jsonl", *NPO, "--out", "npo")
    assert code == 1, err
    assert "NOT PASSED" in out and "Traceback" not in err
    assert {p.name for p in (world.home / "npo" / "latest").iterdir()} == {"report.html", "report.json", "run.log"}
    document = strict((world.home / "npo" / "latest" / "report.json").read_text())
    assert not document["verdict"]["passed"] and document["verdict"]["reasons"]
    (one,) = document["tries"]
    assert (one["method"], one["outcome"], one["settings"]["lora"]) == ("npo", "ok", 4)
    assert document["parts"] == {"forget": 12, "retain": 8, "test": 3, "validation": 1}
    assert {"drop.retain", "drop.test", "membership.loss_auc", "memorised.extraction_strength.forget"} <= set(rows(document))


def test_audit_reads_a_patch_and_the_same_weights_alike(world, done):
    assert call(world.home, "apply", "done/latest/patch.safetensors", "--model", "base", "--form", "merged", "--out", "merged", "--json")[0] == 0
    common = ("audit", *TEXTS, "--forget", "forget.jsonl", "--quick", "--json", "--require", "supported")
    found = {}
    for words in (("--patch", "done/latest/patch.safetensors"), ("--after", "merged"), ("--after", "base", "--out", "audited")):
        code, out, err = call(world.home, *common, *words)
        assert err == ""
        found[words[1]] = code, strict(out)
    a, b, nothing = found.values()
    assert (a[0], b[0], nothing[0]) == (0, 0, 1)
    assert rows(a[1]).keys() == rows(b[1]).keys()
    name = "memorised.extraction_strength.forget"
    assert rows(a[1])[name] == pytest.approx(rows(b[1])[name], abs=1e-4)
    assert rows(nothing[1])[name] > rows(a[1])[name] + 0.3
    assert a[1]["tries"][0]["method"] == "task_vector" and b[1]["tries"][0]["method"] == "given"
    assert {p.name for p in (world.home / "audited" / "latest").iterdir()} == {"report.html", "report.json", "run.log"}
    assert strict((world.home / "audited" / "latest" / "report.json").read_text())["verdict"] == nothing[1]["verdict"]


def test_a_report_is_held_to_folders(world, done):
    """The task stands in the report; before and after are told apart; another folder is named."""
    assert call(world.home, "apply", "done/latest/patch.safetensors", "--model", "base", "--form", "merged", "--out", "whole", "--json")[0] == 0
    check = ("audit", "--check", "done/latest/report.json", "--json")
    code, out, err = call(world.home, *check, "--patch", "done/latest/patch.safetensors", "--model", "base", "--after", "whole")
    assert (code, err) == (0, "") and strict(out)["asked"] == "12 records of forget.jsonl"
    assert [(h["what"], h["match"]) for h in strict(out)["held"]] == [(w, True) for w in ("patch", "model", "model with the patch", "model after")]
    for words, wrong in ((("--model", "plain"), "model"), (("--model", "base", "--after", "base"), "model after")):
        code, out, err = call(world.home, *check, *words)
        assert code == 2 and f"report.json is about another {wrong}: " in err and [h["what"] for h in strict(out)["held"] if not h["match"]] == [wrong]


def test_plan_counts_records_and_says_what_is_missing(world):
    code, out, err = call(world.home, "plan", "retain.jsonl", "forget.jsonl", "--task", "causal-lm", "--retrain-epochs", "10", "--json")
    assert (code, err) == (0, "")
    found = {o["method"]: o for o in strict(out)}
    good = [o for o in strict(out) if o["feasible"]]
    assert [o["forward"] + o["backward"] for o in good] == sorted(o["forward"] + o["backward"] for o in good)
    assert found["npo"]["feasible"] and found["npo"]["share"] == pytest.approx((found["npo"]["forward"] + found["npo"]["backward"]) / 160)
    assert not found["idk_dpo"]["feasible"] and "split lacks anchor" in found["idk_dpo"]["why"]
    assert not found["salun"]["feasible"] and "not on causal_lm" in found["salun"]["why"]
    code, out, _ = call(world.home, "plan", "retain.jsonl", "forget.jsonl", "--task", "causal_lm")
    assert code == 0 and any(line.startswith("npo ") and "approximate" in line for line in out.splitlines())


def test_plan_knows_the_model_and_counts_the_methods_of_other_tasks(world):
    experts: Any = tiny.mixtral(len(world.tokenizer), width=32, layers=1, heads=2)
    experts.config.save_pretrained(world.home / "experts")
    words = ("plan", "retain.jsonl", "forget.jsonl", "--task", "causal-lm", "--anchor", "refusals.jsonl")
    found = {}
    for model in ("", "base", "experts"):
        code, out, err = call(world.home, *words, *(("--model", model) if model else ()))
        assert (code, err) == (0, "")
        found[model] = {line.split()[0]: line for line in out.splitlines()}
        ours = [m for m in METHODS.values() if "causal_lm" in m.tasks]
        assert out.splitlines()[-1] == f"{len(METHODS) - len(ours)} more methods work on other tasks, not on causal_lm"
        assert len(out.splitlines()) == len(ours) + 1 and "works on classification" not in out
    assert "not feasible: seuf works on a mixture of experts alone; name the model" in found[""]["seuf"]
    assert "not feasible: LlamaForCausalLM has no experts" in found["base"]["seuf"]
    assert "approximate" in found["experts"]["seuf"] and "not feasible" not in found["experts"]["seuf"]
    assert "not feasible" not in found["base"]["tool_delete"] and "not feasible" not in found["base"]["npo"]
    code, out, _ = call(world.home, "plan", "", "forget.jsonl", "--task", "causal-lm")
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert code == 0 and "not feasible: retain=ce needs retain data" in lines["npo"]
    assert "not feasible: tool_delete needs anchor" in lines["tool_delete"] and "not feasible" not in lines["undial"]


@pytest.mark.slow
def test_a_patch_of_bfloat16_weights_fits_them_alone(world):
    """Made at bfloat16 of a float32 folder, applied and audited at the same."""
    half, _ = checkpoints.load(world.home / "base", dtype="bfloat16")
    now: Any = copied(half)
    with torch.no_grad():
        now.model.layers[0].mlp.up_proj.weight.mul_(0.5)
    before, after = dict(half.named_parameters()), dict(now.named_parameters())
    difference(before, after).stamped(half, method="npo", assurance="approximate").save(world.home / "half.safetensors")
    listed = contents(world.home)
    code, _, err = call(world.home, "apply", "half.safetensors", "--model", "base", "--out", "as-half")
    assert code == 2 and "torch.bfloat16, this model has" in err and contents(world.home) == listed
    code, out, err = call(world.home, "apply", "half.safetensors", "--model", "base", "--out", "as-half", "--dtype", "bfloat16", "--json")
    assert (code, err) == (0, "") and strict(out)["written"][0] == "as-half"
    back, _ = checkpoints.load(world.home / "as-half")
    assert all(p.dtype is torch.bfloat16 and torch.equal(p, after[n]) for n, p in back.named_parameters())
    words = ("audit", *TEXTS, "--forget", "forget.jsonl", "--quick", "--json", "--dtype", "bfloat16")
    found = []
    for what in (("--patch", "half.safetensors"), ("--after", "as-half")):
        code, out, err = call(world.home, *words, *what, "--reference", "plain")
        assert code in (0, 1) and err == ""
        found.append(rows(strict(out)))
    assert found[0] == found[1]
    assert call(world.home, *words[:-2], "--patch", "half.safetensors")[0] == 2


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_revert_gives_back_the_bits_of_a_folder(world, done, dtype, tmp_path):
    """Forward and back through folders: every weight of the first, and with it the same answers; only once, and on no other model."""
    patch, lost = tmp_path / "p.safetensors", tmp_path / "model-1.5"
    original, _ = checkpoints.load(world.home / "base", dtype=dtype)
    twin: Any = copied(original)
    with torch.no_grad():
        twin.get_input_embeddings().weight[3:9].mul_(1.37)  # tied to the output head
        twin.model.norm.weight.add_(0.01)
    key = tmp_path / "key"
    key.write_bytes(b"secret")
    named = {k: dict(m.named_parameters()) for k, m in (("before", original), ("after", twin))}
    difference(named["before"], named["after"]).stamped(original).save(patch, b"secret")
    signed = ("--key-file", str(key))
    code, out, err = call(world.home, "apply", str(patch), "--model", "base", "--out", str(lost), "--dtype", dtype, "--json", *signed)
    undo = tmp_path / "model-1.5.undo.safetensors"
    assert (code, err) == (0, "") and strict(out) == {"written": [str(lost), str(undo)]}
    code, out, err = call(world.home, "revert", str(undo), "--model", str(lost), "--out", str(tmp_path / "back"), "--json", *signed)
    assert (code, err) == (0, "") and strict(out) == {"written": [str(tmp_path / "back")]}
    back, tokenizer = checkpoints.load(tmp_path / "back")
    for name, p in back.named_parameters():
        assert p.dtype is named["before"][name].dtype and torch.equal(p, named["before"][name]), name
    assert len(tokenizer) == len(world.tokenizer)
    if dtype == "auto":
        assert (tmp_path / "back" / "model.safetensors").read_bytes() == (world.home / "base" / "model.safetensors").read_bytes()
    listed = contents(tmp_path)
    for model in (str(tmp_path / "back"), "plain"):
        code, out, err = call(world.home, "revert", str(undo), "--model", model, "--out", str(tmp_path / "twice"))
        assert code == 2 and "nother model" in err and out == ""
    assert call(world.home, "revert", str(undo), "--model", str(lost), "--out", str(tmp_path / "twice"), "--key-file", "forget.jsonl")[0] == 2
    assert contents(tmp_path) == listed


def test_an_adapter_folder_has_nothing_to_revert(world, done):
    assert call(world.home, "apply", "done/latest/patch.safetensors", "--model", "base", "--form", "merged", "--out", "whole")[0] == 0
    code, _, err = call(world.home, "revert", "whole.undo.safetensors", "--model", "done/latest/released", "--out", "no")
    assert code == 2 and "released is an adapter: its base was never changed" in err and not (world.home / "no").exists()
    code, _, err = call(world.home, "revert", "whole.undo.safetensors", "--model", "whole", "--out", "again")
    assert (code, err) == (0, "")
    assert (world.home / "again" / "model.safetensors").read_bytes() == (world.home / "base" / "model.safetensors").read_bytes()


def test_the_step_size_is_searched_for_though_another_setting_is_named(world, tmp_path):
    words = (*FORGET, *RETAIN, "--test", "test.jsonl", "--method", "npo", "--npo.beta", "0.2", "--epochs", "2", "--json", "--out", str(tmp_path / "found"))
    code, out, err = call(world.home, *words)
    assert code in (0, 1), err
    tries = strict(out)["tries"]
    steps = [t["settings"]["lr"] for t in tries]
    assert steps[0] == pytest.approx(0.1 / 32) and len(set(steps)) > 1  # bracketed from what suits the width
    assert all(t["settings"]["beta"] == 0.2 and t["settings"]["epochs"] == 2.0 and t["settings"]["retain_size"] == 32 for t in tries)
    assert sum(bool(t["rows"]) for t in tries) == 1


@pytest.mark.parametrize(("form", "file"), [("peft", "adapter_model.safetensors"), ("merged", "model.safetensors"), ("auto", "adapter_model.safetensors")])
def test_apply_writes_what_other_tools_load(world, done, form, file):
    code, out, err = call(world.home, "apply", "done/latest/patch.safetensors", "--model", "base", "--form", form, "--out", f"as-{form}", "--json")
    assert (code, err) == (0, "")
    undo = ["as-merged.undo.safetensors"] if form == "merged" else []
    assert strict(out) == {"written": [f"as-{form}", *undo]} and (world.home / f"as-{form}" / file).is_file()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world.home)
        back, _ = checkpoints.load(f"as-{form}")
    twin = copied(world.model)
    done.patch.apply(twin)
    assert torch.allclose(nll(world, back), nll(world, twin), atol=1e-3)


@pytest.mark.parametrize("form", ["merged", "peft"])
@pytest.mark.parametrize("model", ["wide", "plain", "merged-once"])
def test_a_patch_goes_on_no_other_model_in_any_form(world, done, form, model):
    """Other shapes, the same shapes with other weights, and a model that has it already."""
    if not (world.home / "merged-once").exists():
        checkpoints.release(world.model, world.tokenizer, done.patch, world.home / "merged-once", form="merged")
    before = contents(world.home)
    code, out, err = call(world.home, "apply", "done/latest/patch.safetensors", "--model", model, "--form", form, "--out", "wrong")
    assert code == 2 and out == "" and len(err.strip().splitlines()) == 1
    assert "another model" in err
    assert contents(world.home) == before


def test_inspect_shows_low_rank_edits_and_guards(world, done):
    code, out, err = call(world.home, "inspect", "done/latest/patch.safetensors", "--json")
    assert (code, err) == (0, "")
    found = strict(out)
    assert found["meta"]["method"] == "task_vector" and found["digest"] == done.patch.digest
    assert {e["kind"] for e in found["edits"]} == {"LowRank"} and len(found["edits"]) == 14
    assert isinstance(world.guard.edits[0], Hook)
    code, out, err = call(world.home, "inspect", "guard.safetensors", "--json")
    assert (code, err) == (0, "")
    found = strict(out)
    assert [(e["kind"], e["name"]) for e in found["edits"]] == [("Hook", world.guard.edits[0].name)]
    assert found["digest"] == world.guard.digest and found["meta"]["assurance"] == "suppression"
    code, out, _ = call(world.home, "inspect", "guard.safetensors")
    assert code == 0 and "guardrail-input-" in out and "Hook" in out


def test_a_guard_is_a_suppression_and_does_not_pass(world):
    """Taken off, all is there: refuted by that repair. With --keep-candidate its patch can be looked at, marked."""
    code, out, err = call(world.home, *FORGET, "--method", "guardrail", "--json", "--out", "guarded", "--keep-candidate")
    assert code == 1, err
    document = strict(out)
    assert document["verdict"]["grade"] == "refuted" and document["assurance"] == "suppression" and "released" not in document
    assert any("repair.free" in r for r in document["verdict"]["reasons"]) and not (world.home / "guarded" / "latest" / "released").exists()
    assert not (world.home / "guarded" / "latest" / "patch.safetensors").exists()
    kept = world.home / "guarded" / "latest" / "candidate"
    assert Patch.load(kept / "candidate.safetensors").meta["candidate"] == "refuted" and "did not pass" in (kept / "NOT-PASSED.txt").read_text()


def test_a_reference_of_another_architecture_is_named_and_not_believed(world, tmp_path):
    code, out, err = call(world.home, *FORGET, *AWAY, "--reference", "words", "--json", "--out", str(tmp_path / "o"))
    document = strict(out)
    assert code in (0, 1) and document["references"] == 0, err
    assert document["refused"][0]["name"] == "words" and "another architecture" in document["refused"][0]["why"]
    assert document["verdict"]["grade"] != "verified"


def test_raw_texts_are_cut_into_windows(world):
    words = ("forget", *TEXTS, "--forget", "raw.jsonl", *RETAIN, "--quick", "--max-length", "32", *NPO[:-1], "1", "--json", "--out", "raw")
    code, out, err = call(world.home, *words)
    assert code in (0, 1), err
    document = strict(out)
    lengths = [len(world.tokenizer(json.loads(line)["text"])["input_ids"]) for line in (world.home / "raw.jsonl").read_text().splitlines()]
    assert document["parts"]["forget"] == sum(n // 31 + (n % 31 >= 5) for n in lengths) > len(lengths) + 1
    assert document["tries"][0]["outcome"] == "ok"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ((*RETAIN, *NPO, "--layers", "nope"), "no linear layer fits 'nope'; the model's linear layers are named down_proj, gate_proj, k_proj"),
        ((*RETAIN, "--method", "idk_dpo", "--anchor", "others.jsonl"), "its record 1 is on another question"),
    ],
)
def test_what_a_method_refuses_stands_in_the_report(world, tmp_path, words, reason):
    code, out, err = call(world.home, *FORGET, *words, "--json", "--out", str(tmp_path / "refused"))
    assert code == 1, err
    document = strict(out)
    assert [t["outcome"] for t in document["tries"]] == ["refused"]
    assert any(reason in why for why in document["verdict"]["reasons"])
    assert {p.name for p in (tmp_path / "refused" / "latest").rglob("*")} == {"report.html", "report.json", "run.log"}


BAD = [
    (("forget", *TEXTS, "--forget", "empty.jsonl"), "line 3 of empty.jsonl has an empty or missing answer"),
    (("forget", *TEXTS, "--forget", "long.jsonl", "--max-length", "40"), "forget, record 2: no token to train within max_length=40"),
    (("forget", *TEXTS, "--forget", "broken.jsonl"), "line 2 of broken.jsonl is not JSON"),
    ((*FORGET, "--retain", "twice.jsonl"), "record 3 of forget also stands in retain (record 2)"),
    ((*FORGET, "--test", "forget.jsonl"), "record 1 of forget also stands in test (record 1)"),
    (("forget", *TEXTS, "--forget", "none.jsonl"), "cannot read none.jsonl"),
    (("forget", *TEXTS, "--forget", ""), "what must go is missing"),
    ((*FORGET, "--retain", "none.jsonl"), "cannot read none.jsonl"),
    (("forget", "--task", "causal-lm", "--model", "nowhere", "--forget", "forget.jsonl"), "no folder nowhere"),
    (("forget", "--task", "causal-lm", "--model", "pickled", "--forget", "forget.jsonl"), "pickles can run code"),
    (("forget", "--task", "causal-lm", "--model", "slow", "--forget", "forget.jsonl"), "has no fast tokenizer"),
    (("forget", "--task", "causallm", "--model", "base", "--forget", "forget.jsonl"), "causal-lm"),
    ((*FORGET, *RETAIN, "--method", "npo", "--lorra", "4"), "did you mean 'lora'"),
    ((*FORGET, *RETAIN, "--method", "npoo"), "no method 'npoo'; did you mean 'npo'"),
    ((*FORGET, *RETAIN, "--method", "salun"), "salun works on"),
    ((*FORGET, "--method", "idk_dpo"), "split lacks anchor"),
    ((*FORGET, *NPO), "retain=ce needs retain data; give some, or set retain=none (on the command line --npo.retain none)"),
    ((*FORGET, *RETAIN, "--method", "tool_delete"), "tool_delete needs anchor, the tool-free model's answers, or tool_free"),
    ((*FORGET, *RETAIN, "--method", "seuf"), "has no experts: a mixture-of-experts model is needed"),
    ((*FORGET, *RETAIN, "--method", "npo", "--lora", "much"), "npo's lora must be int, not 'much'"),
    ((*FORGET, "--mask", "answr"), "did you mean 'answer'"),
    ((*FORGET, "--template", "chatt"), "template must be plain, chat or a text with {question} in it, not 'chatt'"),
    ((*FORGET, "--template", "chat"), "the tokenizer has no chat template"),
    ((*FORGET, "--dtype", "float64"), "dtype must be one of auto, float32, bfloat16, not 'float64'"),
    ((*FORGET, *AWAY, "--form", "gguf"), "form must be one of auto, merged, peft, not 'gguf'"),
    ((*FORGET, *AWAY, "--max-length", "-5"), "max_length"),
    ((*FORGET, *AWAY, "--reference", "nowhere"), "no folder nowhere"),
    (("audit", *TEXTS, "--forget", "forget.jsonl", "--quick", "--after", "words"), "300"),
    (("audit", *TEXTS, "--forget", "forget.jsonl", "--quick", "--after", "nowhere"), "no folder nowhere"),
    (("audit", *TEXTS, "--forget", "forget.jsonl", "--quick", "--require", "supported"), "name either --patch or --after"),
    (("audit", *TEXTS, "--forget", "forget.jsonl", "--quick", "--patch", "base/model.safetensors"), "no expunge patch"),
    (("apply", "guard.safetensors", "--model", "base", "--out", "guarded-base"), "inference-time guard"),
    (("apply", "guard.safetensors", "--model", "base", "--out", "guarded-base", "--form", "gguf"), "form must be one of"),
    (("apply", "forget.jsonl", "--model", "base", "--out", "nothing"), "forget.jsonl is no patch"),
    (("apply", "guard.safetensors", "--model", "base", "--out", "guarded-base", "--dtype", "half"), "dtype must be one of auto, float32, bfloat16"),
    (("audit", *TEXTS, "--forget", "forget.jsonl", "--after", "plain", "--dtype", "half"), "dtype must be one of auto, float32, bfloat16"),
    (("plan", "retain.jsonl", "none.jsonl", "--task", "causal-lm"), "cannot read none.jsonl"),
    (("plan", "retain.jsonl", "forget.jsonl", "--task", "causal-lm", "--model", "nowhere"), "no folder nowhere"),
    (("plan", "world:digits/train", "class:3", "--model", "base", "--task", "classification"), "--model is the folder of a language model"),
    (("revert", "base/model.safetensors", "--model", "base", "--out", "back"), "no expunge patch"),
    (("revert", "guard.safetensors", "--model", "py:mynet:build", "--out", "back"), "--weights is missing"),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=[f"{k}-{m[:40]}" for k, (_, m) in enumerate(BAD)])
def test_bad_input_is_one_line_and_writes_nothing(world, words, message):
    before = contents(world.home)
    code, out, err = call(world.home, *words)
    assert contents(world.home) == before
    assert code == 2 and all(", read as " in line or line.startswith(("The model as it is fed: ", "format: ")) for line in out.splitlines())
    assert len(err.strip().splitlines()) == 1 and err.strip().startswith("expunge: ")
    assert message in err


def test_every_setting_can_be_given_though_an_option_has_its_name(world, tmp_path):
    """`--retain` names a file; npo's own `retain` is `--npo.retain`. The same holds wherever an option of the command hides a setting."""
    options = set(inspect.signature(flags.forget).parameters)
    hidden = [(m.name, s) for m in METHODS.values() for s in m.defaults if s in options]
    assert ("npo", "retain") in hidden and ("influence", "form") in hidden
    for name, setting in hidden:
        value = METHODS[name].defaults[setting]
        assert flags.settings(name, [f"--{name}.{setting.replace('_', '-')}", str(value)])[setting] == value
    code, out, err = call(world.home, *FORGET, *NPO, "--npo.retain", "none", "--json", "--out", str(tmp_path / "own"))
    assert code in (0, 1), err
    (one,) = strict(out)["tries"]
    assert (one["outcome"], one["settings"]["retain"]) == ("ok", "none")


def test_shadow_models_of_texts_work_or_are_refused_in_one_line(world, done):
    common = ("audit", *TEXTS, "--forget", "forget.jsonl", *RETAIN, "--test", "test.jsonl", "--patch", "done/latest/patch.safetensors", "--quick", "--json")
    code, out, err = call(world.home, *common, "--shadows", "4", "--training", "epochs=1 batch_size=16 lr=0.01", "--unlearn-shadows", "2")
    assert code in (0, 1, 2)
    assert strict(out) if code < 2 else len(err.strip().splitlines()) == 1


def test_auto_takes_the_chat_template_where_there_is_one(world):
    files = {"forget": str(world.home / "forget.jsonl"), "test": str(world.home / "test.jsonl")}
    for folder, expected in (("chatty", "chat"), ("base", "plain")):
        model, tokenizer, task, split = texts.prepare(world.home / folder, files)
        assert split.forget.format.template == expected
        assert tokenizer.decode(split.forget.tokens[0]).startswith({"chat": "User: ", "plain": "Question: "}[expected])
        assert split.forget.format.max_length == 256 and task.name == "causal_lm" and model.training is False
        assert (len(split.test), len(split.validation)) == (3, 1)
        split.check()
