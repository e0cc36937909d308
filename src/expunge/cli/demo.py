"""expunge demo, demo-llm, demo-images."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from expunge.cli import exact as exactly
from expunge.cli.shown import Json, bar, show


def demo(
    out: str = "expunge-demo", seeds: int = 3, as_json: Json = False,
    exact: Annotated[bool, typer.Option("--exact", help="Exact deletion: 50 requests, one after another, served by four designs; into OUT-exact.")] = False,
) -> None:  # fmt: skip
    """Forget a class, and records with wrong labels, of real digits, audited against retraining. Takes one to two minutes."""
    if exact:
        with bar(as_json) as progress:
            return exactly.demo(f"{out}-exact", as_json=as_json, progress=progress)
    from rich.console import Console

    from expunge.demos import digits

    with bar(as_json) as progress:
        result = digits.demo(out, seeds=seeds, progress=progress)
    if as_json:
        show({**result, "scenarios": {k: {**v, "pictures": {}} for k, v in result["scenarios"].items()}}, True)
        return
    for document in result["scenarios"].values():
        show(document, False)
    Console().print("\n".join(digits.told(result, out)), markup=False, highlight=False)


def demo_llm(out: str = "expunge-demo-llm", as_json: Json = False) -> None:
    """Teach a small language model invented authors, forget two of them, keep the rest, prove it. Takes two to three minutes."""
    from expunge.demos import language

    if result := _demonstrated(language.demo, out, as_json):
        print("\n".join(language.told(result, out)))


def demo_images(out: str = "expunge-demo-images", as_json: Json = False) -> None:
    """Teach a small diffusion model to draw shapes in four styles, erase one style, keep the rest, prove it. Takes some six minutes, a second run two."""
    from expunge.demos import pictures

    if result := _demonstrated(pictures.demo, out, as_json):
        print("\n".join(pictures.told(result, out)))


def _demonstrated(job: Any, out: str, as_json: bool) -> dict[str, Any] | None:
    """What a demo of one request gave, its report shown; None where that was JSON, which is all there is to print."""
    with bar(as_json) as progress:
        result = job(out, progress=progress)
    if as_json:
        show({**result, "document": {**result["document"], "pictures": {}}}, True)
        return None
    show(result["document"], False)
    return result
