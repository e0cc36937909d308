"""Folders of diffusers pipelines: in, edited, out, and back; on random weights at a small size, of one and of two text encoders."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner
from worlds import copied, same, state

from expunge.audits.core import Probe, audit
from expunge.audits.pictures import redirection
from expunge.cli.app import app
from expunge.core.edits import LowRank, Replace
from expunge.core.errors import DataError, ExpungeError, ModelError, PatchError, ReportError, SettingError
from expunge.core.hooks import Guarded
from expunge.core.patch import Patch
from expunge.engine.run import Attempt, unlearn
from expunge.modalities.diffusion import pipelines, tiny_pipeline
from expunge.modalities.diffusion import release as adapters
from expunge.modalities.diffusion import request as cli_images
from expunge.modalities.diffusion import request as images
from expunge.modalities.diffusion.task import states
from expunge.parts.adapters import adapt
from expunge.parts.training import fresh
from expunge.planning.outcome import patched

PASSES = ("--method", "uce", "--tokens", "tail", "--lam", "0.001")
"""Settings that redirect a pipeline of random weights."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A pipeline with one text encoder, and one with two."""
    root = tmp_path_factory.mktemp("pipelines")
    return {xl: tiny_pipeline.pipeline(root / f"xl{int(xl)}", xl=xl) for xl in (False, True)}


@pytest.fixture(scope="module")
def loaded(folders):
    return {xl: pipelines.load(folder) for xl, folder in folders.items()}


@pytest.fixture
def twin(folders, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(folders[False], tmp_path / "pipe")


def real(folder, xl):
    """The same folder in plain diffusers."""
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline

    with pipelines.quietly():
        return (StableDiffusionXLPipeline if xl else StableDiffusionPipeline).from_pretrained(folder, **({} if xl else {"safety_checker": None}))


def encoded(pipe, prompts):
    """What diffusers makes of prompts: states with and without them, and of XL the pooled ones."""
    return pipe.encode_prompt(prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)


def predicted(pipe, prompts, xt, t):
    """What plain diffusers predicts."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, more = encoded(pipe, prompts), {}
        if hasattr(pipe, "text_encoder_2"):
            sizes = pipe._get_add_time_ids((16, 16), (0, 0), (16, 16), dtype=torch.float32, text_encoder_projection_dim=24)
            more = {"added_cond_kwargs": {"text_embeds": theirs[2], "time_ids": sizes.expand(2, -1)}}
        return pipe.unet(xt, t, encoder_hidden_states=theirs[0], **more).sample


@pytest.mark.parametrize("xl", [False, True])
def test_prompts_times_and_predictions_are_those_of_diffusers(folders, loaded, xl):
    found, pipe, prompts = loaded[xl], real(folders[xl], xl), ["a cat", "Van Gogh, in detail"]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = encoded(pipe, prompts)
        mine, null = states(found.model, found.encode(prompts)), states(found.model, found.task.null[None])
        assert torch.equal(mine[:, :-1] if xl else mine, theirs[0]) and torch.equal((null[:, :-1] if xl else null)[0], theirs[1][0])
        torch.testing.assert_close(found.task.schedule.abar, pipe.scheduler.alphas_cumprod)
        xt, t = torch.randn(2, *found.task.shape, generator=torch.Generator().manual_seed(0)), torch.tensor([900.0, 20.0])
        wanted = predicted(pipe, prompts, xt, t)
        batch = {"xt": xt, "t": t, "y": found.encode(prompts), "i": torch.arange(2)}
        torch.testing.assert_close(found.task.forward(found.model, batch).pred, wanted, rtol=1e-5, atol=1e-6)


def test_drawings_are_images_that_follow_from_the_seed(loaded):
    found = loaded[False]
    asked = images.prompts(found, ["a cat"], ["{}", "a photo of {}"])
    one, two, other = (found.task.sample(found.model, asked, steps=2, seed=s) for s in (0, 0, 1))
    assert one.shape == (2, 3, 16, 16) and float(one.abs().max()) <= 1
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_a_concept_is_redirected_by_one_text_encoder(loaded):
    """Small and entangled: what it may cost is the gate's to say."""
    found = loaded[False]
    split = images.request(found, "Van Gogh", "painting", "a cat,a dog")
    attempt = unlearn("uce", found.model, found.task, split, tokens="tail", lam=0.001)
    rows = {r.name: r for r in audit(Probe(found.model, patched(found.model, attempt), found.task, split), ["redirection"])}
    assert rows["redirection.left"].value < 0.5 and rows["redirection.left"].n == redirection.PROMPTS


def test_a_concept_is_redirected_and_the_folder_loads_in_plain_diffusers(folders, tmp_path, loaded, monkeypatch):
    """What comes out of the command differs from what went in by cross-attention's keys and values alone; apply and revert give every bit back."""
    monkeypatch.setattr("expunge.report.pictures.pictures", lambda *_: {})
    monkeypatch.setattr("expunge.report.html.write", lambda *_: None)
    out, run = tmp_path / "out", CliRunner()
    asked = ["--task", "diffusion", "--model", str(folders[True]), "--concept", "Van Gogh", "--anchor", "painting"]
    done = run.invoke(app, ["forget", *asked, *PASSES, "--quick", "--out", str(out), "--json"])
    out = out / "latest"
    document = json.loads(done.stdout)
    assert done.exit_code == 0, done.output
    rows = {r["name"]: r for r in document["tries"][0]["rows"]}
    assert rows["redirection.left"]["value"] < 0.5 and rows["redirection.left"]["n"] == redirection.PROMPTS
    assert document["verdict"]["passed"], document["verdict"]
    before, after = (real(f, True) for f in (folders[True], out / "released"))
    changed = {n for (n, a), b in zip(before.unet.state_dict().items(), after.unet.state_dict().values(), strict=True) if not torch.equal(a, b)}
    assert changed and all("attn2.to_k" in n or "attn2.to_v" in n for n in changed)
    for name in ("vae", "text_encoder", "text_encoder_2"):
        a, b = (getattr(p, name).state_dict() for p in (before, after))
        assert a.keys() == b.keys() and all(torch.equal(v, b[n]) for n, v in a.items())
    applied = run.invoke(app, ["apply", str(out / "patch.safetensors"), "--model", str(folders[True]), "--out", str(tmp_path / "applied")])
    assert applied.exit_code == 0, applied.output
    undo = ["revert", str(tmp_path / "applied.undo.safetensors"), "--model", str(tmp_path / "applied"), "--out", str(tmp_path / "back")]
    assert run.invoke(app, undo).exit_code == 0
    for folder, equal in (("applied", False), ("back", True)):
        now = pipelines.load(tmp_path / folder).model.state_dict()
        assert all(torch.equal(v, now[n]) for n, v in loaded[True].model.state_dict().items()) == equal
    told = run.invoke(app, ["audit", *asked, "--after", str(tmp_path / "applied"), "--quick", "--json"])
    assert told.exit_code == 0, told.output
    held = ["audit", "--check", str(out / "report.json"), "--patch", str(out / "patch.safetensors"), "--model"]
    told = run.invoke(app, [*held, str(tmp_path / "back"), "--after", str(tmp_path / "applied")])
    assert told.exit_code == 0 and told.stdout.count("match: ") == 4, told.output
    told = run.invoke(app, [*held, str(tmp_path / "back"), "--after", str(folders[True])])
    assert isinstance(told.exception, ReportError) and told.stdout.count("differs: ") == 1, told.output


def test_redirection_reads_nothing_done_and_a_foreign_model(loaded):
    """As before: everything left, nothing moved. Newly drawn weights: retained prompts moved by more than their own effect."""
    found = loaded[False]
    split = images.request(found, "Van Gogh", "painting", "a cat,a dog")
    one, new = ({r.name: r.value for r in audit(Probe(found.model, m, found.task, split), ["redirection"])} for m in (found.model, fresh(found.model, 1)))
    assert one["redirection.left"] == pytest.approx(1) and one["redirection.shift"] == 0
    assert new["redirection.shift"] > 1


@pytest.mark.parametrize("name", ["esd", "concept_ablation", "rece"])
def test_other_methods_run_on_a_pipeline(loaded, name):
    found = loaded[True]
    split = images.request(found, "Van Gogh", "painting", "a cat,a dog")
    attempt = unlearn(name, found.model, found.task, split, **(FEW if name != "rece" else {}))
    assert attempt.outcome == "ok", attempt.reason
    now = patched(found.model, attempt).state_dict()
    assert {n.split(".")[0] for n, v in found.model.state_dict().items() if not torch.equal(v, now[n])} == {"unet"}


FEW = {"steps": 2, "batch_size": 2, "trajectories": 5, "path": 2}
LAYERS = ("attn2.to_q", "attn2.to_k", "attn1.to_out.0", "mid_block.attentions.0.proj_in", "conv_in", "self_attn.q_proj", "mlp.fc1")
"""Linear layers and convolutions of the unet, and layers of the text encoders."""


def low(model, seed=0):
    """A made-up patch on LAYERS, of ranks and scales that differ from layer to layer."""
    g, edits = torch.Generator().manual_seed(seed), []
    for name, p in model.named_parameters():
        if name.removesuffix(".weight").endswith(LAYERS) and p.ndim > 1:
            r = 1 + len(edits) % 3
            up, down = torch.randn(len(p), r, generator=g), torch.randn(r, p[0].numel(), generator=g) / p[0].numel()
            edits.append(LowRank(name, up, down, (0.5, 2.0)[len(edits) % 2]))
    return Patch(tuple(edits)).stamped(model, method="made up")


def apart(model, found, pipe):
    """Largest difference between what a model here and a pipeline of diffusers predict, and how large the predictions are."""
    prompts, xt = ["a cat", "Van Gogh, in detail"], torch.randn(2, *found.task.shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([900.0, 20.0])
    with torch.no_grad():
        mine = found.task.forward(model, {"xt": xt, "t": t, "y": found.encode(prompts), "i": torch.arange(2)}).pred
    theirs = predicted(pipe, prompts, xt, t)
    return float((mine - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("xl", [False, True])
def test_low_rank_weights_are_a_lora_of_plain_diffusers(folders, loaded, xl, tmp_path):
    """Linear layers, convolutions and text encoders, of any rank and scale, say the same there as the patch does here; the model is left as it was."""
    found, patch = loaded[xl], low(loaded[xl].model)
    assert {e.name.split(".")[0] for e in patch.edits} == {"unet", "text_encoder", *(["text_encoder_2"] if xl else [])}
    before, twin = state(found.model), copied(found.model)
    out = adapters.release(found, found.model, patch, tmp_path / "lora", form="auto")
    assert same(before, state(found.model)) and [f.name for f in out.iterdir()] == ["pytorch_lora_weights.safetensors"] and adapters.is_adapter(out)
    patch.apply(twin)
    pipe = real(folders[xl], xl)
    assert apart(twin, found, pipe) > 1e-2
    with pipelines.quietly():
        pipe.load_lora_weights(out)
    assert apart(twin, found, pipe) < 1e-5
    pipe.unload_lora_weights()
    assert apart(found.model, found, pipe) < 1e-5


@pytest.fixture(scope="module")
def spm(loaded):
    found = loaded[False]
    attempt = unlearn("spm", found.model, found.task, images.request(found, "Van Gogh", "painting", "a cat,a dog"), **FEW, lr=0.1)
    assert attempt.outcome == "ok", attempt.reason
    return attempt.patch


def test_an_spm_without_its_gate_is_a_lora(folders, loaded, spm, tmp_path):
    """Plain diffusers predicts what the adapter does at gamma = 1, for a retained prompt too, which the gate keeps to the bit."""
    found, twin = loaded[False], copied(loaded[False].model)
    out, pipe = adapters.release(found, found.model, spm, tmp_path, form="ungated"), real(folders[False], False)
    with pipelines.quietly():
        pipe.load_lora_weights(out)
    it = Guarded(spm.edits[0], now={"weight": torch.ones(1)})
    adapt(twin, it)
    assert apart(twin, found, pipe) < 1e-5 < 1e-3 < apart(found.model, found, pipe)


def test_an_spm_is_a_file_that_fits_other_weights(loaded, spm, tmp_path):
    """Read back it is the guard, bit for bit; the patch is for one base, the file for all of its shapes."""
    found, twin, other = loaded[False], copied(loaded[False].model), copied(loaded[False].model)
    out = adapters.release(found, found.model, spm, tmp_path / "spm", form="adapter", key=b"k")
    read = Patch.load(out / "spm.safetensors", b"k")
    assert adapters.is_adapter(out) and read.digest == spm.digest and read.meta == {n: v for n, v in spm.meta.items() if n != "base"}
    asked = {"xt": torch.randn(2, *found.task.shape, generator=torch.Generator().manual_seed(0)), "t": torch.tensor([900.0, 20.0]), "i": torch.arange(2)}
    asked["y"] = found.encode(["Van Gogh", "a cat"])
    with torch.no_grad():
        read.apply(twin)
        spm.apply(copy := copied(found.model))
        now, before = found.task.forward(twin, asked).pred, found.task.forward(found.model, asked).pred
        assert torch.equal(now, found.task.forward(copy, asked).pred) and not torch.equal(now[0], before[0])
        next(other.parameters()).add_(1.0)
        with pytest.raises(PatchError, match="was made for base"):
            spm.apply(other)
        read.apply(other)
    with pytest.raises(PatchError, match="not signed by this key"):
        Patch.load(out / "spm.safetensors", b"another")


def test_forms_that_a_patch_has_not(loaded, spm, tmp_path):
    found = loaded[False]
    name, p = next(iter(found.model.named_parameters()))
    whole = Patch((Replace(name, p.detach() + 1),))
    for patch, form, said in (
        (whole, "adapter", "replaces weights, it is no adapter: use form=merged, or run esd or concept_ablation with lora=8, or spm"),
        (whole, "ungated", "this patch holds none"),
        (whole, "peft", "form must be one of auto, merged, adapter, ungated"),
        (spm, "auto", "changes no weight: there is nothing to write"),
        (spm, "merged", "changes no weight: there is nothing to write"),
        (Patch((*spm.edits, *whole.edits)), "adapter", "only an SPM by itself is an adapter: this patch holds 2 edits"),
        (Patch((replace(spm.edits[0], kind="refuse"),)), "ungated", "a guard of the kind refuse"),
    ):
        with pytest.raises(ModelError, match=said):
            adapters.release(found, found.model, patch, tmp_path / "none", form=form)
    assert not (tmp_path / "none").exists()
    with pytest.raises(PatchError, match="was made for base"):
        adapters.release(found, found.model, replace(low(found.model), meta={"base": "0" * 64}), tmp_path / "none")


def test_a_low_rank_patch_merged_and_taken_out_again(folders, loaded, tmp_path):
    """The same patch as a whole folder: the inverse beside it gives every bit back; an adapter's pipeline never changed, and says so."""
    patch = low(loaded[False].model)
    written = cli_images.apply(patch, str(folders[False]), str(tmp_path / "whole"), None, {"dtype": "auto", "form": "merged"})
    assert written == [str(tmp_path / "whole"), str(tmp_path / "whole.undo.safetensors")]
    assert apart(patched(loaded[False].model, Attempt("", {}, 0, "ok", "", patch)), loaded[False], real(tmp_path / "whole", False)) < 1e-5
    cli_images.revert(Patch.load(written[1]), written[0], str(tmp_path / "back"), {})
    assert same(state(pipelines.load(tmp_path / "back").model), state(loaded[False].model))
    written = cli_images.apply(patch, str(folders[False]), str(tmp_path / "lora"), None, {"dtype": "auto", "form": "auto"})
    assert written == [str(tmp_path / "lora")] and cli_images.is_pipeline(written[0])
    with pytest.raises(ModelError, match="lora is an adapter: its pipeline was never changed"):
        cli_images.revert(patch, written[0], str(tmp_path / "none"), {})


@pytest.mark.parametrize("name", ["esd", "concept_ablation"])
def test_what_methods_leave_is_released_as_an_adapter(folders, loaded, name, tmp_path):
    """lora=2 gives a LoRA that plain diffusers loads; the same as a whole folder; a guard in no form of its own is not written."""
    found = loaded[False]
    attempt = unlearn(name, found.model, found.task, images.request(found, "Van Gogh", "painting", "a cat,a dog"), **FEW, lora=2)
    passed = SimpleNamespace(chosen=SimpleNamespace(attempt=attempt))
    pipe, twin = real(folders[False], False), patched(found.model, attempt)
    with pipelines.quietly():
        pipe.load_lora_weights(images.released(passed, found, tmp_path / "lora"))
    assert apart(twin, found, pipe) < 1e-5 < apart(found.model, found, pipe)
    assert apart(twin, found, real(images.released(passed, found, tmp_path / "whole", form="merged"), False)) < 1e-5


def test_a_guard_that_passed_is_released_when_a_form_is_named(loaded, spm, tmp_path):
    passed = SimpleNamespace(chosen=SimpleNamespace(attempt=Attempt("spm", {}, 0, "ok", "", spm)))
    assert images.released(passed, loaded[False], tmp_path / "a") is None and not (tmp_path / "a").exists()
    assert (images.released(passed, loaded[False], tmp_path / "a", form="adapter") / "spm.safetensors").is_file()


def test_the_command_applies_a_patch_as_an_adapter(folders, loaded, tmp_path):
    low(loaded[False].model).save(tmp_path / "patch.safetensors")
    asked = ["apply", str(tmp_path / "patch.safetensors"), "--model", str(folders[False]), "--out", str(tmp_path / "lora"), "--json", "--form"]
    done = CliRunner().invoke(app, [*asked, "adapter"])
    assert done.exit_code == 0 and json.loads(done.stdout)["written"] == [str(tmp_path / "lora")], done.output
    assert "form must be one of auto, merged, adapter, ungated" in str(CliRunner().invoke(app, [*asked, "peft"]).exception)


def test_a_pipeline_saved_under_its_own_name_is_refused(loaded):
    with pytest.raises(ModelError, match="is the folder that was read"):
        pipelines.save(loaded[False], copied(loaded[False].model), loaded[False].folder)


def rewrite(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


DAMAGES = {
    "is a KandinskyPipeline; StableDiffusionPipeline and StableDiffusionXLPipeline can be read": lambda f: rewrite(
        f / "model_index.json", _class_name="KandinskyPipeline"
    ),
    "pipe has no text encoder: its folder 'text_encoder' is missing": lambda f: shutil.rmtree(f / "text_encoder"),
    "is a pickle, which can run code": lambda f: (f / "unet" / "diffusion_pytorch_model.safetensors").rename(f / "unet" / "diffusion_pytorch_model.bin"),
    "cannot read model_index.json": lambda f: (f / "model_index.json").write_text("{"),
    "model_index.json of pipe is larger than": lambda f: (f / "model_index.json").write_text(" " * (pipelines.MAX_BYTES + 1)),
    "holds no model_index.json": lambda f: (f / "model_index.json").unlink(),
    "prediction type 'sample' is not known": lambda f: rewrite(f / "scheduler" / "scheduler_config.json", prediction_type="sample"),
    "beta schedule 'odd' is not known": lambda f: rewrite(f / "scheduler" / "scheduler_config.json", beta_schedule="odd"),
    "cannot load text_encoder of pipe: Error while deserializing": lambda f: (f / "text_encoder" / "model.safetensors").write_bytes(b"12345678"),
    "cannot load unet": lambda f: (f / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"12345678"),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_damaged_folders_are_refused_by_name(twin, message):
    DAMAGES[message](twin)
    with pytest.raises(ModelError, match=message):
        pipelines.load(twin)


def test_half_precision_needs_a_gpu(folders):
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="float16 arithmetic needs a GPU"):
            pipelines.load(folders[False], dtype="float16")
    with pytest.raises(ModelError, match="dtype must be one of"):
        pipelines.load(folders[False], dtype="int8")
    assert pipelines.load(folders[False], dtype="bfloat16").model.unet.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("concept", "anchor", "retain", "error", "message"),
    [
        ("", "", "", SettingError, "no concept"),
        ("Van Gogh", " van gogh", "", SettingError, "the anchor is the concept itself"),
        ("Van Gogh", "painting", "a cat,van gogh", SettingError, "also stands among the concepts to keep"),
        ("Van Gogh" * 20, "", "", DataError, "at most 46 fit"),
        ("Van Gogh", "", "@nowhere.txt", DataError, "cannot read nowhere.txt"),
    ],
)
def test_requests_that_cannot_be_met(loaded, concept, anchor, retain, error, message):
    with pytest.raises(error, match=message):
        images.request(loaded[False], concept, anchor, retain)


def test_a_prompt_without_tokens_is_refused(loaded):
    with pytest.raises(DataError, match="has no token"):
        loaded[False].encode(["   "])


def test_concepts_come_from_a_file_too(loaded, tmp_path):
    (tmp_path / "kept.txt").write_text("a cat\n\n a dog \n")
    split = images.request(loaded[False], "Van Gogh", "", f"@{tmp_path / 'kept.txt'}")
    assert {r["concept"] for r in split.retain.rows} == {"a cat", "a dog"} and split.anchor is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "diffusion", "--forget", "x"], "write --concept in place of --forget"),
        (["--concept", "x", "--train", "digits"], "--concept is for --task diffusion"),
        (["--train", "digits"], "what must go is missing"),
        (["--task", "diffusion", "--concept", "x", "--form", "peft"], "form must be one of auto, merged, adapter, ungated"),
        (["--task", "diffusion", "--concept", "x", "--general", "g.jsonl"], "--general is not for diffusion models (--task diffusion)"),
    ],
)
def test_options_of_the_command(arguments, message):
    result = CliRunner().invoke(app, ["forget", "--model", "py:nowhere:f", *arguments])
    assert isinstance(result.exception, ExpungeError) and message in str(result.exception)


def test_libraries_speak_again_afterwards():
    before = logging.getLogger("transformers").level
    with pipelines.quietly():
        assert logging.getLogger("transformers").level == logging.ERROR
    assert logging.getLogger("transformers").level == before
