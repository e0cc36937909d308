"""The journal: atomic checkpoints of a run, so that one killed at any moment resumes to the bit-identical result.

A run is a fixed sequence of training phases (calls of `alternate`). On resume the method is called again from its start; what lies between
phases (masks, teachers, caches) is recomputed, being a pure function of model, data and seed; a finished phase is loaded instead of
trained, and the phase that was cut short goes on at its last checkpoint with the same optimiser state and RNG.

Files: `phase-0000.safetensors` for each finished phase, and the two newest `step-0000-00000025.safetensors`. Each carries the identity of its
run and a SHA-256; one that does not read back is skipped with a warning.
"""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expunge.core.errors import ExpungeError, JournalError
from expunge.core.files import file_digest, write
from expunge.core.machine import devices


@dataclass
class Journal:
    """Checkpoints of one run in one folder. `identity` names the run: model, data, method, settings, seed. `every`: steps between checkpoints.

    In all functions `session` is a `core.session.Session` and `watch` the `core.guard.Guard` of the run.
    """

    folder: Path
    identity: str
    every: int = 25

    def resume(self, session: Any, stepper: torch.optim.Optimizer, losses: list[float], watch: Any) -> int:
        """Load what is there for the phase `watch.phase`; returns the step to go on at (a number past all steps if it is finished)."""
        done = self._read(self.folder / f"phase-{watch.phase:04d}.safetensors")
        if done is not None:
            self._restore(done, session, None, losses, watch)
            return 1 << 60
        for path in sorted(self.folder.glob(f"step-{watch.phase:04d}-*.safetensors"), reverse=True):
            found = self._read(path)
            if found is not None:
                self._restore(found, session, stepper, losses, watch)
                return int(found[0]["step"])
        return 0

    def step(self, session: Any, stepper: torch.optim.Optimizer, losses: list[float], watch: Any, done: int) -> None:
        """Write a checkpoint when one is due, and drop all but the newest two."""
        if done % self.every:
            return
        tensors = _state(session, watch)
        numbers: dict[str, Any] = {}
        for k, (p, steered) in enumerate(zip(session.params.values(), stepper.param_groups[0]["params"], strict=True)):
            if steered is not p:
                tensors[f"master.{k}"] = steered
            for name, value in stepper.state.get(steered, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"opt.{k}.{name}"] = value.detach()
                elif value is not None:
                    numbers[f"{k}.{name}"] = value
        self._write(f"step-{watch.phase:04d}-{done:08d}", tensors, losses, watch, step=done, numbers=numbers)
        for old in sorted(self.folder.glob("step-*.safetensors"))[:-2]:
            old.unlink(missing_ok=True)

    def close(self, session: Any, losses: list[float], watch: Any) -> None:
        """The phase is finished: write its end state and count on."""
        if not (self.folder / f"phase-{watch.phase:04d}.safetensors").exists():
            self._write(f"phase-{watch.phase:04d}", _state(session, watch), losses, watch, step=0, numbers={})
        watch.phase += 1

    def clear(self) -> None:
        """The run is finished and its patch is safe: its checkpoints, which hold the forgotten knowledge, go. Raises JournalError where they cannot."""
        try:
            for path in self.folder.glob("*.safetensors"):
                if re.fullmatch(r"((phase|step)-[\d-]+|reference-[0-9a-f]{32})\.safetensors", path.name):
                    path.unlink(missing_ok=True)
            if self.folder.is_dir() and not any(self.folder.iterdir()):
                self.folder.rmdir()
        except OSError as error:
            raise JournalError(f"cannot remove the checkpoints in {self.folder.name}, which hold what was forgotten: {error.strerror or error}") from error

    def _write(self, name: str, tensors: dict[str, Tensor], losses: list[float], watch: Any, **facts: Any) -> None:
        from safetensors.torch import save

        meter = {k: getattr(watch.meter, k) for k in ("forward", "backward", "steps", "gradient", "seen")}
        best = None if watch.best is None else watch.best[0]
        doc = {"identity": self.identity, "losses": losses, "meter": meter, "scores": watch.scores, "best": best, "stopped": watch.stopped, **facts}
        body = json.dumps(doc)
        tensors = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}
        write(self.folder / f"{name}.safetensors", save(tensors, {"journal": body, "sha256": file_digest(body, tensors)}), JournalError)

    def _read(self, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        from safetensors import SafetensorError, safe_open

        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as f:
                header = f.metadata() or {}
                tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
            if file_digest(header["journal"], tensors) != header["sha256"]:
                raise SafetensorError("content does not match its checksum")
            doc = json.loads(header["journal"])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            warnings.warn(f"checkpoint {path.name} is damaged and was skipped ({error})", stacklevel=2)
            return None
        if doc["identity"] != self.identity:
            raise ExpungeError(f"{self.folder.name} holds checkpoints of another run (other model, data, method, settings or seed); use an empty folder")
        return doc, tensors

    def _restore(self, found: tuple[dict, dict], session: Any, stepper: torch.optim.Optimizer | None, losses: list[float], watch: Any) -> None:
        doc, tensors = found
        mine = session.tensors()
        with torch.no_grad():
            for name, tensor in mine.items():
                tensor.copy_(tensors[f"net.{name}"])
        devices.redrawn({n[4:]: t for n, t in tensors.items() if n.startswith("rng.")})
        losses.extend(doc["losses"])
        for name, value in doc["meter"].items():
            setattr(watch.meter, name, value)
        watch.meter.drawn = set(tensors["drawn"].tolist()) if "drawn" in tensors else set()
        watch.scores, watch.stopped = list(doc["scores"]), doc["stopped"]
        if doc["best"] is not None:
            watch.best = (doc["best"], {n[5:]: t for n, t in tensors.items() if n.startswith("best.")})
        if stepper is not None:
            params = stepper.param_groups[0]["params"]
            for key, value in doc["numbers"].items():
                k, name = key.split(".", 1)
                stepper.state[params[int(k)]][name] = value
            for key, value in tensors.items():
                if key.startswith("master."):
                    params[int(key[7:])].copy_(value)
                if key.startswith("opt."):
                    _, k, name = key.split(".", 2)
                    stepper.state[params[int(k)]][name] = value.to(params[int(k)].device if value.ndim else devices.HOST)


def _state(session: Any, watch: Any) -> dict[str, Tensor]:
    best = {} if watch.best is None else {f"best.{n}": t for n, t in watch.best[1].items()}
    drawn = torch.tensor(sorted(watch.meter.drawn), dtype=torch.int64)
    return {**{f"net.{n}": t for n, t in session.tensors().items()}, **best, **{f"rng.{n}": t for n, t in devices.drawn().items()}, "drawn": drawn}
