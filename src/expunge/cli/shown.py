"""What commands share: the progress bar, the report on the terminal, keys, missing options."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from expunge.core.modality import DEVICE

Json = Annotated[bool, typer.Option("--json", help="Print strict JSON on standard output and nothing else.")]
Device = Annotated[str, typer.Option(help=DEVICE.help)]
Quick = Annotated[bool, typer.Option("--quick", help="Leave out checks and baselines that train, but for those the gate reads.")]
Require = Annotated[str, typer.Option(help="The grade that passes (exit code 0): supported, verified, or the highest that the kind of model can reach.")]
TWINS = (
    "Evidence without references, for requests of records: unseen records (--plants) are taught to this many copies of the model (10, say), which the same "
    "method makes forget them. Each costs a short training and a run of the method; the price is shown first."
)
Twins = Annotated[int, typer.Option(help=TWINS)]
Workers = Annotated[int, typer.Option(help="Twins at a time, each in a process of its own.")]
Anyway = Annotated[bool, typer.Option("--anyway", help="Go on where the model, as it is fed, is no better than chance on what must stay.")]
Key = Annotated[str, typer.Option("--key-file", help="File whose bytes sign (and check) patch and report.")]


@contextmanager
def bar(quiet: bool) -> Iterator[Any]:
    """A progress callable shown on standard error, which names what is under way, audits included; None when quiet."""
    if quiet:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from expunge.engine.log import heard

    with Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=Console(stderr=True), transient=True) as progress:
        line = progress.add_task("", total=None)
        with heard(lambda text: progress.update(line, description=text, completed=0, total=None), logging.DEBUG):
            yield lambda text, done, total: progress.update(line, description=text, completed=done, total=total)


def understood(opened: Any, anyway: bool, as_json: bool) -> None:
    """How the request was read and how good the model is as it is fed, a line each. Raises ModelError where it is near chance, but for `anyway`."""
    from expunge.core.errors import printable
    from expunge.planning import sanity

    found = sanity.checked(opened.model, opened.task, opened.split, anyway=anyway)
    for line in [] if as_json else [*opened.read, *([found.line] if found.line else []), *([f"BEWARE: {found.fault}"] if found.fault else [])]:
        print(printable(line))


def show(document: Any, as_json: bool) -> None:
    """The report's table, or JSON: that of a report without its pictures, sealed anew."""
    from expunge.parts import seal
    from expunge.report import table

    if as_json:
        if isinstance(document, dict):
            document = {k: v for k, v in document.items() if k not in ("pictures", *seal.SEAL)}
            document |= seal.seal(document) if "identity" in document else {}
        print(table.dump(document))
        return
    from rich.console import Console

    console = Console()
    console.print(table.show(document, console.width))


def wrote(written: list[str], as_json: bool) -> None:
    """The files that were written."""
    print(json.dumps({"written": written}) if as_json else "wrote " + " and ".join(written))


def needs(value: str, name: str) -> None:
    """Raises SettingError for an option that is not there."""
    from expunge.core.errors import SettingError

    if not value:
        raise SettingError(f"{name} is missing")


def key(path: str) -> bytes | None:
    """The bytes of a key file, None where none is named."""
    if not path:
        return None
    from expunge.core.errors import DataError, printable

    try:
        secret = Path(path).read_bytes()
    except OSError as error:
        raise DataError(printable(f"cannot read the key file {path}: {error.strerror}")) from None
    if not secret.strip():
        raise DataError(printable(f"the key file {path} is empty: whoever has no key could sign with it"))
    return secret
