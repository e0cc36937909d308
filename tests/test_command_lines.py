"""200 hostile or mistaken command lines: 0 tracebacks, the right exit code, one line that says what is wrong, and nothing written."""

from __future__ import annotations

import gzip
import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from kinds import fitted, images, lines, nets, table
from safetensors.torch import save_file
from test_cli_language import call, contents

from expunge.core.patch import Patch, difference

NET = (
    "py:nets:tabular",
    "ids:r3,r14",
    "--weights",
    "w.safetensors",
    "--train",
    "csv:train.csv?target=label",
    "--test",
    "csv:test.csv?target=label",
    "--id-column",
    "name",
)
RUN = ("--method", "fine_tune", "--epochs", "1", "--quick")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A user's folder: a tabular network with its data, and files that are not what they are called."""
    place = tmp_path_factory.mktemp("hostile")
    for part, n, seed in (("train", 60, 0), ("test", 40, 1)):
        x, y = table(n, seed)
        rows = [f"r{k},{','.join(map(str, row))},{label}" for k, (row, label) in enumerate(zip(x, y, strict=True))]
        (place / f"{part}.csv").write_text("name,a,b,c,d,label\n" + "\n".join(rows) + "\n")
    net = fitted(nets(place).tabular(), *table(60, 0))
    save_file(net.state_dict(), place / "w.safetensors")
    moved = nets(place).tabular()
    moved.load_state_dict(net.state_dict())
    with torch.no_grad():
        moved[0].bias += 0.1
    difference(net.state_dict(), moved.state_dict()).save(place / "p.safetensors")
    save_file({**net.state_dict(), "0.bias": torch.full((12,), float("nan"))}, place / "nan.safetensors")
    save_file({"other": torch.zeros(3)}, place / "other.safetensors")
    images(place / "pictures")
    good = (place / "train.csv").read_text()
    odd = {
        "empty": b"", "noise": np.random.default_rng(0).integers(0, 256, 4000, np.uint8).tobytes(), "zip": b"PK\x03\x04" + bytes(100),
        "bomb": gzip.compress(b"a,label\n" + b"1,0\n" * 100) + b"broken", "nul": good.encode() + b"\0\0\0", "latin": "naïve,label\n1,0\n".encode("latin-1"),
        "twice": b"a,a,label\n1,2,0\n", "short": b"a,label\n1\n", "words": good.replace("r3,", "r3,x", 1).encode(), "half": good[:700].encode(),
        "real": b"a,label\n" + b"1,0.4\n2,1.4\n" * 30, "infinite": good.replace("\nr3,", "\nr3,inf", 1).encode(), "nan": b"a,label\n" + b"nan,0\n1,1\n" * 30,
        "one": b"a,label\n1,0\n", "header": b"a,label\n",
    }  # fmt: skip
    for name, content in odd.items():
        (place / f"{name}.csv").write_bytes(content)
    for name in ("empty", "noise", "nul"):
        for ending in ("safetensors", "json", "jsonl", "toml", "parquet", "txt"):
            (place / f"{name}.{ending}").write_bytes(odd[name])
    (place / "deep.json").write_text("[" * 100_000)
    (place / "list.json").write_text("[1, 2]")
    lines(place / "gone.jsonl", [{"question": "q", "answer": "a"}])
    (place / "folder").mkdir()
    (place / "bad.py").write_text("raise SystemExit(7)\n")
    (place / "odd.py").write_text("def number():\n    return 3\n\n\ndef broken():\n    return 1 / 0\n\n\ndef ends():\n    exit(9)\n")
    (place / "model").mkdir()
    (place / "model" / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    for name, text in RECIPES.items():
        (place / f"{name}.toml").write_text(text)
    sys.modules.pop("nets", None)
    return place


RECIPE = 'model = "py:nets:tabular"\nweights = "w.safetensors"\ntrain = "csv:train.csv?target=label"\ntest = "csv:test.csv?target=label"\nid_column = "name"\n'
GONE = RECIPE + 'forget = "ids:r3"\n'
RECIPES = {
    "r-missing": RECIPE,
    "r-type": RECIPE + "forget = 3\n",
    "r-ids": RECIPE + 'forget = "ids:@../gone.txt"\n',
    "r-weights": GONE.replace("w.safe", "../w.safe"),
    "r-task": GONE + 'task = "poetry"\n',
    "r-key": GONE + 'forgett = "x"\n',
    "r-seed": GONE + "seed = -1\n",
    "r-methods": GONE + "methods = [1]\n",
    "r-method": GONE + 'methods = ["fine_tun"]\n',
    "r-epochs": GONE + 'methods = ["fine_tune"]\n[with.fine_tune]\nepochs = inf\n',
    "r-gate": GONE + '[gate]\n"klom.forget" = 3\n',
    "r-out": GONE + 'out = "../x"\n',
    "r-nul": GONE + 'out = "a\\u0000b"\n',
    "r-twice": GONE + 'forget = "ids:r4"\n',
    "r-minutes": GONE + "minutes = nan\n",
}


def read(line: str) -> tuple[list[str], str]:
    """(words, a piece of the message) of a line of command_lines.txt; what no shell shows stands there as Python writes it."""
    said, _, message = line.partition("  #")
    for name, words in (("GOOD", NET), ("DATA", NET[2:]), ("RUN", RUN)):
        said = re.sub(rf"\b{name}\b", lambda _, words=words: shlex.join(words), said)
    return [w.encode().decode("unicode_escape") if "\\" in w else w for w in shlex.split(said)], message.strip()


LINES = [read(line) for line in (Path(__file__).parent / "command_lines.txt").read_text().splitlines()]


def test_there_are_enough():
    assert len({tuple(words) for words, _ in LINES}) >= 200


@pytest.mark.parametrize("k", range(len(LINES)))
def test_a_hostile_line_ends_in_one_line(home, k):
    words, message = LINES[k]
    before = contents(home)
    code, out, err = call(home, *words)
    for bug in home.glob("expunge-bug-*"):
        bug.unlink()
    assert code == 2 and "Traceback" not in out + err, (words, out, err)
    said = [line for line in err.strip().splitlines() if line.strip()]
    usage = any(line.startswith("Usage:") for line in said)
    assert said and (len(said) == 1 or usage) and not any(c in err for c in "\x1b\0"), err
    assert message in err, err
    assert contents(home) == before


def test_the_good_line_is_good(home, tmp_path):
    code, _, err = call(home, "forget", *NET, *RUN, "--out", str(tmp_path / "out"))
    assert code in (0, 1) and (tmp_path / "out" / "latest" / "report.json").is_file(), err
    document = json.loads((tmp_path / "out" / "latest" / "report.json").read_text())
    assert document["parts"]["forget"] == 2
    assert Patch.load(home / "p.safetensors").edits
