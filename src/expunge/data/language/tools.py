"""Tool demonstrations as splits: which records belong to a tool, and what must not be left in the others. Card tool-delete.

    demos = [demo for tool in authors.skills()["tools"] for demo in tool["demos"]]
    split = select(form, demos, forget=["weather"])

A demo is a record with its `tool`; `call` is its call string, where it has one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from expunge.core.errors import DataError, suggest
from expunge.core.types import Split
from expunge.modalities.language.records import format as text
from expunge.modalities.language.records.format import Format

Rows = Sequence[Mapping[str, Any]]


def by_tool(demos: Rows) -> dict[str, list[Mapping[str, Any]]]:
    """Tool -> its demos, in the order of their first one. Raises DataError naming a record without a tool, counted from 1."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for number, row in enumerate(demos, 1):
        if not row.get("tool"):
            raise DataError(f"record {number} names no tool")
        found.setdefault(str(row["tool"]), []).append(row)
    return found


def calls(answer: str, tool: str) -> bool:
    """Whether the answer calls the tool: its name stands before an opening bracket, and is not the end of a longer name.

    >>> calls('I look: weather (town="X")', "weather"), calls("seaweather(x)", "weather"), calls("the weather is fine", "weather")
    (True, False, False)
    """
    low, name = answer.casefold(), tool.casefold()
    for k in range(len(low)):
        before, after = low[k - 1 : k], low[k + len(name) :].lstrip()
        if low.startswith(name, k) and after[:1] == "(" and not (before.isalnum() or before == "_"):
            return True
    return False


def select(form: Format, demos: Rows, forget: Sequence[str], *, anchor: Rows | None = None, **parts: Rows) -> Split:
    """Split by whole tools: demos of the tools in `forget`, and those of all others as retain; other parts as in `text.split`.

    Raises DataError for an unknown tool, none or all of them, and a kept demo that calls a forgotten tool.
    """
    found = by_tool(demos)
    for name in forget:
        if name not in found:
            raise DataError(suggest("no tool", name, found))
    gone, kept = ([row for name, rows in found.items() if (name in forget) is side for row in rows] for side in (True, False))
    if not gone or not kept:
        raise DataError(f"forget must name some tools and leave some; there are {', '.join(found)}")
    for row in kept:
        if used := [name for name in forget if calls(str(row["answer"]), name)]:
            raise DataError(f"a demo of {row['tool']} calls {used[0]}, which is to be forgotten: '{row['question']}'; leave it out")
    return text.split(form, forget=gone, retain=kept, anchor=anchor, **parts)
