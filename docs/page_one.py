"""Draws docs/page-one.svg, the front page's picture: page one of a report as the terminal shows it.

expunge demo --out DIR && python docs/page_one.py DIR/class/report.json
"""

from __future__ import annotations

import argparse
import io
import json
import re
from pathlib import Path

from rich.console import Console

from expunge.report import table

WIDTH = 112
PICTURE = Path(__file__).resolve().parent / "page-one.svg"


def drawn(document: dict[str, object]) -> str:
    """SVG of page one: text, colours, no font from elsewhere."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(table.first(document, WIDTH))
    text = console.export_svg(title="expunge demo", unique_id="page-one")
    return re.sub(r"<!--.*?-->\n*|@font-face \{.*?\}\s*", "", text, flags=re.DOTALL)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="report.json of the demo")
    PICTURE.write_text(drawn(json.loads(parser.parse_args().report.read_text())))
