"""No space, a read-only disk: at each write of a command. One line, exit code 2, nothing half-written, checkpoints that stand are gone on from."""

from __future__ import annotations

import errno
import json
import os
import resource
from dataclasses import replace

import pytest
import test_command_lines
import test_release
from full import full
from test_cli_language import call, contents
from test_release import opened, verdict_of
from worlds import small

from expunge.bench import cells
from expunge.core import files, guard
from expunge.core.errors import DataError, ModelError, PatchError, unwritten
from expunge.core.patch import Patch
from expunge.core.registry import METHODS
from expunge.engine.run import unlearn
from expunge.modalities.language import checkpoints
from expunge.planning import folders, releasing

NET, home, world = test_command_lines.NET, test_command_lines.home, test_release.world
CODES = (errno.ENOSPC, errno.EROFS)
STEPS = ("--method", "fine_tune", "--epochs", "1", "--batch_size", "2", "--quick")


def log(name: str) -> bool:
    return name.endswith("run.log")


def test_a_full_disk_at_each_write_of_a_run(home, tmp_path):
    """The log aside, which a run goes on without: the command fails at every place where the disk fills up, and goes on from what stands there."""
    with full(tmp_path / "good", 0) as all_:
        code, out, _ = call(home, "forget", *NET, *STEPS, "--json", "--out", str(tmp_path / "good"))
    good, ended = json.loads(out), max(k for k, name in enumerate(all_) if "phase-" in name)
    assert code == 1 and (tmp_path / "good" / "latest" / "report.json").is_file()
    places = [k + 1 for k, name in enumerate(all_) if not log(name) and name not in all_[:k]]
    assert len(places) >= 10
    resumed = 0
    for number, n in enumerate(places):
        out, why = tmp_path / f"full-{n}", os.strerror(CODES[number % 2])
        with full(out, n, CODES[number % 2]):
            code, _, err = call(home, "forget", *NET, *STEPS, "--out", str(out))
        there = {p.name for p in out.iterdir()} if out.exists() else set()
        said = err.strip().splitlines()
        assert code == 2 and len(said) == 1 and why in said[0] and f"{out}/." not in said[0], (n, all_[n - 1], err)
        runs = there - {"checkpoints", "run.log"}
        assert not any(".tmp" in name for name in map(str, contents(out))), (n, contents(out).keys())
        if runs:
            (run,) = runs
            assert {"report.html", "report.json"} <= {p.name for p in (out / run).iterdir()} and f"the run is complete in {out / run}" in said[0]
        else:
            assert "cannot write" in said[0] or "cannot be written to" in said[0]
        stands = [name for name in all_[: n - 1] if "step-" in name and name.endswith(".safetensors")]
        if stands and n - 1 <= ended:
            assert (out / stands[-1]).is_file()
            resumed += 1
        if resumed == 1:
            resumed += 1
            code, again, _ = call(home, "forget", *NET, *STEPS, "--json", "--out", str(out))
            assert code == 1 and not (out / stands[-1]).exists()
            read = [[(r["name"], r["value"]) for t in d["tries"] for r in t["rows"] if not r["name"].startswith("cost")] for d in (json.loads(again), good)]
            assert read[0] == read[1]
    assert resumed > 2


@pytest.mark.parametrize("once", range(1, 4))
def test_a_checkpoint_that_cannot_be_written_fails_its_run_and_the_report_says_so(home, tmp_path, once):
    with full(tmp_path / "a", 0) as all_:
        call(home, "forget", *NET, *STEPS, "--out", str(tmp_path / "a"))
    n = [k + 1 for k, name in enumerate(all_) if "step-" in name or "phase-" in name][once]
    with full(tmp_path / "b", n, once=True):
        code, out, _ = call(home, "forget", *NET, *STEPS, "--json", "--out", str(tmp_path / "b"))
    (one,) = json.loads(out)["tries"]
    assert code == 1 and one["outcome"] == "failed" and "cannot write" in one["reason"] and "No space left on device" in one["reason"]


def test_a_run_goes_on_without_its_log_and_without_the_folder_of_its_checkpoints(home, tmp_path):
    with full(tmp_path / "a", 1, once=True):
        code, _, err = call(home, "forget", *NET, *STEPS, "--out", str(tmp_path / "a"))
    assert code == 1 and "Traceback" not in err and not (tmp_path / "a" / "latest" / "run.log").exists()
    model, task, split = small("classification")
    whole = unlearn("salun", model, task, split, epochs=4, batch_size=4)
    gone = []

    def told(text, done, total):
        if (tmp_path / "c").exists() and not gone:
            gone.extend(p.unlink() or p.name for p in (tmp_path / "c").iterdir())
            (tmp_path / "c").rmdir()

    attempt = unlearn("salun", model, task, split, folder=tmp_path / "c", checkpoint_every=1, progress=told, epochs=4, batch_size=4)
    assert gone and attempt.outcome == whole.outcome and attempt.patch is not None and attempt.patch.digest == whole.patch.digest


DATA = ("--model", "py:nets:tabular", "--weights", "w.safetensors")


@pytest.mark.parametrize("words", [
    ("apply", "p.safetensors", *DATA, "--out", "OUT/w2.safetensors"),
    ("select", *DATA, "--train", "csv:train.csv?target=label&id=name", "--size", "3", "--out", "OUT/ids.txt"),
], ids=lambda words: words[0])  # fmt: skip
def test_a_full_disk_at_each_write_of_a_command(home, tmp_path, words):
    def called(place):
        return call(home, *(w.replace("OUT", str(place)) for w in words))

    with full(tmp_path, 0) as all_:
        code, _, err = called(tmp_path / "good")
    assert code == 0, err
    made = sorted(contents(tmp_path / "good"))
    for n in range(1, len(all_) + 1):
        out = tmp_path / str(n)
        with full(out, n, CODES[n % 2]):
            code, _, err = called(out)
        files_ = [p for p in out.rglob("*") if not p.is_dir()] if out.exists() else []
        assert code == 2 and len(err.strip().splitlines()) == 1 and os.strerror(CODES[n % 2]) in err, (n, all_[n - 1], err)
        assert not files_, (n, all_[n - 1], files_)
    code, _, _ = called(tmp_path / "good2")
    assert code == 0 and len(contents(tmp_path / "good2")) == len(made)


def test_a_file_that_a_method_cannot_write_is_no_fault_of_the_method(tmp_path, monkeypatch):
    """The run failed, with its checkpoints kept; it is not refused as one that cannot work on this model."""
    model, task, split = small("classification")

    def some(model, task, split, *, epochs: float = 1.0, seed: int = 0) -> Patch:
        guard.current().journal.folder.mkdir()
        (guard.current().journal.folder / "step-0000-00000025.safetensors").write_bytes(b"stands")
        with full(tmp_path, 1):
            files.write(tmp_path / "own" / "statistics.safetensors", b"x")
        raise AssertionError

    monkeypatch.setitem(METHODS._found, "gradient_ascent", replace(METHODS["gradient_ascent"], function=some))
    attempt = unlearn("gradient_ascent", model, task, split, folder=tmp_path / "a")
    assert attempt.outcome == "failed" and "No space left on device" in attempt.reason
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["step-0000-00000025.safetensors"]


def test_folders_and_pairs_of_files_are_written_whole_or_not_at_all(tmp_path):
    def fill(made, *names):
        made.mkdir()
        for name in names:
            (made / name).write_text(name)

    with files.whole(tmp_path / "m", over=True) as made:
        fill(made, "a", "b")
    for n in (1, 2, 3, 4, 5):
        with pytest.raises(ModelError) as found, full(tmp_path, n), files.whole(tmp_path / "m", over=True) as made:
            fill(made, "a", "b", "new")
        assert unwritten(found.value) and "cannot write m: No space left on device" in str(found.value)
        assert {str(p) for p in contents(tmp_path)} == {"m", "m/a", "m/b"}
    (tmp_path / "m" / "notes").write_text("mine")
    for over in (True, False):
        with pytest.raises(ModelError, match=r"m (holds notes|is there already)") as found, files.whole(tmp_path / "m", over) as made:
            fill(made, "a", "b")
        assert not unwritten(found.value) and (tmp_path / "m" / "notes").read_text() == "mine"
    for n in (1, 2, 3, 4):
        with pytest.raises((PatchError, OSError)), full(tmp_path, n), files.together(tmp_path / "x", tmp_path / "y") as (x, y):
            x.write_text("1")
            y.write_text("2")
        assert not (tmp_path / "x").exists() or n == 4
        (tmp_path / "x").unlink(missing_ok=True)
        assert {p.name for p in tmp_path.iterdir()} == {"m"}


def test_a_language_model_s_folder_under_a_real_limit(tmp_path):
    """The kernel's own limit of a file's size, which also meets what no Python function writes."""
    model, _, _ = small("causal_lm")
    tokenizer = type("T", (), {"save_pretrained": lambda self, folder: None})()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(ModelError, match="cannot write m: File too large") as found:
            checkpoints.save(model, tokenizer, tmp_path / "m")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert unwritten(found.value) and not list(tmp_path.iterdir())
    assert (checkpoints.save(model, tokenizer, tmp_path / "m") / "config.json").is_file()


def test_what_passed_and_cannot_be_written_ends_in_2_and_is_kept(world, tmp_path):
    from expunge.cli.forget import closing
    from expunge.core.modality import named

    model, task, split, patches = world

    def release(verdict, folder, form):
        with full(tmp_path, 1):
            files.write(folder / "model.safetensors", b"x")

    verdict, document = releasing.finished(verdict_of(model, task, split, patches[0]), opened(world, release=release), tmp_path, "one")
    assert not verdict.passed and "No space left" in document["release"]["unwritten"] and "candidate" in document
    with pytest.raises(DataError, match=r"No space left on device.*what passed is kept in .*candidate"):
        closing(named("classification"), verdict, document, True)


def test_a_link_that_cannot_be_made_leaves_the_run_and_says_where(tmp_path):
    with folders.fresh(tmp_path) as run:
        (run.made / "report.json").write_text("1")
    with full(tmp_path, 0) as all_, folders.fresh(tmp_path) as run:
        (run.made / "report.json").write_text("2")
    with pytest.raises(DataError, match=r"the run is complete in .*latest cannot be made to point"), full(tmp_path, len(all_)), folders.fresh(tmp_path) as run:
        (run.made / "report.json").write_text("3")
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")] and len(list(tmp_path.glob("2*"))) == 3
    assert (folders.newest(tmp_path) / "report.json").read_text() == "2"


def test_a_benchmark_goes_on_after_a_line_that_was_cut_short(tmp_path):
    path = tmp_path / "d.jsonl"
    for k in range(3):
        cells.add(path, {"k": k})
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.warns(UserWarning, match="line 3 of d.jsonl is cut short"):
        assert list(cells.begun(path, lambda c: c["k"], lambda c: True)) == [0, 1]
    cells.add(path, {"k": 2})
    with pytest.warns(UserWarning, match="line 3 of d.jsonl"):
        assert list(cells.begun(path, lambda c: c["k"], lambda c: True)) == [0, 1, 2]
    path.write_text('{"other": 1}\n')
    with pytest.raises(DataError, match=r"line 1 of d.jsonl is no cell of this benchmark"):
        cells.begun(path, lambda c: c["k"], lambda c: True)
    with pytest.raises(DataError, match=r"cannot write d.jsonl: No space left on device; the cells before are kept"), full(tmp_path, 1):
        cells.add(path, {"k": 3})
