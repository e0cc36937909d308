"""Models as users have them: what is fed is what the model wants, weights are named, and a model near chance stops before anything runs."""

from __future__ import annotations

import json
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from expunge.core.errors import DataError, ModelError, SettingError
from expunge.core.modality import Request, named
from expunge.modalities.files import feeding, models, readers, requests
from expunge.modalities.files.feeding import Feed
from expunge.parts.training import train
from expunge.planning import sanity

transformers = pytest.importorskip("transformers")
NAMES = ("ant", "bee", "cat")


def picture(kind, seed, side=12):
    """A dim picture, bright stripes of one of three directions in noise: told apart by stripes, not by brightness."""
    g = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]
    wave = np.sin(2 * np.pi * ((x, y, x + y)[kind] / 4 + g.random()))
    return Image.fromarray(np.clip(40 + 20 * wave[..., None] + g.normal(0, 6, (side, side, 3)), 0, 255).astype(np.uint8))


def folder_of(place, classes=NAMES, n=20, start=0):
    for k, name in enumerate(classes):
        (place / name).mkdir(parents=True)
        for i in range(n):
            picture(k, 1000 * k + i + start).save(place / name / f"{i}.png")


def vit(names=NAMES, side=8):
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=side, patch_size=4, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, id2label=dict(enumerate(names)), label2id={n: k for k, n in enumerate(names)},
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


CONFIG = {"do_resize": True, "size": {"height": 8, "width": 8}, "resample": 2, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
          "image_mean": [0.16, 0.16, 0.16], "image_std": [0.07, 0.07, 0.07], "image_processor_type": "ViTImageProcessor"}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """An image folder, a test folder, and a trained ViT beside its preprocessor_config.json; its class numbers are not those of the folder."""
    place = tmp_path_factory.mktemp("vit")
    folder_of(place / "train", n=30)
    folder_of(place / "test", n=12, start=500)
    order = ("cat", "ant", "bee")
    net = vit(order)
    data = readers.load("images:train", "classification", place, feed=feeding.hugging(CONFIG), classes=order)
    train(net, named("classification").task(), data, epochs=25, batch_size=15, seed=0, lr=4e-3, optimizer="adamw")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net.save_pretrained(place / "model")
    (place / "model" / "preprocessor_config.json").write_text(json.dumps(CONFIG))
    return place


def asked(home, model="model", what="class:cat", **options):
    modality = named("classification")
    given = {o.name: o.default for o in modality.options} | {"train": "images:train", "test": "images:test"} | options
    return modality.open(Request(model, what, given, folder=home))


def test_what_is_fed_is_what_the_model_wants(home):
    opened = asked(home)
    seen = sanity.checked(opened.model, opened.task, opened.split)
    assert seen.levels["retain"].value > 0.9 and seen.levels["test"].value > 0.8
    assert opened.split.forget.y.unique().tolist() == [0]  # cat is 0 in the model, 2 in the folder
    text = " ".join(opened.read)
    assert "forget class:cat: class 0 (cat), 30 of 90 records" in text and "preprocessing by preprocessor_config.json: size 8x8" in text
    assert seen.line.startswith("The model as it is fed: accuracy")


def test_a_model_that_is_fed_wrongly_stops_before_anything_runs(home):
    opened = asked(home, mean="0", std="1")
    with pytest.raises(ModelError, match=r"the model is near chance on kept records \(accuracy .*--anyway goes on"):
        sanity.checked(opened.model, opened.task, opened.split)
    assert sanity.checked(opened.model, opened.task, opened.split, anyway=True).fault


def test_a_folder_without_preprocessing_asks_for_it(home, tmp_path):
    net = vit()
    net.save_pretrained(tmp_path / "bare")
    with pytest.raises(SettingError, match=r"no preprocessor_config.json, so nothing says how it wants pixels; name --mean"):
        asked(home, model=str(tmp_path / "bare"))


def test_classes_that_are_numbered_otherwise_are_noticed(home):
    opened = asked(home)
    with torch.no_grad():
        opened.model.config.id2label = {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}  # the folder's own order then: ant, bee, cat
    split = requests.split(
        Request(str(home / "model"), "class:ant", {**_options(), "train": "images:train", "test": "images:test"}, folder=home), "classification", opened.model
    )
    with pytest.raises(ModelError, match=r"numbers its classes otherwise than the data: accuracy on the training data would be .*1 \(bee\) is its 2"):
        sanity.checked(opened.model, opened.task, split)


def _options():
    return {o.name: o.default for o in named("classification").options}


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        {
            **CONFIG,
            "size": {"shortest_edge": 10},
            "do_center_crop": True,
            "crop_size": {"height": 8, "width": 7},
            "resample": 3,
            "image_processor_type": "BitImageProcessor",
            "do_convert_rgb": True,
        },
        {**CONFIG, "size": {"shortest_edge": 14}, "crop_pct": 0.875, "image_processor_type": "ConvNextImageProcessor"},
        {**CONFIG, "do_resize": False, "do_normalize": False},
    ],
    ids=["vit", "bit", "convnext", "as-is"],
)
def test_pixels_are_fed_as_transformers_own_processor_feeds_them(tmp_path, config):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (19, 26, 3)).astype(np.uint8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path)(image, return_tensors="pt")["pixel_values"][0]
    ours = torch.from_numpy(feeding.fed(image, 255.0, feeding.wanted(None, tmp_path), "a"))
    assert ours.shape == theirs.shape and torch.allclose(ours, theirs, atol=1e-5)


def test_steps_that_are_not_followed_are_refused(tmp_path):
    with pytest.raises(DataError, match="asks for do_pad, which is not followed"):
        feeding.hugging({**CONFIG, "do_pad": True})
    with pytest.raises(DataError, match="values out of range"):
        feeding.hugging({**CONFIG, "image_std": [0.0, 1.0, 1.0]})
    with pytest.raises(DataError, match="mean and std belong together"):
        feeding.given({"mean": "0.5"}, Feed())
    for odd in ({"mean": "x", "std": "1"}, {"mean": "0", "std": "0"}, {"size": "0"}, {"size": "8x8x8"}, {"size": "9" * 400}, {"channels": "4"}):
        with pytest.raises(DataError, match="must be"):
            feeding.given(odd, Feed())


def test_a_timm_config_is_followed():
    net = nn.Linear(2, 2)
    net.pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.5, 0.5), "interpolation": "bilinear", "crop_pct": 0.8}
    feed = feeding.wanted(net)
    x = feeding.fed(Image.new("RGB", (20, 30), (255, 0, 0)), 255.0, feed, "a")
    assert feed.size == (10,) and x.shape == (3, 8, 8)
    assert np.allclose(x[:, 0, 0], [(1 - 0.1) / 0.5, -0.2 / 0.5, -0.3 / 0.5])


def test_a_timm_model_by_name(monkeypatch):
    made = []
    fake = type(sys)("timm")
    fake.create_model = lambda name, pretrained, **settings: made.append((name, pretrained, settings)) or nn.Linear(2, settings["num_classes"])
    monkeypatch.setitem(sys.modules, "timm", fake)
    assert models.load("timm:resnet18?num_classes=3").out_features == 3
    assert made == [("resnet18", False, {"num_classes": 3})]
    with pytest.raises(ModelError, match="takes num_classes, in_chans and img_size"):
        models.load("timm:resnet18?pretrained=1")


def test_forgotten_weights_are_no_random_network(tmp_path):
    (tmp_path / "somenet.py").write_text("from torch import nn\ndef build():\n    return nn.Linear(64, 10)\n")
    with pytest.raises(SettingError, match=r"--weights is missing: py:somenet:build alone gives a network whose numbers are drawn at random"):
        requests.load(Request("py:somenet:build", "class:3", _options(), folder=tmp_path))
    assert models.chosen("py:somenet:build", "none") == ""


def test_a_folder_that_lacks_its_head_is_refused(home, tmp_path):
    from safetensors.torch import load_file, save_file

    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((home / "model" / name).read_bytes())
    state = load_file(tmp_path / "model.safetensors")
    save_file({n: v for n, v in state.items() if not n.startswith("classifier")}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"do not fit its model: classifier.bias and 1 more would be drawn at random"):
        models.load(str(tmp_path))
    (tmp_path / "config.json").write_text('{"architectures": ["ViTModel"], "model_type": "vit"}')
    with pytest.raises(ModelError, match="holds ViTModel, no image classifier"):
        models.load(str(tmp_path))


def test_a_swapped_pair_of_classes_is_noticed_and_a_bad_model_is_no_swap():
    y = torch.arange(200) % 10
    swap = torch.tensor([0, 1, 3, 2, 4, 5, 6, 7, 8, 9])
    assert sanity.renumbered(torch.eye(10)[swap[y]], y, ["ant", "bee", "cat", "dog"]) == ((("2 (cat)", "3 (dog)"), ("3 (dog)", "2 (cat)")), 1.0)
    g = torch.Generator().manual_seed(0)
    for answers in (
        torch.eye(10)[y],
        torch.eye(10)[torch.zeros_like(y)],
        torch.randn(200, 10, generator=g),
        torch.eye(10)[y] + torch.randn(200, 10, generator=g),
    ):
        assert sanity.renumbered(answers, y) == ((), 0.0)
