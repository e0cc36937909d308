"""Hostile files: every one is read as what was written, or refused in one line; the model is unchanged, and memory stays in bounds."""

from __future__ import annotations

import copy
import json
import random
import resource
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from expunge.core import files
from expunge.core.edits import LowRank, Replace
from expunge.core.errors import DataError, PatchError
from expunge.core.files import file_digest
from expunge.core.patch import CLAIMS, Patch

WEIRD = [
    None,
    True,
    -1,
    0,
    3,
    1 << 62,
    1 << 80,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "weight",
    "\x1b[31mred\n",
    [],
    [3],
    [-1, 4],
    [1 << 40] * 3,
    {},
    {"a": 1},
    "x" * 300,
]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8))


def valid() -> Patch:
    """Edits of all forms: whole, a few places of many, half of the places, low rank."""
    g = torch.Generator().manual_seed(1)
    few, half = torch.zeros(16, 16, dtype=torch.bool), torch.rand(8, 16, generator=g) < 0.5
    few[2, 3] = few[9, 9] = True
    edits = (
        Replace("0.bias", torch.randn(16, generator=g)), Replace("0.weight", torch.randn(2, generator=g), few),
        Replace("1.weight", torch.randn(int(half.sum()), generator=g), half),
        LowRank("1.weight", torch.randn(8, 2, generator=g), torch.randn(2, 16, generator=g), 0.5),
    )  # fmt: skip
    return Patch(edits).stamped(net(), method="salun", seed=3, settings={"keep": 0.3})


def sealed(doc: object, tensors: dict[str, torch.Tensor]) -> bytes:
    """A file with the right checksum for whatever it says."""
    body = json.dumps(doc, sort_keys=True)
    return save(tensors, {"expunge": body, "sha256": file_digest(body, tensors)})


def opened(content: bytes) -> tuple[dict, dict[str, torch.Tensor]]:
    n = struct.unpack("<Q", content[:8])[0]
    return json.loads(json.loads(content[8 : 8 + n])["__metadata__"]["expunge"]), load(content)


def nodes(doc: object, at: tuple = ()) -> list[tuple]:
    """Paths of all values of a document."""
    items = doc.items() if isinstance(doc, dict) else enumerate(doc) if isinstance(doc, list) else ()
    return [at] * bool(at) + [p for k, v in items for p in nodes(v, (*at, k))]


def mutated(doc: dict, tensors: dict[str, torch.Tensor], r: random.Random) -> bytes:
    """One to three changes of what the file says or holds, sealed anew."""
    doc, tensors = copy.deepcopy(doc), dict(tensors)
    for _ in range(r.randint(1, 3)):
        if r.random() < 0.6:
            *way, last = r.choice(nodes(doc) or [("format",)])
            try:
                home = doc
                for step in way:
                    home = home[step]
                if r.random() < 0.2:
                    del home[last]
                else:
                    home[last] = copy.deepcopy(r.choice(WEIRD))
            except (TypeError, KeyError, IndexError):
                pass
        elif tensors:
            name = r.choice(sorted(tensors))
            t = tensors[name]
            how = r.randrange(6)
            if how == 0:
                del tensors[name]
            elif how == 1:
                tensors[name] = t.flatten()[: r.randrange(t.numel() + 1)].clone()
            elif how == 2:
                tensors[name] = t.to(r.choice([torch.float64, torch.int64, torch.uint8, torch.bfloat16, torch.bool]))
            elif how == 3:
                tensors[name] = t.reshape(r.choice([(-1,), (1, -1), (-1, 1)])).clone()
            elif how == 4:
                tensors[name] = torch.cat([t.flatten(), t.flatten()[:1]])
            else:
                tensors[f"{r.randrange(9)}.{r.choice(['up', 'down', 'values', 'bits', 'index'])}"] = t.clone()
    return sealed(doc, tensors)


def tried(path: Path, key: bytes | None = None) -> str:
    """What came of a file: refused, in one line; or applied, undone to the bit."""
    model = net()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    try:
        patch = Patch.load(path, key)
        undo = patch.apply(model)
        undo.apply(model)
        outcome = "applied"
    except PatchError as error:
        assert len(str(error).splitlines()) == 1 and str(error).isprintable(), repr(str(error))
        outcome = "refused"
    after = model.state_dict()
    assert all(torch.equal(t.view(torch.int32), after[n].view(torch.int32)) for n, t in before.items()), "the model was changed"
    return outcome


COUNTS = [1000, pytest.param(100_000, marks=pytest.mark.slow)]


@pytest.mark.parametrize("count", COUNTS)
def test_patches_with_a_right_checksum(count, tmp_path):
    """Whatever a sealed file says: refused, or applied and undone; never another exception."""
    valid().save(tmp_path / "p.safetensors")
    assert tried(tmp_path / "p.safetensors") == "applied"
    doc, tensors = opened((tmp_path / "p.safetensors").read_bytes())
    r, seen = random.Random(count), {"refused": 0, "applied": 0}
    for k in range(count // 2):
        (tmp_path / "m.safetensors").write_bytes(mutated(doc, tensors, r))
        try:
            seen[tried(tmp_path / "m.safetensors")] += 1
        except (AssertionError, Exception) as error:
            pytest.fail(f"file {k}: {type(error).__name__}: {error}")
    assert seen["refused"] > count // 5


@pytest.mark.parametrize("count", COUNTS)
def test_patches_of_other_bytes(count, tmp_path):
    """Bytes turned, cut or put in: never read as another patch."""
    whole = valid().save(tmp_path / "p.safetensors").read_bytes()
    r, digest, refused = random.Random(count), valid().digest, 0
    for _ in range(count // 2):
        raw = bytearray(whole)
        for _ in range(r.randint(1, 4)):
            at = r.randrange(len(raw))
            if r.random() < 0.7:
                raw[at] ^= 1 << r.randrange(8)
            elif r.random() < 0.5:
                del raw[at:]
            else:
                raw[at:at] = bytes(r.randrange(256) for _ in range(r.randint(1, 9)))
            if not raw:
                break
        (tmp_path / "m.safetensors").write_bytes(bytes(raw))
        try:
            assert Patch.load(tmp_path / "m.safetensors").digest == digest
        except PatchError:
            refused += 1
    assert refused > count // 4


def edit(**given):
    """A document of one edit over what a valid one says."""
    return {"format": 1, "meta": {}, "edits": [{"kind": "replace", "name": "0.weight", "places": "index", "shape": [16, 16], **given}]}


ONE = {"0.values": torch.zeros(1), "0.index": torch.zeros(1, dtype=torch.int64)}
HOSTILE = {
    "another shape": ({"format": 1, "meta": {}, "edits": [{"kind": "lowrank", "name": "1.weight", "scale": 1.0}]},
                      {"0.up": torch.ones(16, 2), "0.down": torch.ones(2, 8)}, "this model has"),
    "scale": ({"format": 1, "meta": {}, "edits": [{"kind": "lowrank", "name": "1.weight", "scale": float("nan")}]},
              {"0.up": torch.ones(8, 2), "0.down": torch.ones(2, 16)}, "no finite number"),
    "counts": (edit(), {**ONE, "0.values": torch.zeros(2)}, "2 values for 1 places"),
    "twice": (edit(), {"0.values": torch.zeros(2), "0.index": torch.zeros(2, dtype=torch.int64)}, "2 values for 1 places"),
    "huge": (edit(shape=[1 << 20, 1 << 20]), ONE, "declares 1099511627776 places"),
    "overflow": (edit(shape=[1 << 32, 1 << 32]), ONE, "declares"),
    "negative": (edit(shape=[-16, -16]), ONE, "must list sizes"),
    "meta": ({**edit(), "meta": []}, ONE, "meta a mapping"),
    "seed": ({**edit(), "meta": {"seed": "3"}}, ONE, "seed of meta must be int"),
    "base": ({**edit(), "meta": {"base": 3}}, ONE, "base of meta must be str"),
    "edits": ({"format": 1, "meta": {}, "edits": {"a": 1}}, ONE, "must be a list"),
    "kind": (edit(kind="code"), ONE, "a form that this version does not know"),
    "name": (edit(name=["0.weight"]), ONE, "name must be text"),
}  # fmt: skip


@pytest.mark.parametrize("which", HOSTILE)
def test_claims_that_no_patch_makes(which, tmp_path):
    doc, tensors, said = HOSTILE[which]
    (tmp_path / "p.safetensors").write_bytes(sealed(doc, tensors))
    model = net()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(PatchError, match=said):
        Patch.load(tmp_path / "p.safetensors").apply(model)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_many_small_claims_take_no_gigabytes(tmp_path):
    """A file of some kilobytes that asks for 60 tensors of 2^26 places is refused before any of them is made."""
    edits = [{"kind": "replace", "name": f"{k}.weight", "places": "index", "shape": [1 << 26]} for k in range(60)]
    tensors = {f"{k}.{n}": t for k in range(60) for n, t in (("values", torch.zeros(1)), ("index", torch.zeros(1, dtype=torch.int64)))}
    path = tmp_path / "p.safetensors"
    path.write_bytes(sealed({"format": 1, "meta": {}, "edits": edits}, tensors))
    assert path.stat().st_size < 30_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(PatchError, match=f"the most are {CLAIMS}"):
        Patch.load(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_what_is_saved_is_read(tmp_path, monkeypatch):
    """A patch whose listed places would be more than a file may claim is written with a bit for each, and reads back the same."""
    from expunge.core import patch

    listed = opened(valid().save(tmp_path / "a.safetensors").read_bytes())[0]["edits"]
    monkeypatch.setattr(patch, "CLAIMS", 100)
    path = valid().save(tmp_path / "b.safetensors")
    assert [e.get("places") for e in listed] == ["all", "index", "bits", None]
    assert [e.get("places") for e in opened(path.read_bytes())[0]["edits"]] == ["all", "bits", "bits", None]
    assert Patch.load(path).digest == valid().digest


def test_an_edit_that_breaks_off_leaves_the_model_whole(monkeypatch):
    """The third of four edits fails: the first two are undone."""
    model, p = net(), valid()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    real = Patch._write

    def broken(self, model, undo):
        if len(self.edits) < 4:
            return real(self, model, undo)
        real(Patch(self.edits[:2]), model, undo)
        raise KeyboardInterrupt

    monkeypatch.setattr(Patch, "_write", broken)
    with pytest.raises(KeyboardInterrupt):
        p.apply(model)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_masks_made_in_memory_are_held_to_their_counts():
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[0, :3] = True
    with pytest.raises(PatchError, match="another model"):
        Patch((Replace("0.weight", torch.zeros(2), mask),)).apply(net())


def test_keys_and_names(tmp_path, capsys):
    """An empty key is refused; control characters of names do not reach the terminal."""
    from expunge.cli.patch import inspect
    from expunge.cli.shown import key

    for content in (b"", b"\n", b"  \n"):
        (tmp_path / "key").write_bytes(content)
        with pytest.raises(DataError, match=r"key file .* is empty"):
            key(str(tmp_path / "key"))
    Patch((Replace("a\x1b[2Jb", torch.zeros(1)),), {"method": "\x1b]0;title\x07"}).save(tmp_path / "p.safetensors")
    inspect(str(tmp_path / "p.safetensors"))
    assert "\x1b" not in capsys.readouterr().out


SEALED = ("references", "shadows", "statistics")


@pytest.mark.parametrize("which", SEALED)
def test_every_file_that_is_written_is_sealed(which, tmp_path):
    """A turned number is never read: one line, or (a cache) computed again. A file of another kind is none either."""
    from expunge.audits import pool
    from expunge.core import guard
    from expunge.core.errors import ModelError
    from expunge.core.journal import Journal
    from expunge.methods.classifiers import scar
    from expunge.parts.remember import _read, recall

    path = tmp_path / "f.safetensors"
    if which == "references":

        class Rows:
            digest = "d"

        watch = guard.Guard(journal=Journal(tmp_path, "run"))
        with guard.watching(watch):
            recall("x", net(), Rows(), lambda: {"a": torch.ones(4)})
        (path,) = tmp_path.glob("reference-*.safetensors")
        assert torch.equal(_read(path)["a"], torch.ones(4))

        def read():
            with pytest.warns(UserWarning, match="computed again"):
                assert _read(path) is None
            raise ModelError("told")
    elif which == "shadows":
        pool._write(path, [net(), net()])
        pool._read(path, [net(), net()])

        def read():
            pool._read(path, [net(), net()])
    else:
        like = scar.Moments(**{f: torch.ones(()) for f in scar.Moments.__dataclass_fields__})
        scar.save(like, path)
        assert scar.load(path, like)

        def read():
            scar.load(path, like)

    whole = path.read_bytes()
    for content in (whole[:-3] + bytes([whole[-3] ^ 64]) + whole[-2:], whole[:-1], b"", save({"a": torch.ones(2)}), files.seal("something else", load(whole))):
        path.write_bytes(content)
        with pytest.raises((ModelError, DataError)) as raised:
            read()
        assert str(raised.value).isprintable()


def test_proofs_are_sealed(tmp_path):
    from expunge.core.errors import StoreError
    from expunge.guarantees.exact.proof import Proof, read

    fields = {f.name: f for f in Proof.__dataclass_fields__.values()}
    assert {"ids", "before", "after", "untouched"} <= set(fields)
    doc = {"format": 1, "ids": [1], "holds": True}
    path = tmp_path / "proof.json"
    path.write_text(files.seal_json(doc))
    assert files.unsealed_json(path, StoreError, "is none") == doc
    for change in (
        lambda s: s.replace("true", "false"),
        lambda s: s.replace('"format": 1', '"format": 2'),
        lambda s: s[:-4],
        lambda s: "[]",
        lambda s: "[" * 100_000,
    ):
        path.write_text(change(files.seal_json(doc)))
        with pytest.raises(StoreError):
            files.unsealed_json(path, StoreError, "is none")
        with pytest.raises(StoreError):
            read(path)


def test_leftovers_of_killed_writes_are_removed(tmp_path):
    """Those of processes that are gone, and no others."""
    import os
    import subprocess

    with subprocess.Popen(["true"]) as done:
        done.wait()
    gone, mine, other = tmp_path / f".w.safetensors.{done.pid}-abc_1.tmp", tmp_path / f".w.safetensors.{os.getpid()}-abc.tmp", tmp_path / ".notes.tmp"
    for path in (gone, mine, other):
        path.write_text("weights")
    files.write(tmp_path / "x.txt", "text")
    assert not gone.exists() and mine.exists() and other.exists()


def test_what_another_machine_writes_is_left_alone(tmp_path):
    """A folder that machines share: their processes have numbers of their own."""
    import socket
    import subprocess

    with subprocess.Popen(["true"]) as done:
        done.wait()
    theirs, ours = (tmp_path / f".w.safetensors.@{host}.{done.pid}-abc.tmp" for host in ("another-host.example", socket.gethostname()))
    for path in (theirs, ours):
        path.write_text("weights")
    files.write(tmp_path / "x.txt", "text")
    assert theirs.exists() and not ours.exists()


def test_ids_stay_in_the_folder_of_a_recipe(tmp_path):
    from expunge.modalities.examples import Examples
    from expunge.modalities.files.selectors import resolve

    (tmp_path / "in").mkdir()
    for path in (tmp_path / "ids.txt", tmp_path / "in" / "ids.txt"):
        path.write_text("1\n")
    data = Examples(torch.zeros(3, 2), torch.arange(3), torch.arange(3))
    assert resolve("ids:@ids.txt", data, tmp_path / "in", inside=True)[0].ids.tolist() == [1]
    assert resolve("ids:@../ids.txt", data, tmp_path / "in")[0].ids.tolist() == [1]
    for out in ("../ids.txt", str(tmp_path / "ids.txt")):
        with pytest.raises(DataError, match="leaves the folder"):
            resolve(f"ids:@{out}", data, tmp_path / "in", inside=True)
