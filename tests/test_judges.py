"""Judges from folders of transformers: what they say, what they refuse, and an audit of a pipeline's drawings; on tiny networks."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from expunge.audits.core import Probe, audit
from expunge.audits.pictures import canvas, drawn
from expunge.audits.verdict import default_rules
from expunge.cli.app import app
from expunge.core.errors import DataError, ExpungeError, ModelError, SettingError
from expunge.engine import run
from expunge.engine.run import unlearn
from expunge.modalities.diffusion import judges, pipelines, tiny_pipeline
from expunge.modalities.diffusion import request as images
from expunge.parts.training import fresh

SMALL = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
LOOK = {**SMALL, "image_size": 16, "patch_size": 8}
ASKED = ("Van Gogh", "painting", "a cat,a dog")
HALF = {"size": {"height": 16, "width": 16}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3, "rescale_factor": 1 / 255}


def rewrite(path, **changes):
    found = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({k: v for k, v in {**found, **changes}.items() if v is not ...}))


def colours() -> nn.Module:
    """A classifier that answers each image with its mean colour: one patch per image, no layer, and the head set by hand."""
    from transformers import CLIPConfig, CLIPForImageClassification

    vision = {**LOOK, "hidden_size": 6, "image_size": 8, "num_hidden_layers": 0}
    model = CLIPForImageClassification(CLIPConfig(text_config=SMALL, vision_config=vision, id2label={0: "red", 1: "green", 2: "blue, azure", 3: "grey_thing"}))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        look = model.vision_model
        for c in range(3):
            look.embeddings.patch_embedding.weight[c, c], look.embeddings.patch_embedding.weight[3 + c, c] = 1 / 64, -1 / 64
        look.pre_layrnorm.weight.fill_(1.0)
        model.classifier.weight[:3, :3] = torch.eye(3)
        model.classifier.bias[3] = 0.5
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny folder of each kind, random but for `colours`; and a pipeline."""
    root = tmp_path_factory.mktemp("judges")
    letters = tiny_pipeline.characters()
    vocab = {c: k for k, c in enumerate([*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"])}
    ends = {"bos_token_id": len(vocab) - 2, "eos_token_id": len(vocab) - 1, "pad_token_id": len(vocab) - 1}
    text = {**SMALL, "vocab_size": len(vocab), "max_position_embeddings": 48, **ends}
    with pipelines.quietly(), torch.random.fork_rng(devices=[]):
        from transformers import (
            CLIPConfig,
            CLIPModel,
            CLIPTokenizer,
            ResNetConfig,
            ResNetForImageClassification,
            SiglipConfig,
            SiglipModel,
            ViTConfig,
            ViTForImageClassification,
            ViTModel,
        )

        torch.manual_seed(0)
        both = {"text_config": text, "vision_config": LOOK, "projection_dim": 8}
        labels = {"id2label": dict(enumerate(("van gogh", "Cat", "dog", "horse", "house")))}
        made = {
            "clip": CLIPModel(CLIPConfig(**both)), "siglip": SiglipModel(SiglipConfig(**both)), "vit": ViTForImageClassification(ViTConfig(**LOOK, **labels)),
            "resnet": ResNetForImageClassification(ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], **labels)),
            "headless": ViTModel(ViTConfig(**LOOK)), "colours": colours(),
        }  # fmt: skip
        for name, model in made.items():
            model.save_pretrained(root / name)
            if name in ("clip", "siglip"):
                CLIPTokenizer(vocab=vocab, merges=[], model_max_length=48).save_pretrained(root / name)
        rewrite(root / "vit" / "preprocessor_config.json", **HALF)
    return {**{name: root / name for name in made}, "pipeline": tiny_pipeline.pipeline(root / "pipeline")}


@pytest.fixture(scope="module")
def loaded(folders):
    return images.prepare(folders["pipeline"], *ASKED)


@pytest.fixture
def twin(folders, tmp_path):
    """A copy of a folder that a test may damage."""
    return lambda name: shutil.copytree(folders[name], tmp_path / name)


def painted(*colour: float, side: int = 8) -> torch.Tensor:
    """(1, 3, side, side) of one colour in [-1, 1]."""
    return torch.tensor(colour).view(1, 3, 1, 1).expand(1, 3, side, side)


def test_a_classifier_set_by_hand_names_colours(folders):
    """Exact words; a colour that was not asked for is something else, and so is one whose own label is larger."""
    usual = judges.USUAL["clip"]
    mean = [2 * v - 1 for v in usual["image_mean"]]  # this grey is 0 in the folder's units
    look = torch.cat([painted(1, -1, -1), painted(-1, 1, -1), painted(-0.2, -0.2, 0.9), painted(*mean)])
    judge = judges.judge(folders["colours"], ["Red", "an azure"])
    assert judge.names == {"concept": ("Red", "an azure", judges.OTHER)} and judge.right == {}
    assert judge.says(look, "concept") == ["Red", judges.OTHER, "an azure", judges.OTHER]
    every = judges.judge(folders["colours"], ["red", "green", "blue, azure", "grey thing"], also=["painting"])
    assert every.says(look, "concept") == ["red", "green", "blue, azure", "grey thing"] and judges.OTHER not in every.names["concept"]
    # one patch of mean colour (r, g, b) in the folder's units, laid out as (r, g, b, -r, -g, -b), and that divided by its length per place
    r, g, b = ((v - m) / s for v, m, s in zip((1.0, 0.0, 0.0), usual["image_mean"], usual["image_std"], strict=True))
    wanted = torch.tensor([r, g, b, -r, -g, -b]) / ((r * r + g * g + b * b) / 3) ** 0.5
    torch.testing.assert_close(judge.features(look[:1], "concept")[0], wanted, rtol=1e-4, atol=1e-4)


def test_zero_shot_words_are_those_of_clip(folders):
    """With one wording the cosines are CLIP's own; with more, those with the mean of the directions."""
    from transformers import AutoTokenizer, CLIPModel

    with pipelines.quietly():
        clip, tokenizer = CLIPModel.from_pretrained(folders["clip"]).eval(), AutoTokenizer.from_pretrained(folders["clip"])
    names, x = ["Van Gogh", "a cat", "a dog", "painting"], torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    judge = judges.judge(folders["clip"], names[:3], also=names[2:])
    assert judge.names == {"concept": tuple(names)} and "zero-shot among 4 names; it has no preprocessor_config.json, so mean 0.481" in judge.about
    model = judge.models["concept"]
    with torch.no_grad():
        said = [tokenizer([w.format(n) for n in names], padding=True, return_tensors="pt") for w in judges.WORDINGS]
        own = [clip(pixel_values=model.lens(x), **s) for s in said]
        mean = nn.functional.normalize(torch.stack([o.text_embeds for o in own]).mean(0), dim=-1)
        torch.testing.assert_close(model.names.weight, mean)
        torch.testing.assert_close(model(x), own[0].image_embeds @ mean.T)
        alone = judges.directions(clip, judges.encoder(folders["clip"], clip), names, ["{}"])
        torch.testing.assert_close(clip.logit_scale.exp() * own[0].image_embeds @ alone.T, own[0].logits_per_image)
        torch.testing.assert_close(judge.features(x, "concept"), own[0].image_embeds)
    assert judge.says(x, "concept") == [names[k] for k in model(x).argmax(1)]


@pytest.mark.parametrize("name", ["siglip", "vit", "resnet"])
def test_other_kinds_look_too(folders, name):
    judge = judges.judge(folders[name], ["Van Gogh", "a cat", "a dog"], also=["painting", "a horse"])
    x = torch.rand(40, 1, 20, 20, generator=torch.Generator().manual_seed(0)) * 2 - 1  # grey, of another size, more than one chunk
    x[0] = torch.nan
    extra = ("painting", "a horse") if name == "siglip" else ("a horse", judges.OTHER)
    assert judge.names["concept"] == ("Van Gogh", "a cat", "a dog", *extra)
    assert set(judge.says(x, "concept")) <= set(judge.names["concept"])
    found = judge.features(x, "concept")
    assert found.shape == (40, {"siglip": 12, "vit": 12, "resnet": 8}[name]) and bool(found.isfinite().all())
    assert ("preprocessor" in judge.about) == (name != "vit")


def test_the_largest_of_all_labels_counts(folders):
    """A classifier's words are those of its own argmax over all labels, with the others as one."""
    from transformers import ViTForImageClassification

    with pipelines.quietly():
        vit = ViTForImageClassification.from_pretrained(folders["vit"]).eval()
    judge = judges.judge(folders["vit"], ["house", "a cat"])
    x = torch.rand(64, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        own = [{4: "house", 1: "a cat"}.get(int(k), judges.OTHER) for k in vit(pixel_values=x).logits.argmax(1)]
    assert judge.says(x, "concept") == own and "the largest of 5 labels" in judge.about


def test_images_are_laid_out_as_the_library_does(tmp_path):
    """Against the processors of transformers that need no torchvision, up to the rounding to bytes between their steps."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    byte = torch.nn.functional.interpolate(torch.rand(1, 3, 9, 7, generator=torch.Generator().manual_seed(0)), size=(90, 70), mode="bilinear").mul(255).byte()
    x = byte.float() / 127.5 - 1
    for name, made in {
        "clip": CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 24}),
        "vit": ViTImageProcessorPil(size={"height": 24, "width": 40}),
        "up": ViTImageProcessorPil(size={"height": 120, "width": 100}, resample=3),
        "convnext": ConvNextImageProcessorPil(size={"shortest_edge": 28}, crop_pct=0.875),
        "large": ConvNextImageProcessorPil(size={"shortest_edge": 384}),
    }.items():
        folder = tmp_path / name
        made.save_pretrained(folder)
        see, said = judges.preprocessing(folder, {}, "")
        theirs = torch.tensor(made([byte[0].numpy()], input_data_format="channels_first")["pixel_values"][0])
        mine = see(x)[0]
        assert said == "" and mine.shape == theirs.shape
        assert float((mine - theirs).abs().max()) < 2 / 255 / min(see.std), name
    rewrite(tmp_path / "vit" / "processor_config.json", image_processor=json.loads((tmp_path / "clip" / "preprocessor_config.json").read_text()))
    (tmp_path / "vit" / "preprocessor_config.json").unlink()
    assert judges.preprocessing(tmp_path / "vit", {}, "")[0].crop == (28, 24)


def test_what_a_folder_does_not_say_is_assumed_and_told(tmp_path):
    see, said = judges.preprocessing(tmp_path, {"vision_config": {"image_size": 336}}, "CLIPModel")
    assert (see.resize, see.crop, see.mode, see.scale) == (336, (336, 336), "bicubic", 1.0) and "336 pixels are assumed" in said
    see, said = judges.preprocessing(tmp_path, {}, "ViTForImageClassification")
    assert (see.resize, see.crop, see.mode) == ((224, 224), None, "bilinear") and see.mean == (0.5,) * 3 and "mean 0.5, std 0.5, 224 pixels" in said
    rewrite(tmp_path / "preprocessor_config.json", do_normalize=False, do_rescale=False, do_resize=False)
    see, said = judges.preprocessing(tmp_path, {"num_channels": 1}, "ViTForImageClassification")
    assert said == "" and see(torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)).flatten().tolist() == [255.0, 127.5]
    with pytest.raises(DataError, match="images of 1 channels, not of 3"):
        see(torch.zeros(1, 3, 4, 4))


SETTINGS = {
    "image_mean that is no finite number": {"image_mean": ["a", 0, 0]},
    "2 numbers in image_mean, and the model 3 channels": {"image_mean": [0.5, 0.5]},
    "image_std that is not above 0": {"image_std": [0.5, 0.5, 0]},
    "has a size of 100000; what is known are numbers of pixels up to 2048": {"size": 100000},
    "has a size of {'longest_edge': 3}": {"size": {"longest_edge": 3}},
    "cuts 64 x 64 pixels from images of 32": {"size": 32, "crop_size": 64, "do_center_crop": True},
    "rescale_factor that is no finite number": {"rescale_factor": True},
    "crop_pct of 2": {"size": 32, "crop_pct": 2},
    "as EfficientNet's does": {"rescale_offset": True},
}


@pytest.mark.parametrize("message", SETTINGS)
def test_settings_of_a_preprocessor_that_are_refused(tmp_path, message):
    rewrite(tmp_path / "preprocessor_config.json", **SETTINGS[message])
    with pytest.raises(ModelError, match=message):
        judges.preprocessing(tmp_path, {}, "ViTForImageClassification")


def shrink(folder):
    """A text encoder of fewer words than the tokenizer has."""
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    name = next(n for n in state if n.endswith("token_embedding.weight"))
    save_file({**state, name: state[name][:500].clone()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())["text_config"]
    rewrite(folder / "config.json", text_config={**config, "vocab_size": 500})


DAMAGES = {
    "vit has no safetensors weights": ("vit", lambda f: (f / "model.safetensors").unlink()),
    r"model.bin is a pickle, which can run code": ("vit", lambda f: (f / "model.safetensors").rename(f / "model.bin")),
    "holds no config.json: it is no folder that save_pretrained of transformers wrote": ("vit", lambda f: (f / "config.json").unlink()),
    "cannot load vit": ("vit", lambda f: (f / "model.safetensors").write_bytes(b"12345678")),
    "model type gpt2": ("vit", lambda f: rewrite(f / "config.json", model_type="gpt2")),
    "holds ViTModel .model type vit.: a judge is a CLIPModel or a SiglipModel, or": ("headless", lambda f: None),
    r"lacks weights of classifier.bias, classifier.weight: a judge is not drawn at random": (
        "headless", lambda f: rewrite(f / "config.json", architectures=["ViTForImageClassification"])
    ),
    "clip has no tokenizer": ("clip", lambda f: [p.unlink() for p in f.glob("tokenizer*")]),
    "cannot load the tokenizer of clip": ("clip", lambda f: (f / "tokenizer.json").write_text("{")),
    "has token 513, and its text encoder knows 500": ("clip", shrink),
    "cannot load vit: Validation error for field 'hidden_size'": ("vit", lambda f: rewrite(f / "config.json", hidden_size="x")),
    "holds no architecture .model type vit.": ("vit", lambda f: rewrite(f / "config.json", architectures=3)),
    "cannot look at an image as its preprocessor makes it": ("vit", lambda f: rewrite(f / "preprocessor_config.json", size=24)),
}  # fmt: skip


@pytest.mark.parametrize("message", DAMAGES)
def test_folders_that_are_no_judge(twin, message):
    name, damage = DAMAGES[message]
    folder = twin(name)
    damage(folder)
    with pytest.raises(ModelError, match=message):
        judges.judge(folder, ["Van Gogh", "a cat"])


def test_no_code_of_a_folder_is_run(twin):
    folder = twin("clip")
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass M: pass\nclass T: pass\n")
    rewrite(folder / "config.json", auto_map={"AutoModel": "evil.M", "AutoConfig": "evil.M"})
    judges.judge(folder, ["Van Gogh", "a cat"])
    rewrite(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]}, tokenizer_class="T")
    judges.judge(folder, ["Van Gogh", "a cat"])
    assert not (folder / "ran").exists()


def test_weights_that_are_not_finite(twin):
    from safetensors.torch import load_file, save_file

    folder = twin("vit")
    state = load_file(folder / "model.safetensors")
    state["classifier.bias"][0] = torch.nan
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"vit holds values of classifier\.bias that are not finite"):
        judges.judge(folder, ["Van Gogh", "a cat"])


@pytest.mark.parametrize(
    ("name", "concepts", "error", "message"),
    [
        ("vit", ["Van Gogh", "a hourse", "snow"], SettingError, r"no label for 'a hourse' \(near: house, horse\); 'snow' \(it has van gogh, cat, dog, ...\)"),
        ("vit", ["a cat", "the Cat"], SettingError, "'a cat' and 'the Cat' are the same label of the judge, Cat"),
        ("vit", ["a cat"], SettingError, "needs two concepts to choose from, not 1"),
        ("clip", ["Sea", "a cat", "sea"], SettingError, "'Sea' and 'sea' are the same to the judge's tokenizer"),
        ("clip", ["a cat", "x" * 60], DataError, "is longer than the 48 tokens that the judge reads"),
        ("nowhere", ["a cat", "a dog"], ModelError, "no folder"),
    ],
)
def test_concepts_that_a_judge_cannot_name(folders, name, concepts, error, message):
    with pytest.raises(error, match=message):
        judges.judge(folders.get(name, Path(name)), concepts)


def test_a_name_of_several_labels_is_refused():
    with pytest.raises(SettingError, match="'crane' is the name of 2 labels of the judge: write one of them whole, crane, bird or crane, machine"):
        judges.chosen(["crane, bird", "crane, machine", "cat"], ["crane", "cat"], [])
    assert judges.chosen(["crane, bird", "crane, machine", "cat"], ["Crane, machine", "cat"], []) == (["Crane, machine", "cat"], [1, 2])


def test_drawings_of_a_pipeline_are_judged(folders, loaded):
    """As many as asked, drawn once and a few at a time, the same as without a judge; the notes say that no image was held out."""
    found, split = loaded
    calls: list[tuple[str, int, int]] = []
    task = images.judged(found, split, folders["vit"], drawings=6, steps=2, progress=lambda *a: calls.append(a))
    p = Probe(found.model, fresh(found.model, 1), task, split)
    rows = {r.name: r for r in audit(p, ["canvas", "hub"])}
    assert (rows["canvas.ua"].n, rows["canvas.ira"].n, rows["canvas.alias"].n) == (6, 12, 6)
    said = task.judge().says(canvas.asked(p).drawn(p, p.before), "concept")
    agreed = sum(a == row["concept"] for a, row in zip(said, canvas.asked(p).prompts.rows, strict=True)) / 18
    assert rows["canvas.ua"].note == (
        f"judge agrees with the prompt on drawings of the model before: concept {agreed:.3f} of 18 (vit: ViTForImageClassification, the largest of 5 labels)"
    )
    assert rows["hub.proportion"].note == f"judge agrees with the prompt on {agreed:.3f} of 18 drawings of the model before"
    assert rows["canvas.ua"].value == pytest.approx(1 - rows["hub.proportion"].value) and "canvas.distance" not in rows and rows["hub.drift"].value > 0
    assert len(calls) == 2 * 2 * (-(-18 // images.BATCH) + -(-6 // images.BATCH)) and calls[9] == ("18 drawings for the judge", 10, 10)
    few = split.forget.take(range(2))
    assert torch.equal(task.sample(found.model, few, seed=3), found.task.sample(found.model, few, seed=3, steps=2, guidance=images.GUIDANCE))
    maps = drawn.collect(p)
    assert maps["named"]["concept"]["names"] == ["Van Gogh", "a cat", "a dog", judges.OTHER] and [r["erased"] for r in maps["retainability"]] == [
        "",
        "Van Gogh",
    ]
    assert maps["grid"][0]["name"] == "Van Gogh" and [r["side"] for r in maps["grid"]] == ["erased", "near", "near"]


def test_a_judge_without_held_out_images_does_not_stand_alone(folders, loaded):
    """The gate reads predictions and drawings; predictions alone where there is no judge; drawings alone with a judge that was tried."""
    found, split = loaded
    task = images.judged(found, split, folders["vit"], drawings=2)
    predicted = {"redirection.left": "<= 0.25", "redirection.shift": "<= 0.1"}
    seen = {"canvas.ua": ">= 0.9", "canvas.alias": "<= 0.2", "canvas.ira_drop": "<= 0.05"}
    tried = replace(task.judge(), right={"concept": torch.ones(3, dtype=torch.bool)})
    for judge, rules in ((None, predicted), (task.judge, {**predicted, **seen}), (lambda: tried, seen)):
        assert default_rules(Probe(found.model, found.model, replace(task, judge=judge), split)) == rules
    alone = replace(split, retain=None)
    assert default_rules(Probe(found.model, found.model, task, alone)) == {"redirection.left": "<= 0.25"}


def test_more_kept_concepts_than_drawings_are_drawn_from_evenly(folders, loaded):
    found, _ = loaded
    split = images.request(found, *ASKED[:2])
    task = images.judged(found, split, folders["clip"], drawings=4)
    names = [row["concept"] for row in canvas.asked(Probe(found.model, found.model, task, split)).prompts.rows]
    kept = list(images.KEPT)
    assert names == ["Van Gogh"] * 4 + [kept[k * len(kept) // 8] for k in range(8)]
    every = canvas.asked(Probe(found.model, found.model, images.judged(found, split, folders["clip"]), split)).prompts
    assert len(every) == 40 + 2 * len(kept) and {row["concept"] for row in every.rows} == {"Van Gogh", *kept}


def test_drawings_that_are_none(folders, loaded):
    with pytest.raises(SettingError, match="at least one drawing to look at, not -1"):
        images.judged(*loaded, folders["vit"], drawings=-1)


def command(folders, *more):
    return ["--task", "diffusion", "--model", str(folders["pipeline"]), "--concept", ASKED[0], "--anchor", ASKED[1], "--retain", ASKED[2], "--quick", *more]


@pytest.mark.parametrize("name", ["vit", "clip"])
def test_the_command_audits_with_a_judge(folders, name):
    asked = command(folders, "--after", str(folders["pipeline"]), "--judge", str(folders[name]), "--drawings", "3", "--json")
    done = CliRunner().invoke(app, ["audit", *asked])
    assert done.exit_code == 1, done.output
    document = json.loads(done.stdout)
    rows = {r["name"]: r for r in document["tries"][0]["rows"]}
    assert rows["canvas.ira_drop"]["value"] == 0 and rows["canvas.ua"]["n"] == 3 and rows["redirection.left"]["value"] == pytest.approx(1)
    assert list(document["rules"]) == ["redirection.left", "redirection.shift", "canvas.ua", "canvas.alias", "canvas.ira_drop"]
    assert f"({name}: " in rows["canvas.ua"]["note"] and not [n for n in rows if n.startswith("prompt_attack")]


def test_the_command_forgets_under_a_judge(folders, tmp_path):
    asked = command(folders, "--method", "uce", "--judge", str(folders["clip"]), "--drawings", "2", "--out", str(tmp_path / "out"), "--json")
    done = CliRunner().invoke(app, ["forget", *asked])
    document = json.loads(done.stdout)
    assert done.exit_code == (0 if document["verdict"]["passed"] else 1), done.output
    rows = {r["name"]: r for r in document["tries"][0]["rows"]}
    assert {"canvas.ua", "hub.proportion", "redirection.left", "canvas.seconds"} <= rows.keys()
    page = (tmp_path / "out" / "latest" / "report.html").read_text()
    assert "What the judge names the drawings" in page and "Retainability" in page


@pytest.mark.slow
def test_attacks_on_prompts_are_judged_too(folders, loaded):
    found, split = loaded
    task = images.judged(found, split, folders["clip"], drawings=2, steps=2)
    rows = {r.name: r for r in audit(Probe(found.model, found.model, task, split), ["prompt_attack"])}
    assert {"prompt_attack.none", "prompt_attack.soft", "prompt_attack.words_before"} <= rows.keys() and rows["prompt_attack.none"].n == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--forget", "class:3", "--train", "digits", "--judge", "x"], "--judge looks at drawings, for --task diffusion"),
        (["--task", "causal-lm", "--forget", "f.jsonl", "--judge", "x"], "--judge looks at drawings, for --task diffusion"),
        (["--task", "diffusion", "--concept", "x", "--drawings", "8"], "--drawings is how many a judge looks at: name one with --judge"),
    ],
)
def test_options_of_the_command(arguments, message):
    for verb in (["forget"], ["audit", "--after", "a"]):
        result = CliRunner().invoke(app, [*verb, "--model", "py:nowhere:f", *arguments])
        assert isinstance(result.exception, ExpungeError) and message in str(result.exception)


def test_memory_of_a_run_on_the_cpu(tmp_path):
    """The peak above the start, in bytes; nothing where the system does not say."""
    held = run.peak(anew=True)
    if not held:
        pytest.skip("this system does not begin the high-water mark anew")
    block = torch.ones(50_000_000)
    del block
    assert 190e6 < run.peak() - held < 300e6
    for there in ({}, {"status": "VmRSS: 3 kB"}, {"status": "VmHWM:"}):
        for name, text in there.items():
            (tmp_path / name).write_text(text)
        assert run.peak(process=tmp_path) == 0
    (tmp_path / "status").write_text("VmHWM:\t   3 kB\n")
    assert run.peak(process=tmp_path) == run.peak(True, tmp_path) == 3072 and (tmp_path / "clear_refs").read_text() == "5"
    (tmp_path / "clear_refs").unlink()
    (tmp_path / "clear_refs").mkdir()
    assert run.peak(True, tmp_path) == 0


def test_memory_is_told_with_where_it_was_read(loaded, monkeypatch):
    found, split = loaded
    attempt = unlearn("uce", found.model, found.task, split)
    assert attempt.cost.get("resident", 0) == attempt.meter.resident >= 0 and "memory" not in attempt.cost
    for cost, note in (({"resident": 2e9}, "above what it held at the start"), ({"memory": 2e9}, "on the GPU")):
        (row,) = canvas.efficiency(cost)
        assert (row.name, row.value) == ("canvas.memory", 2.0) and note in row.note
    monkeypatch.setattr(run, "peak", lambda **_: 0)
    assert "resident" not in unlearn("uce", found.model, found.task, split).cost
