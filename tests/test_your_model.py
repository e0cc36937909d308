"""docs/your-model.md as it stands, but for the search, which is one short run of one method: commands, Python, released folders in their own library."""

from __future__ import annotations

import re
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import FAMILIES, KINDS, NAMES, SHORT, Kind, family, fitted, merged, nets, quiet, table, tokens
from test_cli_language import call
from torch import nn

import expunge
from expunge.core.modality import meant

pytest.importorskip("transformers")
PAGE = (Path(__file__).parent.parent / "docs" / "your-model.md").read_text()
SECTIONS = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
QUICK = ("A tabular network, CSV", "A BERT, CSV", "A LoRA-tuned chat model")
"""Kinds that every run of the tests reads; the others are slow together."""
SAID = {"GPT2": "GPT-2", "GPTNeoX": "GPT-NeoX", "Olmo2": "OLMo 2", "StableLm": "StableLM", "Starcoder2": "StarCoder 2", "Qwen3Moe": "Qwen 3 MoE",
        "Mixtral": "experts", "DeepseekV3": "DeepSeek"}  # fmt: skip


def block(name: str, kind: str) -> str:
    (found,) = re.findall(rf"^```{kind}\n(.*?)^```", SECTIONS[name], re.MULTILINE | re.DOTALL)
    return found


class Short:
    """expunge, whose `forget` runs one short method, and whose verdict releases the best try whether it passed or not."""

    def __init__(self, group: str):
        method, settings = SHORT[group]
        self.opened, self.split, self.verdict = expunge.opened, expunge.split, None
        self.run = partial(expunge.forget, methods=(method,), settings={method: settings}, slow=False, scales=(1.0,))

    def forget(self, *given: Any) -> Short:
        self.verdict = self.run(*given)
        return self

    def release(self, folder: str) -> None:
        self.verdict.release(folder, anyway=True)


def outputs(model: nn.Module, kind: Kind) -> torch.Tensor:
    with torch.no_grad():
        given = kind.inputs()
        found = model(*given.values()) if set(given) == {"x"} else model(**given)
    return found if isinstance(found, torch.Tensor) else found.logits


def same(one: nn.Module, two: nn.Module, kind: Kind) -> None:
    """Same outputs to the last bit (of an adapter, which is added at run time, to rounding), or the same weights where there is nothing to feed."""
    if kind.group == "adapters":
        assert torch.allclose(outputs(one, kind), outputs(two, kind), rtol=1e-5, atol=1e-5)
    elif kind.inputs():
        assert torch.equal(outputs(one, kind), outputs(two, kind))
    else:
        mine, theirs = one.state_dict(), two.state_dict()
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def python(lines: str, kind: Kind, place: Path, names: dict[str, Any] | None = None) -> None:
    """Run the lines in the folder; the released folder is what was audited, in its own library."""
    short = Short(kind.group)
    with pytest.MonkeyPatch.context() as patch, quiet():
        patch.chdir(place)
        patch.syspath_prepend(str(place))
        exec(lines, {**(names or {}), "expunge": short})
    found = short.verdict
    assert found.tries[0].attempt.outcome == "ok", found.tries[0].attempt.reason
    audited = found.model()
    same(kind.load(place / "clean", place), getattr(audited, "unet", audited), kind)
    assert (place / "clean" / "NOT-PASSED.txt").is_file() != found.passed
    assert (place / "clean" / "preprocessor_config.json").is_file() == (place / "model" / "preprocessor_config.json").is_file()


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in KINDS])
def test_the_lines_of_the_page_are_what_happens(tmp_path, name):
    kind = KINDS[name]
    kind.make(tmp_path)
    command, lines = block(name, "sh"), block(name, "py")
    assert 3 <= len(lines.splitlines()) <= 6 and f"`{command.strip()}`" in PAGE
    method, settings = SHORT[kind.group]
    more = [word for k, v in settings.items() for word in (f"--{method}.{k}", str(v))]
    code, _, err = call(tmp_path, *shlex.split(command)[1:], "--method", method, *more, "--quick", "--anyway", "--keep-candidate")
    assert code in (0, 1), err
    kept = tmp_path / "out" / "latest"
    assert (kept / "report.html").is_file() and (kept / ("released" if code == 0 else "candidate")).is_dir()
    sys.modules.pop("nets", None)
    python(lines, kind, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_read_and_released(tmp_path, name):
    kind = Kind(family(name), merged, tokens, "texts")
    kind.make(tmp_path)
    assert meant("", "model", tmp_path).name == "causal_lm"
    python(block("A language model, questions and answers", "py"), kind, tmp_path)
    told = SAID.get(name, re.sub(r"(\d)", r" \1", name))
    assert told in PAGE


def test_what_is_in_memory(tmp_path):
    """Data sets, frames and arrays of the section that has no files."""
    pandas = pytest.importorskip("pandas")
    (x, y), (u, v) = table(90, 0), table(60, 1)
    words = [NAMES[k] for k in y]
    sets = [torch.utils.data.TensorDataset(torch.tensor(a, dtype=torch.float32), torch.tensor(b)) for a, b in ((x, y), (u, v))]
    frames = [pandas.DataFrame({"name": n, **dict(zip("abcd", a.T, strict=True)), "label": b}) for n, a, b in (
        (["anna", "bert", *(f"n{i}" for i in range(88))], x, y), ([f"m{i}" for i in range(60)], u, v))]  # fmt: skip
    names = {"train_set": sets[0], "test_set": sets[1], "frame": frames[0], "unseen": frames[1], "x": x, "words": words, "x_test": u,
             "words_test": [NAMES[k] for k in v]}  # fmt: skip
    found = re.findall(r"^```py\n(.*?)^```", SECTIONS["In memory"], re.MULTILINE | re.DOTALL)
    assert len(found) == 3
    for k, lines in enumerate(found):
        place = tmp_path / str(k)
        place.mkdir()
        model = fitted(nets(place).tabular(), x, y)

        def load(folder: Path, place: Path) -> nn.Module:
            from safetensors.torch import load_file

            net = nets(place).tabular()
            net.load_state_dict(load_file(folder / "model.safetensors"))
            return net.eval()

        python(lines, Kind(lambda p: None, load, KINDS["A tabular network, CSV"].inputs), place, {**names, "model": model})


def test_the_page_and_the_kinds_agree():
    assert [*KINDS] == [n for n in SECTIONS if n != "In memory"] and len(KINDS) + 3 >= 25 and len(FAMILIES) >= 20
