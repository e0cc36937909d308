"""One self-contained HTML page of text, a table and plots: for results that are no unlearning report."""

from __future__ import annotations

import html
from collections.abc import Sequence

STYLE = (
    "body{font:15px sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#39414d}table{border-collapse:collapse}"
    "td,th{padding:.25em .8em .25em 0;text-align:left;vertical-align:top;border-bottom:1px solid #e1e5ea}svg{max-width:100%;height:auto}"
)


def page(title: str, lines: Sequence[str], header: Sequence[str], rows: Sequence[Sequence[object]], plots: Sequence[tuple[str, str]]) -> str:
    """HTML text: paragraphs, then one table, then plots as (title, SVG). Everything but the SVG is escaped."""
    esc = html.escape
    head = "".join(f"<th>{esc(h)}</th>" for h in header)
    body = [f"<h1>{esc(title)}</h1>", *(f"<p>{esc(line)}</p>" for line in lines), f"<table><tr>{head}</tr>"]
    body += ["<tr>" + "".join(f"<td>{esc(str(c))}</td>" for c in row) + "</tr>" for row in rows]
    body += ["</table>", *(f"<h2>{esc(name)}</h2>{svg}" for name, svg in plots if svg)]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{esc(title)}</title><style>{STYLE}</style></head>'
        f"<body>{''.join(body)}</body></html>\n"
    )
