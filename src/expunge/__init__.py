"""expunge: machine unlearning with proof.

    verdict = expunge.forget(model, expunge.classification(), expunge.Split(forget, retain, test, validation))

Public names are imported on first use, so that `import expunge` stays light; `__init__.pyi` names them for type checkers. Where they live, and what may import
what: docs/architecture.md.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "Batches": "core.types",
    "Out": "core.types",
    "Scope": "core.types",
    "Split": "core.types",
    "Task": "core.types",
    "Hook": "core.edits",
    "LowRank": "core.edits",
    "Replace": "core.edits",
    "Patch": "core.patch",
    "edit": "core.session",
    "placed": "core.machine.devices",
    "Guard": "core.guard",
    "CHECKS": "core.registry",
    "METHODS": "core.registry",
    "check": "core.registry",
    "method": "core.registry",
    "MODALITIES": "core.modality",
    "Modality": "core.modality",
    "modality": "core.modality",
    "descend": "parts.updates.descend",
    "alternate": "parts.updates.descend",
    "lora": "parts.scopes.lora",
    "Examples": "modalities.examples",
    "Pictures": "modalities.pictures",
    "Texts": "modalities.language.texts",
    "Format": "modalities.language.records.format",
    "world": "modalities.worlds",
    "split": "modalities.files.division",
    "classification": "modalities.classification.task",
    "regression": "modalities.regression.task",
    "causal_lm": "modalities.language.task",
    "diffusion": "modalities.diffusion.task",
    "gan": "modalities.gan.task",
    "image_to_image": "modalities.image_to_image.task",
    "contrastive": "modalities.contrastive.task",
    "text_classification": "modalities.text_classification.task",
    "multilabel": "modalities.multilabel.task",
    "serve": "modalities.language.guards.serve",
    "unlearn": "engine.run",
    "Attempt": "engine.run",
    "audit": "audits.core",
    "Row": "audits.core",
    "Probe": "audits.core",
    "gate": "audits.core",
    "untrac": "audits.influence",
    "exact": "guarantees.exact",
    "certified": "guarantees.certified",
    "streams": "guarantees.streams",
    "plan": "planning.plan",
    "forget": "planning.plan",
    "audited": "planning.outcome",
    "Verdict": "planning.outcome",
    "sanity": "planning.sanity",
    "opened": "planning.opening",
}
"""Public name -> where it lives under `expunge`; the last three of guarantees are packages."""

_PACKAGES = ("exact", "certified", "streams")

__all__ = ["__version__", *sorted(_WHERE)]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'expunge' has no attribute '{name}'")
    module = importlib.import_module(f"expunge.{_WHERE[name]}")
    return module if name in _PACKAGES else getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
