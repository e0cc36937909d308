"""expunge: machine unlearning with proof. Public names are imported on first use, so that `import expunge` stays light."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "Batches": "types", "Examples": "types", "Out": "types", "Scope": "types", "Split": "types", "Task": "types",
    "edit": "session", "Patch": "patch", "Replace": "patch", "LowRank": "patch", "METHODS": "registry", "CHECKS": "registry",
    "method": "registry", "check": "registry", "Guard": "guard", "unlearn": "run", "Attempt": "run", "forget": "plan", "plan": "plan",
    "audit": "audits.core", "Row": "audits.core", "Probe": "audits.core", "gate": "audits.core", "classification": "tasks.classification",
    "regression": "tasks.regression", "world": "bench.worlds", "descend": "updates.descend", "alternate": "updates.descend",
    "audited": "outcome", "untrac": "influence", "causal_lm": "tasks.causal_lm", "Texts": "types", "Format": "data.text", "Hook": "patch",
    "serve": "wraps.serve", "lora": "scopes.lora",
}  # fmt: skip

__all__ = ["__version__", *sorted(_WHERE)]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'expunge' has no attribute '{name}'")
    return getattr(importlib.import_module(f"expunge.{_WHERE[name]}"), name)
