"""The command line. Exit code 0: passed; 1: the gate refused; 2: bad input. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import sys

import typer

from expunge.cli.audit import audit, select
from expunge.cli.catalogue import bench, methods
from expunge.cli.demo import demo, demo_images, demo_llm
from expunge.cli.forget import forget, run
from expunge.cli.patch import apply, inspect, revert
from expunge.cli.plan import plan

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Machine unlearning with proof. Start with: expunge demo",
    rich_markup_mode=None,
)  # fmt: skip
FREE = {"allow_extra_args": True, "ignore_unknown_options": True}

app.command()(demo)
app.command("demo-llm")(demo_llm)
app.command("demo-images")(demo_images)
app.command()(plan)
app.command(context_settings=FREE)(forget)
for command in (run, audit, select, apply, revert, inspect, methods, bench):
    app.command()(command)


def main() -> None:
    """Entry point: one line on standard error and exit code 2 for bad input."""
    from expunge.core.errors import ExpungeError

    try:
        app()
    except ExpungeError as error:
        print(f"expunge: {error}", file=sys.stderr)
        sys.exit(2)
