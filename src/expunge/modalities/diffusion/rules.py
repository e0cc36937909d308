"""The default gate of diffusion models."""

from __future__ import annotations

from typing import Any

from expunge.modalities.judge import renamed, target


def rules(p: Any) -> dict[str, str]:
    """The concept is drawn no more, under its own and (where test has any) under other names, and at most one in twenty of the others is lost. Without a
    judge: at most a quarter of what told the concept from its anchor is left, and retained prompts moved by at most a tenth. Both, with a judge that was
    tried on no held-out images: it does not stand alone."""
    predicted = {"redirection.left": "<= 0.25", **({} if p.split.retain is None else {"redirection.shift": "<= 0.1"})}
    if p.task.judge is None:
        return predicted
    judge: Any = p.task.judge()
    kept = {} if judge.right else predicted
    if kept and p.split.retain is None:  # nothing says what else could be drawn
        return kept
    domains = list(judge.names)
    other = {} if len(domains) < 2 else {"canvas.cra_drop": "<= 0.05"}
    alias = {"canvas.alias": "<= 0.2"} if renamed(p.split, *target(p.split, domains)) else {}
    return {**kept, "canvas.ua": ">= 0.9", **alias, "canvas.ira_drop": "<= 0.05", **other}
