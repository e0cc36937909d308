"""expunge: machine unlearning with proof. Public names are imported on first use, so that `import expunge` stays light."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "Batches": "core.types",
    "Examples": "modalities.examples",
    "Out": "core.types",
    "Scope": "core.types",
    "Split": "core.types",
    "Task": "core.types",
    "Texts": "modalities.language.texts",
    "edit": "core.session",
    "Patch": "core.patch",
    "Replace": "core.edits",
    "LowRank": "core.edits",
    "Hook": "core.edits",
    "METHODS": "core.registry",
    "CHECKS": "core.registry",
    "method": "core.registry",
    "check": "core.registry",
    "Guard": "core.guard",
    "unlearn": "engine.run",
    "Attempt": "engine.run",
    "forget": "planning.plan",
    "plan": "planning.plan",
    "audit": "audits.core",
    "Row": "audits.core",
    "Probe": "audits.core",
    "gate": "audits.core",
    "classification": "modalities.classification.task",
    "regression": "modalities.regression.task",
    "world": "modalities.worlds",
    "descend": "parts.updates.descend",
    "alternate": "parts.updates.descend",
    "audited": "planning.outcome",
    "untrac": "audits.influence",
    "causal_lm": "modalities.language.task",
    "Format": "modalities.language.records.format",
    "serve": "modalities.language.guards.serve",
    "lora": "parts.scopes.lora",
}

__all__ = ["__version__", *sorted(_WHERE)]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'expunge' has no attribute '{name}'")
    return getattr(importlib.import_module(f"expunge.{_WHERE[name]}"), name)
