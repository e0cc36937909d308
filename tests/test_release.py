"""A run's folder is complete or not there, holds nothing of another run, and what it releases is what was audited."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from worlds import copied, digits

from expunge.core.edits import Replace
from expunge.core.errors import DataError, PatchError
from expunge.core.modality import Opened
from expunge.core.patch import Patch
from expunge.engine.run import Attempt
from expunge.modalities.files import models
from expunge.planning import folders, outcome, releasing
from expunge.planning.outcome import Try


def filled(out, text):
    with folders.fresh(out) as run:
        (run.made / "report.json").write_text(text)
        assert not run.place.exists()
    return run.place


def test_runs_stand_side_by_side_and_latest_names_the_newest(tmp_path):
    places = [filled(tmp_path / "out", str(k)) for k in range(3)]
    assert len(set(places)) == 3 and [(p / "report.json").read_text() for p in places] == ["0", "1", "2"]
    latest = tmp_path / "out" / "latest"
    assert latest.is_symlink() and not os.path.isabs(os.readlink(latest)) and folders.newest(tmp_path / "out").resolve() == places[-1].resolve()
    assert {p.name for p in (tmp_path / "out").iterdir()} == {*(p.name for p in places), "latest"}


def test_where_links_cannot_be_made_latest_is_a_text(tmp_path, monkeypatch):
    def never(*_, **__):
        raise OSError("no links here")

    monkeypatch.setattr("pathlib.Path.symlink_to", never)
    filled(tmp_path / "out", "a")
    place = filled(tmp_path / "out", "b")
    assert (tmp_path / "out" / "latest").read_text().strip() == place.name and folders.newest(tmp_path / "out") == place


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_run_that_ends_early_leaves_the_one_before_alone(tmp_path, error):
    before = filled(tmp_path / "out", "a")
    for out in (tmp_path / "out", tmp_path / "deep" / "er"):
        with pytest.raises(error), folders.fresh(out) as run:
            (run.made / "released").mkdir()
            raise error
    assert {p.name for p in (tmp_path / "out").iterdir()} == {before.name, "latest"} and folders.newest(tmp_path / "out").resolve() == before.resolve()
    assert not (tmp_path / "deep").exists()


def test_what_a_killed_run_left_is_swept_and_what_a_living_one_writes_is_not(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    names = [f".2026.{socket.gethostname()}.{pid}.tmp" for pid in (gone.pid, os.getppid())] + [f".2026.elsewhere.{gone.pid}.tmp"]
    for name in names:
        (tmp_path / name).mkdir()
    filled(tmp_path, "a")
    assert [(tmp_path / name).exists() for name in names] == [False, True, True]


def test_an_unfit_folder_is_found_before_the_run(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "taken" / "latest").mkdir(parents=True)
    for out, why in (("file", "is no folder"), ("file/in", "is no folder"), ("taken", "holds a folder called latest")):
        with pytest.raises(DataError, match=why):
            folders.fit(tmp_path / out)
    with pytest.raises(DataError, match="are needed"):
        folders.fit(tmp_path / "new", 1 << 62)
    assert folders.fit(tmp_path / "new" / "er", 1) == tmp_path / "new" / "er" and not (tmp_path / "new").exists()

    def never(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", never)
    with pytest.raises(DataError, match="cannot be written to: Read-only"):
        folders.fit(tmp_path)


def verdict_of(model, task, split, patch, passed=True):
    """A verdict whose one try left this patch."""
    after = copied(model)
    patch.apply(after)
    found = outcome.audited(model, after, task, split, attempt=Attempt("given", {}, 0, "ok", "", patch), slow=False, rules={"accuracy.forget": "<= 1"})
    one = found.tries[0]
    return replace(found, passed=passed, chosen=one if passed else None, reasons=[] if passed else ["no"])


@pytest.fixture(scope="module")
def world():
    model, task, split = digits()
    split = replace(split, forget=split.forget.take(range(20)), retain=split.retain.take(range(60)), test=split.test.take(range(60)), validation=None)
    name, tensor = next((n, p) for n, p in model.named_parameters() if p.ndim == 1)
    patches = [Patch((Replace(name, tensor.detach() + k),)).stamped(model, method="given") for k in (0.5, 1.0)]
    return model, task, split, patches


def opened(world, **changes):
    model, task, split, _ = world
    found = Opened(
        model, task, split, release=lambda v, folder, form: models.release(model, v.chosen.attempt.patch, folder), forms=("weights",),
        reload=lambda folder: models.plain(model, folder),
    )  # fmt: skip
    return replace(found, **changes)


def test_a_refused_second_run_stands_alone(world, tmp_path):
    model, task, split, patches = world
    first, document = releasing.finished(verdict_of(model, task, split, patches[0]), opened(world), tmp_path, "one")
    assert first.passed and document["release"]["bits"] and document["release"]["apart"] == 0 and document["release"]["records"] == 16
    here = tmp_path / "latest"
    assert {p.name for p in here.iterdir()} == {"report.html", "report.json", "patch.safetensors", "released"}
    twin = copied(model)
    patches[0].apply(twin)
    loaded = models.plain(model, here / "released")
    assert all(torch.equal(a, b) for a, b in zip(twin.state_dict().values(), loaded.state_dict().values(), strict=True))
    _, second = releasing.finished(verdict_of(model, task, split, patches[1], passed=False), opened(world), tmp_path, "two")
    assert {p.name for p in here.iterdir()} == {"report.html", "report.json"} and json.loads((here / "report.json").read_text())["title"] == "two"
    assert second["folder"] != document["folder"] and (tmp_path / document["folder"] / "released" / "model.safetensors").is_file()


def test_a_folder_that_is_not_what_was_audited_is_not_released(world, tmp_path):
    """The control: weights of another patch are written; the verdict is withdrawn, and what passed its gate is kept as a candidate."""
    model, task, split, patches = world
    wrong = opened(world, release=lambda v, folder, form: models.release(model, patches[1], folder), forms=("one", "two"))
    verdict, document = releasing.finished(verdict_of(model, task, split, patches[0]), wrong, tmp_path, "one")
    assert not verdict.passed and verdict.chosen is None and not any(t.passed for t in verdict.tries) and "released" not in document
    assert len(verdict.reasons) == 2 and "the folder written as two is not the model that was audited" in verdict.reasons[1]
    assert {p.name for p in (tmp_path / "latest").iterdir()} == {"report.html", "report.json", "candidate"}
    stored = json.loads((tmp_path / "latest" / "report.json").read_text())
    assert not stored["verdict"]["passed"] and "Not released" in stored["notes"][-1]
    right = replace(wrong, release=lambda v, folder, form: models.release(model, patches[0 if form == "two" else 1], folder))
    verdict, document = releasing.finished(verdict_of(model, task, split, patches[0]), right, tmp_path, "one")
    assert verdict.passed and document["release"]["form"] == "two" and "written as one is not" in document["release"]["told"]


def test_a_folder_that_a_report_is_saved_to_holds_no_patch_of_another(world, tmp_path):
    model, task, split, patches = world
    passed, refused = (verdict_of(model, task, split, patches[k], passed=not k) for k in range(2))
    passed.save(tmp_path)
    assert (tmp_path / "patch.safetensors").is_file()
    refused.save(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"report.html", "report.json"}
    passed.save(tmp_path)
    (tmp_path / "released").mkdir()
    passed.save(tmp_path, key=b"k")
    with pytest.raises(PatchError, match="holds what another run released"):
        refused.save(tmp_path)
    assert isinstance(passed.shown, Try) and json.loads((tmp_path / "report.json").read_text())["verdict"]["passed"]
