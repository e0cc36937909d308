"""Many independent jobs through one function: shards, shadow models, sweeps, cells of a benchmark.

    map_jobs(train_shard, shards, workers=2)                  # processes of this machine
    map_jobs(train_shard, shards, workers=2, engine="ray")    # the same jobs, the same results, through Ray (extra [scale])

A worker that dies (killed, out of memory) costs its job one try, and the job runs again elsewhere. Function, jobs and results are pickled between
own processes alone; nothing pickled is written to disk or read from it.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import pickle  # noqa: S403 (between own processes alone)
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from expunge.core.errors import JobError, SettingError, suggest

J = TypeVar("J")
R = TypeVar("R")

ENGINES = ("local", "ray")
Progress = Callable[[str, int, int], None]


def map_jobs(
    fn: Callable[[J], R], jobs: Iterable[J], *, workers: int = 1, engine: str = "local", retries: int = 2, progress: Progress | None = None
) -> list[R]:  # fmt: skip
    """[fn(job) for job in jobs], each on one torch thread, in the order of `jobs`, bit for bit the same for every engine and number of workers.

    fn        an importable function (a module's own, or `functools.partial` of one); what it gives may depend on its job alone
    workers   jobs at a time, 1 or more; 1 with the local engine runs in this process
    engine    `local`: processes started afresh ("spawn"); `ray`: Ray, on the cluster of this process if it has connected to one, else on one of this
              machine that ends with the call
    retries   how often a job whose process died is run again, 0 or more
    progress  called as progress("", done, of how many), once per finished job

    The first exception of fn, in the order of finishing, is raised as it is and not tried again; jobs not begun then are dropped, local ones under way
    end first. Raises JobError when a job's process died 1 + retries times, SettingError for settings out of range, an unknown engine, Ray not installed,
    or what cannot be pickled.

    >>> map_jobs(len, [[1, 2], [], [3]])
    [2, 0, 1]
    """
    jobs = list(jobs)
    if workers < 1 or retries < 0:
        raise SettingError(f"workers must be 1 or more and retries 0 or more, not {workers} and {retries}")
    if engine not in ENGINES:
        raise SettingError(suggest("there is no engine", engine, ENGINES))
    if engine == "ray" and importlib.util.find_spec("ray") is None:
        raise SettingError("engine 'ray' needs Ray, which is not installed; install expunge[scale], or take engine 'local'")
    if engine == "local" and workers == 1:
        finished = ((k, _one_thread(fn, job)) for k, job in enumerate(jobs))
    else:
        finished = (_ray if engine == "ray" else _local)(fn, jobs, min(workers, max(1, len(jobs))), retries)
    results: dict[int, R] = {}
    for k, result in finished:
        results[k] = result
        if progress:
            progress("", len(results), len(jobs))
    return [results[k] for k in range(len(jobs))]


def _one_thread(fn: Callable[[J], R], job: J) -> R:
    """fn(job) on one torch thread; this process has as many as before after it."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return fn(job)
    finally:
        torch.set_num_threads(threads)


def _pack(fn: Callable, k: int, job: Any) -> bytes:
    """Function and job for another process. Tensors go as plain bytes: torch's own way shares open files, of which a process has few."""
    try:
        return pickle.dumps((fn, job))
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise SettingError(f"job {k} cannot go to another process: {error}; take a function at the top of a module, and jobs of plain data") from None


def _work(packed: bytes) -> bytes:
    """One job, in a process of its own. A function that needs no torch does not wait for its import."""
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    fn, job = pickle.loads(packed)  # noqa: S301 (our own parent packed it)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    return pickle.dumps(fn(job))


def _unpack(result: bytes) -> Any:
    return pickle.loads(result)  # noqa: S301 (our own child packed it)


def _died(k: int, job: Any, tries: int) -> JobError:
    text = repr(job).replace("\n", " ")
    text = text if len(text) <= 80 else text[:77] + "..."
    return JobError(f"the process of job {k} ({text}) died {tries} time(s), as when it is killed or memory runs out; run fewer workers, or smaller jobs")


def _local(fn: Callable[[J], R], jobs: Sequence[J], workers: int, retries: int) -> Iterator[tuple[int, R]]:
    """(number, result) as jobs finish, in processes. A dead process breaks its whole pool, so each has a pool of its own, and only its own job is lost."""
    todo, tries, context = list(range(len(jobs)))[::-1], [0] * len(jobs), multiprocessing.get_context("spawn")
    pools, running = [ProcessPoolExecutor(1, context) for _ in range(workers)], dict[Future, tuple[int, int]]()
    idle = list(range(workers))
    try:
        while todo or running:
            while todo and idle:
                k, slot = todo.pop(), idle.pop()
                running[pools[slot].submit(_work, _pack(fn, k, jobs[k]))] = k, slot
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                k, slot = running.pop(future)
                idle.append(slot)
                if isinstance(future.exception(), BrokenProcessPool):
                    tries[k] += 1
                    if tries[k] > retries:
                        raise _died(k, jobs[k], tries[k])
                    pools[slot].shutdown()
                    pools[slot] = ProcessPoolExecutor(1, context)
                    todo.append(k)
                else:
                    yield k, _unpack(future.result())
    finally:
        for pool in pools:
            pool.shutdown(cancel_futures=True)


def _ray(fn: Callable[[J], R], jobs: Sequence[J], workers: int, retries: int) -> Iterator[tuple[int, R]]:
    """(number, result) as jobs finish, on Ray's workers, which Ray starts anew when one dies."""
    import ray  # pyright: ignore[reportMissingImports]
    from ray import exceptions  # pyright: ignore[reportMissingImports]

    mine = not ray.is_initialized()
    if mine:
        _start(ray, workers)
    running: dict[Any, int] = {}
    try:
        remote = ray.remote(_caught).options(num_cpus=1, max_retries=retries, retry_exceptions=False)
        todo = list(range(len(jobs)))[::-1]
        while todo or running:
            while todo and len(running) < workers:
                k = todo.pop()
                running[remote.remote(_pack(fn, k, jobs[k]))] = k
            for ref in ray.wait(list(running), num_returns=1)[0]:
                k = running.pop(ref)
                try:
                    result, error = ray.get(ref)
                except (exceptions.WorkerCrashedError, exceptions.OutOfMemoryError):
                    raise _died(k, jobs[k], retries + 1) from None
                if error is not None:
                    raise error
                yield k, _unpack(result)
    finally:
        for ref in running:
            ray.cancel(ref, force=True)
        if mine:
            ray.shutdown()


def _caught(packed: bytes) -> tuple[bytes, Exception | None]:
    """`_work` with its exception as a value: Ray would raise a class of its own."""
    try:
        return _work(packed), None
    except Exception as error:
        error.add_note(traceback.format_exc())
        return b"", error


def _start(ray: Any, workers: int) -> None:
    """A cluster of this machine and this call: no dashboard, no usage statistics, workers that import what this process can import."""
    path = os.pathsep.join(os.path.abspath(p) for p in sys.path)
    ours = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "PYTHONPATH": path}
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        ray.init("local", num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level="error")
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
