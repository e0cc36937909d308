"""The command line; `cli.boundary` says what its exit codes mean. A command is imported when it is called, and nothing heavy before it runs."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import typer

COMMANDS = {
    "demo": ("demo", "Forget a class, and records with wrong labels, of real digits, audited against retraining. Takes one to two minutes."),
    "demo-llm": ("demo", "Teach a small language model invented authors, forget two of them, keep the rest, prove it. Takes two to three minutes."),
    "demo-images": (
        "demo",
        "Teach a small diffusion model to draw shapes in four styles, erase one style, keep the rest, prove it. Takes some six minutes, a second run two.",
    ),
    "plan": (
        "plan",
        "Say which methods are feasible with the parts at hand, what they may claim and cost. Example: expunge plan world:digits/train class:3",
    ),
    "forget": ("forget", "Unlearn, audit, gate: searches all feasible methods, or takes --method NAME with its settings (--keep 0.3)."),
    "retrain": ("retrain", "Train references that never saw what must go, with a record of how each came about, for --reference of forget and audit."),
    "run": ("forget", "Carry out a recipe file. Example: expunge run recipes/digits-class.toml"),
    "audit": ("audit", "Audit a patch, or weights from any other tool, against the model before and retrained references."),
    "select": ("audit", "Choose a forget set to audit on: the records that are hardest (or easiest) to forget, or that membership shows in most."),
    "apply": ("patch", "Write the weights with the patch applied, and OUT's inverse patch beside it (NAME.undo.safetensors), which restores every bit."),
    "revert": ("patch", "Apply an inverse patch: the weights before, bit for bit."),
    "inspect": ("patch", "Show what a patch file holds, after checking its digest (and signature)."),
    "methods": ("catalogue", "List all methods, or show one's manual page with its settings. Example: expunge methods salun"),
    "bench": (
        "catalogue",
        "Compare methods on a world (digits, cifar10, tofu-tiny, shapes, ...); writes OUT/WORLD.jsonl and OUT/WORLD.md, and goes on where it was stopped.",
    ),
}
"""Command -> file of this room, and the first paragraph of its help, which the list of commands shows without importing it."""

FREE = {"allow_extra_args": True, "ignore_unknown_options": True}


def _version(asked: bool) -> None:
    if asked:
        from expunge import __version__

        print(f"expunge {__version__}")
        raise typer.Exit


def application(called: Iterable[str] = COMMANDS) -> typer.Typer:
    """The command line with the commands that are called; the others stand there by name and first lines alone."""
    called = set(called)
    app = typer.Typer(
        no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False, help="Machine unlearning with proof. Start with: expunge demo",
        rich_markup_mode=None, context_settings={"max_content_width": 130},
    )  # fmt: skip

    @app.callback()
    def common(version: Annotated[bool, typer.Option("--version", help="Print the version and end.", is_eager=True, callback=_version)] = False) -> None:
        pass

    for name, (file, about) in COMMANDS.items():
        if name in called:
            command = getattr(importlib.import_module(f"expunge.cli.{file}"), name.replace("-", "_"))
            free = {"context_settings": FREE, "options_metavar": "MODEL REQUEST [OPTIONS]"} if name == "forget" else {}
            app.command(name, **free)(command)
        else:
            app.command(name, help=about)(lambda: None)
    return app


def commands(called: Iterable[str], words: Sequence[str]) -> Any:
    """The command line as it is called: where help is asked for, that of the kind of model that the words name."""
    found: Any = typer.main.get_command(application(called))
    if "--help" in words[1:] and (command := found.commands.get(words[0])) is not None:
        from expunge.cli.options import fitted, told

        fitted(command, words[0], told([w for w in words[1:] if w != "--help"]))
    return found


def __getattr__(name: str) -> Any:
    """`app`, the whole command line."""
    if name != "app":
        raise AttributeError(f"module 'expunge.cli.app' has no attribute '{name}'")
    return application()


def main() -> None:
    """Entry point: see `cli.boundary` for what its exit codes mean."""
    from expunge.cli.boundary import ended

    words = sys.argv[1:]
    called = COMMANDS if "_EXPUNGE_COMPLETE" in os.environ else words[:1]
    sys.exit(ended(lambda: commands(called, words)(standalone_mode=False), words))
