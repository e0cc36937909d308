"""The picture of docs/architecture.md, drawn from the import contract in pyproject.toml and the first line of each room. `docs/build.py` writes it."""

from __future__ import annotations

import ast
import tomllib
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "expunge"
WIDTH, HIGH, STEP, LEFT = 860, 46, 54, 40


def floors() -> list[str]:
    """Rooms from the top floor to the ground, as the contract lists them."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    return [room for room in next(c for c in contracts if c["id"] == "floors")["layers"] if not room.startswith("__")]


def about(room: str) -> str:
    """The first sentence of the room's docstring."""
    text = ast.get_docstring(ast.parse((SOURCE / room / "__init__.py").read_text())) or ""
    return text.split("\n")[0]


def inner(room: str) -> list[str]:
    """Rooms of the room, and files where it has none."""
    folders = sorted(p.name for p in (SOURCE / room).iterdir() if (p / "__init__.py").exists())
    return [f"{name}/" for name in folders] or sorted(p.stem for p in (SOURCE / room).glob("*.py") if p.stem != "__init__")


def picture() -> str:
    """An SVG: one floor per room, the arrow says which way imports go."""
    rooms = floors()
    height = STEP * len(rooms) + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" role="img" aria-label="The rooms of expunge">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="4" refY="4" markerWidth="8" markerHeight="8" orient="auto">',
        '<path d="M0 0L8 4L0 8z" fill="#444"/></marker></defs>',
        f'<line x1="16" y1="14" x2="16" y2="{height - 18}" stroke="#444" stroke-width="1.5" marker-end="url(#tip)"/>',
    ]
    for k, room in enumerate(rooms):
        y = 8 + k * STEP
        names = ", ".join(inner(room))
        cut = names if len(names) <= 116 else names[: names.rfind(",", 0, 112)] + ", …"
        parts += [
            f'<rect x="{LEFT}" y="{y}" width="{WIDTH - LEFT - 8}" height="{HIGH}" rx="5" fill="#f4f6f8" stroke="#8a97a6"/>',
            f'<text x="{LEFT + 12}" y="{y + 19}" font-size="14" font-weight="bold" fill="#1c2733">{escape(room)}/</text>',
            f'<text x="{LEFT + 122}" y="{y + 19}" font-size="12" fill="#1c2733">{escape(short(about(room)))}</text>',
            f'<text x="{LEFT + 122}" y="{y + 36}" font-size="11" fill="#5a6775">{escape(cut)}</text>',
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def short(text: str, most: int = 104) -> str:
    """The text, cut at a comma or a space where it is too long for its line."""
    return text if len(text) <= most else text[: max(text.rfind(", ", 0, most), text.rfind(" ", 0, most - 2))] + " …"
