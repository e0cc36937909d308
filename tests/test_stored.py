"""Inputs that are read as they are needed: the same numbers as from memory, to the last bit, and no more memory than was allowed."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from kinds import images, nets
from PIL import Image
from torch.utils.data import Dataset, Subset

import expunge
from expunge.core.errors import DataError, SettingError
from expunge.engine.run import unlearn
from expunge.modalities import near, stored
from expunge.modalities.files import index, readers
from expunge.modalities.stored import Stored


@pytest.fixture
def both(tmp_path):
    """The same folder in memory and not."""
    images(tmp_path)
    held, lazy = (readers.load(f"images:{tmp_path}/train", "classification", options=o) for o in ({}, {"memory": "1K"}))
    assert lazy.stored and not held.stored and "read as they are needed" in repr(lazy.x)
    return tmp_path, held, lazy


def test_the_same_records(both):
    _, held, lazy = both
    rows = torch.tensor([5, 0, 23, 7])
    assert (
        torch.equal(held.x[rows], lazy.x[rows]) and torch.equal(held.x[3], lazy.x[3]) and torch.equal(held.x[2:4], lazy.x[2:4]) and len(lazy.x[rows[:0]]) == 0
    )
    assert held.x.shape == lazy.x.shape and held.x.ndim == lazy.x.ndim and held.x.nbytes == lazy.x.nbytes and held.x.dtype == lazy.x.dtype
    assert held.keys == lazy.keys and held.inputs == lazy.inputs and held.digest == lazy.digest and held.schema == lazy.schema and held.names == lazy.names
    mine, theirs = held.take(rows), lazy.take(rows)
    assert mine.keys == theirs.keys and theirs.stored and mine.joined(held).keys == theirs.joined(lazy).keys and theirs.joined(held).stored
    assert replace(held, y=held.y.flip(0)).keys == replace(lazy, y=lazy.y.flip(0)).keys, "another target makes another record"
    assert lazy.fault == ""


def test_the_same_patch_and_the_same_audit(both):
    place, _, _ = both
    model = nets(place).pictures()
    found = []
    for options in ({}, {"memory": "1K"}):
        split = expunge.split(f"images:{place}/train", "ids:cat/1.png,ant/2.png", test=f"images:{place}/test", model=model, **options)
        assert split.retain.stored == split.test.stored == bool(options)
        attempt = unlearn("salun", model, expunge.classification(), split, epochs=1, batch_size=4)
        verdict = expunge.forget(model, "classification", split, methods=["fine_tune"], settings={"fine_tune": {"epochs": 1}}, slow=False)
        rows = {r.name: (r.value, r.low, r.high) for r in verdict.tries[0].rows if not r.name.startswith("cost.")}
        found.append((attempt.patch.digest, verdict.tries[0].attempt.patch.digest, near.inputs(split), verdict.report["identity"]["parts"], rows))
    assert found[0][:-1] == found[1][:-1]
    for name, row in found[0][-1].items():
        assert row == found[1][-1][name], name


def test_a_later_run_reads_what_changed(both, monkeypatch):
    place, held, _ = both
    read = []
    real = index.fact
    monkeypatch.setattr(index, "fact", lambda x, y: read.append(1) or real(x, y))
    again = readers.load(f"images:{place}/train", "classification", options={"memory": "1K"})
    assert read == [] and again.keys == held.keys
    picture = np.full((8, 8, 3), 99, np.uint8)
    Image.fromarray(picture).save(place / "train" / "ant" / "3.png")
    changed = readers.load(f"images:{place}/train", "classification", options={"memory": "1K"})
    assert read == [1] and sum(a != b for a, b in zip(changed.keys, held.keys, strict=True)) == 1
    with pytest.raises(DataError, match=r"image ant/3.png was changed or taken away while it was in use"):
        again.x[torch.tensor([3])]
    file = index.place(place / "train")
    for content in ("", "{", json.dumps({"files": 3}), file.read_text().replace("ant/0.png", "ant/9.png")):
        file.write_text(content)
        read.clear()
        assert readers.load(f"images:{place}/train", "classification", options={"memory": "1K"}).keys == changed.keys and len(read) == len(held)
    read.clear()
    other = readers.load(f"images:{place}/train", "classification", options={"memory": "1K", "mean": "0.5,0.5,0.5", "std": "0.5,0.5,0.5"})
    assert len(read) == len(held) and other.keys != changed.keys


def test_images_that_do_not_fit_the_others_are_named(both):
    place, _, _ = both
    Image.fromarray(np.zeros((9, 8, 3), np.uint8)).save(place / "train" / "bee" / "99.png")
    with pytest.raises(DataError, match=r"image bee/99.png is .*, the others are"):
        readers.load(f"images:{place}/train", "classification", options={"memory": "1K"})
    assert stored.room("4G") == 4 << 30 and stored.room("512 MiB") == 512 << 20 and stored.room() > 1 << 28
    for said in ("much", "-1G", "1.5G", "0", "\u0663G"):
        with pytest.raises(SettingError, match="memory must be a size"):
            stored.room(said)


class Drawn(Dataset):
    """Pictures made when they are asked for."""

    def __init__(self, n: int, side: int, first: int = 0):
        self.n, self.side, self.first = n, side, first

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, k: int):
        x = torch.full((3, self.side, self.side), 4.0 * (k % 2))
        x[0, 0, 0] = 1e-4 * (self.first + k)
        return x, k % 2


def test_a_data_set_of_torch():
    held, lazy = (readers.load(Subset(Drawn(40, 4), [7, 3, *range(10, 30)]), "classification", options=o) for o in ({}, {"memory": "1K"}))
    assert isinstance(lazy.x, Stored) and not held.stored and lazy.ids.tolist() == held.ids.tolist() and held.ids[0] == 7
    assert lazy.keys == held.keys and torch.equal(lazy.x[:], held.x) and lazy.schema == held.schema

    class Torn(Drawn):
        def __getitem__(self, k: int):
            x, y = super().__getitem__(k)
            return (x[:, 1:] if k == 9 else x, y)

    with pytest.raises(DataError, match=r"record 9 of the data is \(3, 3, 4\), the first is \(3, 4, 4\)"):
        readers.load(Torn(40, 4), "classification", options={"memory": "1K"})


LARGE = """
import sys
import torch
sys.path.insert(0, {tests!r})
import expunge
from test_stored import Drawn
from torch import nn

torch.manual_seed(0)
torch.set_num_threads(1)
net = nn.Sequential(nn.AvgPool2d({pool}), nn.Flatten(), nn.Linear(3 * 4, 2))
data, test = Drawn({n}, {side}), Drawn(64, {side}, first=-500)
split = expunge.split(data, "ids:3,14,15", test=test, memory="64M")
print(split.retain.x.nbytes)
short = {{"fine_tune": {{"epochs": 0.02, "batch_size": 32}}}}
verdict = expunge.forget(net, "classification", split, methods=["fine_tune"], settings=short, slow=False, memory="64M")
print(verdict.tries[0].attempt.outcome, verdict.tries[0].grade is not None)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))  # ru_maxrss would begin with that of the parent
"""


@pytest.mark.parametrize(("n", "side", "most"), [(200, 64, 1_500_000), pytest.param(34_000, 224, 2_000_000, marks=pytest.mark.slow)], ids=["10 MB", "20 GB"])
def test_more_than_memory_holds(n, side, most):
    """Request, method, audit and verdict on inputs of 20 GB that never were in memory together."""
    script = LARGE.format(tests=str(Path(__file__).parent), n=n, side=side, pool=side // 2)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    nbytes, outcome, peak = done.stdout.splitlines()[-3:]
    assert int(nbytes) == (n - 3) * 3 * side * side * 4 and outcome.endswith("True")
    assert int(peak) < most, "kB"
