"""map_jobs: order, equality over workers and engines, killed workers, errors as they are, bad settings."""

from __future__ import annotations

import functools
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from expunge.core.errors import ExpungeError, SettingError
from expunge.engine import jobs
from expunge.engine.jobs import JobError, map_jobs


def trained(seed: int) -> dict[str, Any]:
    """The weights of a small network after a few steps. torch is imported inside, so that the processes of the other jobs start quickly."""
    import torch

    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(400, 64, generator=g), torch.randint(3, (400,), generator=g)
    w = [torch.randn(a, b, generator=g).div_(a**0.5).requires_grad_() for a, b in ((64, 128), (128, 3))]
    for _ in range(5):
        grads = torch.autograd.grad(torch.nn.functional.cross_entropy((x @ w[0]).relu() @ w[1], y), w)
        w = [(p - 0.1 * d).detach().requires_grad_() for p, d in zip(w, grads, strict=True)]
    return {"first": w[0].detach(), "second": w[1].detach(), "threads": torch.tensor(torch.get_num_threads())}


def mortal(folder: Path, job: tuple[str, int]) -> tuple[str, int]:
    """Kills its own process the first `deaths` times; gives its name and how often it was begun."""
    name, deaths = job
    mark = folder / name
    mark.write_text(mark.read_text() + "x" if mark.exists() else "x")
    begun = len(mark.read_text())
    if begun <= deaths:
        os.kill(os.getpid(), signal.SIGKILL)
    return name, begun


def picky(folder: Path, job: int) -> int:
    with (folder / str(job)).open("a") as f:
        f.write("x")
    if job == 1:
        raise SettingError("no ones, please")
    return job


def spoilt(job: list[int]) -> list[int]:
    job.append(0)
    return job


def same(a: list[dict], b: list[dict]) -> bool:
    import torch

    return all(x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x) for x, y in zip(a, b, strict=True))


def test_processes_give_the_same_bits_in_order(tmp_path):
    """Also when a process is killed: only the job that it ran is begun again."""
    import torch

    threads, said = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        here = map_jobs(trained, range(3), progress=lambda *news: said.append(news))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert said == [("", 1, 3), ("", 2, 3), ("", 3, 3)] and not same(here[:1], here[1:2])
    assert same(here, map_jobs(trained, range(3), workers=2))
    some = [("a", 0), ("b", 2), ("c", 0), ("d", 0)]
    assert map_jobs(functools.partial(mortal, tmp_path), some, workers=2, retries=2) == [("a", 1), ("b", 3), ("c", 1), ("d", 1)]


def test_a_job_that_always_dies_is_named(tmp_path):
    with pytest.raises(JobError, match=r"process of job 1 \(\('b', 9\)\) died 2 time\(s\)") as caught:
        map_jobs(functools.partial(mortal, tmp_path), [("a", 0), ("b", 9)], workers=2, retries=1)
    assert (tmp_path / "b").read_text() == "xx" and (tmp_path / "a").read_text() == "x"
    assert isinstance(caught.value, ExpungeError) and "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_exception_is_raised_as_it_is_and_not_tried_again(workers, tmp_path):
    with pytest.raises(SettingError, match="no ones, please"):
        map_jobs(functools.partial(picky, tmp_path), [1, 1, 1, 1, 1, 1][: 2 * workers], workers=workers, retries=5)
    assert 1 <= len((tmp_path / "1").read_text()) <= workers


def test_bad_settings(monkeypatch):
    for options in ({"workers": 0}, {"retries": -1}):
        with pytest.raises(SettingError, match="workers must be 1 or more and retries 0 or more"):
            map_jobs(abs, [1], **options)
    with pytest.raises(SettingError, match="there is no engine 'rya'; did you mean 'ray'"):
        map_jobs(abs, [1], engine="rya")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SettingError, match=r"install expunge\[scale\]"):
        map_jobs(abs, [1], engine="ray")
    with pytest.raises(SettingError, match="job 0 cannot go to another process"):
        map_jobs(lambda job: job, [1], workers=2)
    assert map_jobs(abs, []) == [] == map_jobs(abs, [], workers=2)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_ray_gives_the_same_bits_and_outlives_killed_workers(tmp_path):
    ray = pytest.importorskip("ray")
    assert same(map_jobs(trained, range(3)), map_jobs(trained, range(3), workers=2, engine="ray"))
    assert not ray.is_initialized(), "what map_jobs started ends with the call"
    jobs._start(ray, 2)
    try:
        for name in ("first", "second", "third"):
            (tmp_path / name).mkdir()
        some = [("a", 0), ("b", 2), ("c", 0), ("d", 0)]
        found = map_jobs(functools.partial(mortal, tmp_path / "first"), some, workers=2, engine="ray", retries=2)
        assert found == [("a", 1), ("b", 3), ("c", 1), ("d", 1)]
        with pytest.raises(JobError, match=r"process of job 1 \(\('b', 9\)\) died 2 time\(s\)"):
            map_jobs(functools.partial(mortal, tmp_path / "second"), [("a", 0), ("b", 9)], workers=2, engine="ray", retries=1)
        with pytest.raises(SettingError, match="no ones, please"):
            map_jobs(functools.partial(picky, tmp_path / "third"), [0, 1], workers=1, engine="ray")
        assert (tmp_path / "third" / "1").read_text() == "x"
        assert map_jobs(spoilt, [[1]], engine="ray") == [[1, 0]]
        assert ray.is_initialized(), "a cluster that was there stays"
    finally:
        ray.shutdown()
