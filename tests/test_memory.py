"""--memory: gradients of single examples are chunked by bytes, measured; the command line, recipes and Python take it."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import test_command_lines
import torch
from test_cli_language import call
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from worlds import small

import expunge
from expunge.core import guard
from expunge.core.errors import RecipeError, SettingError
from expunge.core.machine.bounds import size_of
from expunge.core.patch import Patch
from expunge.engine.run import unlearn
from expunge.modalities.classification.task import classification
from expunge.modalities.examples import Examples
from expunge.parts.updates import gradients
from expunge.planning import outcome, plants, recipe
from expunge.planning.twins import Recipe

GONE, NET, home = test_command_lines.GONE, test_command_lines.NET, test_command_lines.home


class Alive(TorchDispatchMode):
    """Bytes of the tensors that were made inside and are not gone; `most` is the peak."""

    def __init__(self):
        super().__init__()
        self.now, self.most, self.known = 0, 0, weakref.WeakValueDictionary()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            s = t.untyped_storage() if isinstance(t, torch.Tensor) else None
            if s is not None and self.known.get(s._cdata) is not s:
                self.known[s._cdata] = s
                self.now += s.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(s, self.left, s.nbytes())
        return out

    def left(self, n: int) -> None:
        self.now -= n


def wide(kind=torch.float32):
    """A model of five megabytes, and 64 records."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 2048), nn.ReLU(), nn.Linear(2048, 512), nn.ReLU(), nn.Linear(512, 10)).to(kind)
    return model, Examples(torch.randn(64, 64).to(kind), torch.arange(64) % 10, torch.arange(64))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("times", [2, 8, 0])
def test_what_is_held_at_once_is_measured(times, kind):
    """At most the memory, and beside it two copies of the weights in float32; without a limit it is far more."""
    model, data = wide(kind)
    one = 4 * sum(p.numel() for p in model.parameters())
    with guard.watching(guard.Guard(memory=times * one)), Alive() as alive:
        found, _ = gradients.squares(model, classification(), data)
    assert times * one * 0.3 < alive.most < (times + 3) * one if times else alive.most > 30 * one
    whole, _ = gradients.squares(model, classification(), data)
    for name in whole:
        torch.testing.assert_close(found[name], whole[name], rtol=1e-3 if kind != torch.float32 else 1e-5, atol=1e-6)


def test_all_gradients_at_once_take_what_is_stated_or_are_refused():
    model, data = wide()
    one = 4 * sum(p.numel() for p in model.parameters())
    with guard.watching(guard.Guard(memory=67 * one)), Alive() as alive:
        found = gradients.rows(model, classification(), data)
    assert alive.most < 70 * one
    torch.testing.assert_close(found, gradients.rows(model, classification(), data))
    with guard.watching(guard.Guard(memory=63 * one)), pytest.raises(SettingError, match=r"the gradients of 64 examples for .* take .* more than memory="):
        gradients.rows(model, classification(), data)
    with guard.watching(guard.Guard(memory=one - 1)), pytest.raises(SettingError, match=r"the gradient of one example takes .* more than memory="):
        gradients.squares(model, classification(), data)


@pytest.mark.parametrize(("said", "size"), [("2G", 1 << 31), ("512m", 1 << 29), ("3 GiB", 3 << 30), ("1000", 1000), (7, 7), ("10kB", 10240), ("", 0), (0, 0)])
def test_sizes(said, size):
    assert size_of("memory", said) == size


@pytest.mark.parametrize("said", ["-1", "nan", "inf", "2X", "G", "1e9", "9" * 15 + "T", "0", "1.5G", True, 1.5, "2 G G", "\u0663G", None])
def test_sizes_that_are_none(said):
    with pytest.raises(SettingError, match=r"memory must be a size such as 4G or 512M, not"):
        size_of("memory", said)


def test_a_run_takes_it(monkeypatch):
    model, task, split = small("classification")
    chunks = []
    each = gradients._each
    monkeypatch.setattr(gradients, "_each", lambda f, p, b: (chunks.append(len(b["i"])), each(f, p, b))[1])
    one = 4 * sum(p.numel() for p in model.parameters())
    plain = unlearn("ssd", model, task, split)
    assert max(chunks) == 64
    chunks.clear()
    little = unlearn("ssd", model, task, split, memory=3 * one)
    assert max(chunks) == 3 and little.outcome == plain.outcome and little.settings == plain.settings
    assert all(isinstance(a, Patch) for a in (plain.patch, little.patch))
    chunks.clear()
    verdict = expunge.forget(model, task, split, methods=["ssd"], memory=str(5 * one), slow=False)
    assert max(chunks) == 5
    assert verdict.tries
    refused = unlearn("influence", model, task, split, memory=one)
    assert refused.outcome == "refused" and "more than memory=" in refused.reason
    for call_ in (lambda: unlearn("ssd", model, task, split, memory="2X"), lambda: expunge.forget(model, task, split, memory=-1)):
        with pytest.raises(SettingError, match="memory must be a size"):
            call_()


def test_twins_take_it(monkeypatch):
    model, task, split = small("classification", False, "records")
    one = 4 * sum(p.numel() for p in model.parameters())
    seen = []
    monkeypatch.setattr("expunge.planning.twins.unlearn", lambda *a, guard, **o: (seen.append(guard.memory), unlearn(*a, guard=guard, **o))[1])
    attempt = unlearn("ssd", model, task, split, memory=3 * one, alpha=2.0)
    assert attempt.patch is not None, attempt.reason
    found, why = plants.recipe_of(model, task, split, attempt, 3 * one)
    assert seen == [3 * one] and found == Recipe("ssd", attempt.settings, 0, 0, 3 * one), why
    asked = []
    monkeypatch.setattr(outcome, "recipe_of", lambda *a: (asked.append(a[-1]), (None, "asked"))[1])
    monkeypatch.setattr(outcome, "examined", lambda p, a, *rest, **o: outcome.Try(a, grade=outcome.Grade("supported")))
    monkeypatch.setattr(outcome, "regraded", lambda p, rules, one, *rest, **o: one)
    expunge.audited(model, attempt.model(), task, split, attempt=replace(attempt, outcome="ok"), twins=2, slow=False, memory=3 * one)
    assert asked == [3 * one]


def test_the_command_line_and_recipes_take_it(home, tmp_path, monkeypatch):
    chunks = []
    each = gradients._each
    monkeypatch.setattr(gradients, "_each", lambda f, p, b: (chunks.append(len(b["i"])), each(f, p, b))[1])
    code, _, err = call(home, "forget", *NET, "--method", "ssd", "--quick", "--memory", "1k", "--out", str(tmp_path / "out"))
    assert code in (0, 1) and chunks and max(chunks) < 5, err
    chunks.clear()
    (home / "memory.toml").write_text(GONE + 'methods = ["ssd"]\nmemory = "1k"\n')
    found = recipe.read(home / "memory.toml")
    assert found.options["memory"] == "1k"
    recipe.run(replace(found, out="memory-out"))
    assert chunks and max(chunks) < 5
    for command in ("forget", "audit"):
        code, _, err = call(home, command, *NET, *(("--patch", "p.safetensors") if command == "audit" else ()), "--memory", "much")
        assert code == 2 and "memory must be a size such as 4G or 512M, not 'much'" in err
    (home / "memory.toml").write_text(GONE + 'memory = "much"\n')
    with pytest.raises(RecipeError, match=r"memory in memory.toml: memory must be a size"):
        recipe.read(home / "memory.toml")
