"""Small worlds for tests: trained once per test process, in seconds. Imported as `from worlds import ...`."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from filelock import FileLock
from torch import nn

from expunge.core.types import Split, Task
from expunge.modalities.diffusion import tiny as tiny_diffusion
from expunge.modalities.examples import Examples
from expunge.modalities.gan import tiny as tiny_gan
from expunge.modalities.language.records import format as text
from expunge.modalities.language.records.format import Format
from expunge.modalities.language.task import causal_lm
from expunge.modalities.language.worlds import authors, tiny
from expunge.modalities.language.worlds import build as language
from expunge.modalities.worlds import World, world
from expunge.parts.reading import outputs

FACTORY = "from expunge.modalities.nets import small_cnn\ndef build():\n    return small_cnn(8)\n"
"""A module of a user's, whose `build` makes the digits' network."""


def noise(n: int, scale: float = 1.0) -> Examples:
    """n smooth noise images (1, 8, 8), anchors out of distribution; labels say nothing. An untrained network tells apart none but large ones."""
    g = torch.Generator().manual_seed(3)
    x = nn.functional.interpolate(torch.randn(n, 1, 4, 4, generator=g), size=8, mode="bilinear")
    return Examples(scale * x, torch.zeros(n, dtype=torch.long), 10_000 + torch.arange(n))


@functools.lru_cache
def digits(scenario: str = "class") -> tuple[nn.Module, Task, Split]:
    """A small CNN that memorised 1,000 digits; tests copy or leave it unchanged."""
    w = world("digits")
    return original(w.name), w.task, w.split(scenario)


def trained() -> Path:
    """Where one run of the tests keeps the models that its processes share (see conftest)."""
    return Path(os.environ["EXPUNGE_TESTS"])


def once(w: World, label: str, make: Callable[[Path], nn.Module]) -> nn.Module:
    """The world's model of that label, trained by whichever process asks first."""
    with FileLock(trained() / f"{w.name}-{w.digest}-{label}.lock"):
        return make(trained())


@functools.lru_cache
def original(name: str) -> nn.Module:
    w = world(name)
    return once(w, "original", lambda cache: w.original(0, cache))


@functools.lru_cache
def retrained(name: str, scenario: str, seed: int) -> nn.Module:
    w = world(name)
    return once(w, f"{scenario}-{seed}", lambda cache: w.retrained(scenario, seed, cache))


@functools.lru_cache
def diabetes() -> tuple[nn.Module, Task, Split]:
    """An MLP on scikit-learn's diabetes data; the lowest fifth of targets must go."""
    w = world("diabetes")
    return original(w.name), w.task, w.split("class")


@functools.lru_cache
def small_language(moe: bool = False) -> tuple[nn.Module, Task, Split]:
    """Generated authors and an untrained Llama (or Mixtral) of width 32 with two blocks."""
    rows = authors.authors(8, per=4)
    parts = {"forget": rows[24:28], "retain": rows[:24], "test": rows[28:], "validation": authors.authors(2, per=4, seed=5)}
    form = Format(tiny.tokenizer([*rows, *({"answer": a} for a in authors.refusals())], 400), max_length=128)
    cut = text.split(form, **parts)
    model = (tiny.mixtral if moe else tiny.llama)(len(form.tokenizer), width=32, layers=2, heads=2, seed=1, context=256)
    return model, causal_lm(form.tokenizer), replace(cut, anchor=language.refused(form, cut.forget, authors.refusals()))


@functools.lru_cache
def small_authors(moe: bool = False) -> tuple[nn.Module, Task, Split]:
    """A tiny Llama (or Mixtral) that was taught generated authors until it recalls most of them: some five seconds."""
    w = language.generated("authors-moe" if moe else "authors", n=8, per=6, canon=0, lands=48)
    w = replace(w, recipe={**w.recipe, "epochs": 28 if moe else 40, "batch_size": 8})
    return once(w, "original", lambda cache: w.original(0, cache)), w.task, w.split("forget10")


@functools.lru_cache
def small_pictures() -> tuple[nn.Module, Task, Split]:
    """A small part of the digits' prompts and images, and an untrained diffusion model of few channels."""
    w = world("text2digit")
    split = w.split("object")
    cut = {name: getattr(split, name).take(range(n)) for name, n in {"forget": 16, "anchor": 16, "retain": 48}.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = tiny_diffusion.diffusion_model(w.train.encode.size, widths=(8, 8, 16), context=16)
    return model.eval(), w.task, replace(split, **cut)


@functools.lru_cache
def digit_painter() -> tuple[nn.Module, Task, Split]:
    """A diffusion model that draws digits by name: trained for some ten seconds."""
    w = world("text2digit")
    w = replace(w, recipe={**w.recipe, "epochs": 10, "lr": 4e-3}, build=functools.partial(w.build, widths=(8, 16, 32)))
    return once(w, "original", lambda cache: w.original(0, cache)), w.task, w.split("object")


@functools.lru_cache
def small_gan() -> tuple[nn.Module, Task, Split]:
    """A few digits of each part, and an untrained GAN of few channels."""
    w = world("gan-digits")
    split = w.split("class")
    cut = {name: getattr(split, name).take(range(n)) for name, n in {"forget": 16, "retain": 48, "test": 16, "validation": 16}.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = tiny_gan.gan_model(width=8, classes=10)
    return model.eval(), w.task, replace(split, **cut)


@functools.lru_cache
def digit_forger() -> tuple[nn.Module, Task, Split]:
    """A GAN that draws digits, roughly: trained for some ten seconds."""
    w = world("gan-digits")
    w = replace(w, recipe={**w.recipe, "epochs": 30}, build=functools.partial(tiny_gan.gan_model, width=16, classes=10))
    return once(w, "original", lambda cache: w.original(0, cache)), w.task, w.split("class")


@functools.lru_cache
def small_clip() -> tuple[nn.Module, Task, Split]:
    """A few digits with captions, and an untrained dual encoder of width 16."""
    w = world("clip-digits")
    split = w.split("object")
    cut = {name: getattr(split, name).take(range(n)) for name, n in {"forget": 16, "anchor": 16, "retain": 48, "validation": 32, "test": 32}.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = w.build(width=16, depth=1, space=8)  # pyright: ignore[reportCallIssue]
    return model.eval(), w.task, replace(split, **cut)


@functools.lru_cache
def digit_matcher() -> tuple[nn.Module, Task, Split]:
    """A dual encoder that names digits: trained for some four seconds."""
    w = world("clip-digits")
    w = replace(w, recipe={**w.recipe, "epochs": 12}, build=functools.partial(w.build, width=32, depth=1))
    return once(w, "original", lambda cache: w.original(0, cache)), w.task, w.split("object")


@functools.lru_cache
def small_restorer() -> tuple[nn.Module, Task, Split]:
    """A few digits with holes, and an untrained encoder-decoder."""
    w = holes()
    split = w.split("class")
    cut = {name: getattr(split, name).take(range(n)) for name, n in {"forget": 16, "retain": 64, "test": 64, "validation": 32}.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = w.build()
    return model.eval(), w.task, replace(split, **cut)


@functools.lru_cache
def digit_restorer() -> tuple[nn.Module, Task, Split]:
    """An encoder-decoder that fills holes in digits: trained for some four seconds; of what stays, 300 records are at hand."""
    w = holes()
    w, split = replace(w, recipe={**w.recipe, "epochs": 6, "lr": 5e-3}), w.split("class")
    return once(w, "original", lambda cache: w.original(0, cache)), w.task, replace(split, retain=split.retain.take(range(300)))


@functools.lru_cache
def holes() -> World:
    """The world of both, whose judge is trained once."""
    return world("inpaint-digits")


@functools.lru_cache
def small_topics() -> tuple[nn.Module, Task, Split]:
    """A few sentences of each part, and an untrained BERT of width 32 whose answers differ from text to text; anchors are sentences of other words."""
    w = world("topics")
    split = w.split("class")
    cut = {name: getattr(split, name).take(range(n)) for name, n in {"forget": 16, "retain": 64, "test": 32, "validation": 32}.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = w.build()
    anchor = gibberish(w, 96)
    with torch.no_grad():
        model.classifier.weight.mul_(4)
        model.classifier.bias.sub_(outputs(model, w.task, anchor).quantile(0.8, 0))
    return model.eval(), w.task, replace(split, **cut, anchor=anchor)


@functools.lru_cache
def topic_reader() -> tuple[nn.Module, Task, Split]:
    """A BERT that knows the topics of sentences: trained for some four seconds. One topic must go."""
    w = world("topics")
    w = replace(w, recipe={**w.recipe, "epochs": 15}, build=functools.partial(w.build, width=32, dropout=0.0))
    return once(w, "original", lambda cache: w.original(0, cache)), w.task, replace(w.split("class"), anchor=gibberish(w, 400))


def gibberish(w: World, n: int) -> Examples:
    """n texts of words drawn at random, anchors out of distribution, as wide as those of the world; labels say nothing."""
    g = torch.Generator().manual_seed(3)
    x = {name: t[:n].clone() for name, t in w.train.x.items()}
    words = torch.randint(4, int(w.train.x["input_ids"].max()) + 1, x["input_ids"].shape, generator=g)
    x["input_ids"] = torch.where(x["input_ids"] > 3, words, x["input_ids"])
    return Examples(x, torch.zeros(n, dtype=torch.long), 10_000 + torch.arange(n))


@functools.lru_cache
def small_answers() -> tuple[nn.Module, Task, Split]:
    """A few digits of each part, and an untrained CNN that gives five answers."""
    w = world("digits-multi")
    split = w.split("random")
    cut = {name: getattr(split, name).take(range(n)) for name, n in {"forget": 16, "retain": 64, "test": 32, "validation": 32}.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = w.build()
    return model.eval(), w.task, replace(split, **cut)


@functools.lru_cache
def answerer() -> tuple[nn.Module, Task, Split]:
    """A CNN that knows five answers to a thousand digits by heart: trained for some three seconds. All threes must go."""
    w = world("digits-multi")
    return original(w.name), w.task, w.split("digit")


OTHERS: dict[str, tuple[Callable, Callable]] = {
    "text_classification": (small_topics, topic_reader),
    "multilabel": (small_answers, answerer),
    "diffusion": (small_pictures, digit_painter),
    "gan": (small_gan, digit_forger),
    "contrastive": (small_clip, digit_matcher),
    "image_to_image": (small_restorer, digit_restorer),
}
"""Task -> its untrained model with few records, and its trained one."""


def toy(task_name: str, moe: bool = False) -> tuple[nn.Module, Task, Split]:
    """The world of a task; that of `classification` has anchors."""
    if task_name in OTHERS:
        return OTHERS[task_name][1]()
    if task_name == "causal_lm":
        return small_authors(moe)
    if task_name != "classification":
        return diabetes()
    model, task, split = digits()
    return model, task, replace(split, anchor=noise(400))


def small(task_name: str, moe: bool = False, kind: str = "class") -> tuple[nn.Module, Task, Split]:
    """An untrained network with batch norm and dropout and 64 + 16 + 32 + 32 records: laws that need no memory run here in milliseconds."""
    if task_name == "causal_lm":
        model, task, split = small_language(moe)
        return copy.deepcopy(model), task, split
    if task_name in OTHERS:
        model, task, split = OTHERS[task_name][0]()
        if task_name == "text_classification" and kind == "records":
            some = world("topics").split("random")
            split = replace(split, forget=some.forget.take(range(16)), retain=some.retain.take(range(64)))
        return copy.deepcopy(model), task, split
    w = world("digits" if task_name == "classification" else "diabetes")
    task, split = w.task, w.split("class" if kind == "class" or task_name != "classification" else "random")
    torch_rng = torch.get_rng_state()
    torch.manual_seed(1)
    if task_name == "classification":
        model: nn.Module = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(0.2),
            nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10),
        )  # fmt: skip
    else:
        model = nn.Sequential(nn.Linear(10, 16), nn.LayerNorm(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))
    torch.set_rng_state(torch_rng)
    parts = {"forget": 16, "retain": 64, "test": 32, "validation": 32}
    cut = {name: getattr(split, name).take(range(n)) for name, n in parts.items()}
    if task_name == "classification":
        cut["anchor"] = noise(64, 30.0)
    return model.eval(), task, replace(split, **cut)


def state(model: nn.Module) -> dict:
    """All that a method must leave alone."""
    return {
        "tensors": {n: t.detach().clone() for n, t in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items()},
        "flags": [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "hooks": [len(m._forward_hooks) for m in model.modules()],
    }


def same(a: dict, b: dict) -> bool:
    """Bitwise equality of two `state` records."""
    if a["modes"] != b["modes"] or a["hooks"] != b["hooks"]:
        return False
    for (ra, ga), (rb, gb) in zip(a["flags"], b["flags"], strict=True):
        if ra != rb or (ga is None) != (gb is None) or (ga is not None and not torch.equal(ga, gb)):
            return False
    return all(torch.equal(t, b["tensors"][n]) for n, t in a["tensors"].items())


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def accuracy(model: nn.Module, data: Examples) -> float:
    from expunge.modalities.classification.task import classification
    from expunge.parts.reading import score

    return float(score(model, classification(), data).correct.float().mean())
