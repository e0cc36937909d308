"""Writes the pages that follow from the code: docs/methods/*.md, docs/papers.md, docs/checks.md, docs/cli.md.

python docs/build.py            write what is stale
python docs/build.py --check    write nothing; exit 1 and name the stale files
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expunge.core.registry import CHECKS, METHODS, Method

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))
import house  # noqa: E402

HEADINGS = ("Paper", "Forgets", "Needs", "Scope", "Forget", "Retain", "Update", "Leaves", "Settings", "Differs", "Check")
"""What every method's manual must say. `Code` is there when code was published."""
NOTE = "<!-- written by docs/build.py; edit the source instead -->\n\n"
PAPERS = """Every published system that this package was built from. Each has a card of its own, with formulas, settings, and where paper and code disagree.
A row says where its settings stand, what they are where our defaults differ (`--preset paper`, `METHODS[name].preset("paper")`, or `preset = "paper"` in a
recipe), and what our own tables measured. "Not given": the card holds none. "Our defaults": the published settings are our defaults. Settings of small
worlds differ from those of large models for a reason; a preset is for comparison.

A method is **stable** when it has a card, the card's checkable cases are tests here, it stands in a committed table of a valid world, and does there what its
paper claims; else it is experimental, and its page says why. The last is read from the [tables](benchmarks.md) so:

- classifiers: in at least half of its tables of valid worlds it closes 0.5 of the gap (KLOM) or more on every seed, with retain and test accuracy at most 3
  points below doing nothing (means), and in none does it cost 10 points or more;
- language models: D is below its critical value on every seed, utility is 95 % of before or more, and `drop.retain` at most 0.05 (check C1);
- diffusion models: in every table of three seeds UA is 98 or more, and the others (IRA, CRA) are at most 5 points below doing nothing;
- a method whose paper claims robustness, or to remove backdoors, is held to that, and one that our pages name as failing, on a kind of model or on a seed,
  is experimental.

A stable method's page says in which tables it holds, and what it does not do. Stable says nothing of your model: every run is audited all the same.
"""
_ENTRY = re.compile(r"    (\w+)  +(\S.*)")


def summary(manual: str) -> str:
    """The first line of a manual, which says what the method does."""
    return manual.splitlines()[0].strip()


def headings(manual: str) -> set[str]:
    """The headings of a manual: at the start of a line or after two spaces, followed by two spaces or the end of the line."""
    return {h for h in (*HEADINGS, "Code") if re.search(rf"(?:^|\s{{2,}}){h}(?:\s{{2,}}|$)", manual, re.MULTILINE)}


def explained(manual: str) -> dict[str, str]:
    """Setting -> what its line under `Settings` says; continuation lines are joined."""
    out: dict[str, str] = {}
    name, inside = "", False
    for line in manual.splitlines():
        if not line.startswith(" "):
            inside = line.strip() == "Settings"
        elif inside and (found := _ENTRY.fullmatch(line)):
            name = found[1]
            out[name] = found[2].strip()
        elif inside and name:
            out[name] += " " + line.strip()
    return out


def cell(text: object) -> str:
    """Text that can stand in a table."""
    return str(text).replace("|", "\\|")


def method_page(method: Method) -> str:
    """The manual as it stands in the module, and the settings with the defaults of the signature."""
    said = explained(method.manual)
    rows = [f"| `{n}` | {type(d).__name__} | `{d}` | {cell(said.get(n, ''))} |" for n, d in method.defaults.items()]
    said_of = {"Paper": (method.paper,), "Tasks": method.tasks, "Needs": method.needs, "Forgets": method.forgets, "Assurance": (method.assurance,)}
    facts = " ".join(f"{what}: {', '.join(values)}." for what, values in said_of.items())
    table = "\n".join(["| setting | type | default | meaning |", "|---|---|---|---|", *rows])
    toy = ", ".join(f"{k}={v}" for k, v in method.toy.items()) or "the defaults"
    by = f"[Stable](../papers.md), by {data('measured')[method.name]['holds']}." if method.stable else f"[Experimental](../papers.md): {method.reason}."
    head = f"# {method.name}\n\n{NOTE}{summary(method.manual)}\n\n{facts}\n\n{by}\n"
    return f"{head}\n## Settings\n\n{table}\n\nThe tests run it on small worlds with {toy}.\n\n## Manual\n\n```text\n{method.manual}\n```\n"


def method_table() -> str:
    """One row per method."""
    rows = [
        f"| [{m.name}]({m.name}.md) | {cell(summary(m.manual))} | {', '.join(m.tasks)} | {', '.join(m.needs)} | {m.assurance} | {standing(m)} |"
        for m in METHODS.values()
    ]
    return "\n".join(["| method | what it does | tasks | needs | assurance | standing |", "|---|---|---|---|---|---|", *rows])


def standing(method: Method) -> str:
    """Stable or experimental."""
    return "stable" if method.stable else "experimental"


def data(name: str) -> dict[str, Any]:
    """A TOML file beside this one."""
    return tomllib.loads((DOCS / f"{name}.toml").read_text())


def assigned(settings: Mapping[str, Any]) -> str:
    """Settings as name=value."""
    return ", ".join(f"`{n}={f'{v:g}' if isinstance(v, float) else v}`" for n, v in settings.items())


def published(method: Method) -> tuple[str, str]:
    """The settings as published, and ours of the same names."""
    if not method.published:
        return ("not given" if method.place.startswith(("the card names no place", "it has no card")) else "our defaults"), ""
    return assigned(method.published), assigned({n: method.defaults[n] for n in method.published})


def measured(rows: Mapping[str, Any], name: str) -> str:
    """What our tables say, in one phrase."""
    if name not in rows:
        return "not tabled"
    row = rows[name]
    read = ", ".join(f"{what} {value}" for what, value in zip(row["what"], row["value"], strict=True))
    return f"{row['world']}{f' ({found})' if (found := row.get('settings')) else ''}: {read}"


def papers_page() -> str:
    """A row per method and card, and one per card of which there is no method."""
    cards, tables = data("cards"), data("measured")
    rows = []
    for m in METHODS.values():
        named = ", ".join(card for card, of in cards.items() if m.name in of.get("methods", ())) or "none"
        cells = (f"[{m.name}](methods/{m.name}.md)", standing(m), named, m.paper, m.place, *published(m), measured(tables, m.name))
        rows.append(f"| {' | '.join(cell(c) for c in cells)} |")
    head = [
        "| method | standing | card | paper | where its settings stand | as published | our defaults | measured here |",
        "|---|---|---|---|---|---|---|---|",
    ]
    others = [
        f"| {card} | {cell(of['paper'])} | {'; '.join(of['here']) if 'here' in of else 'not implemented'} |"
        for card, of in cards.items()
        if "here" in of or not of.get("methods")
    ]
    more = ["| card | paper | here |", "|---|---|---|", *others]
    return "\n".join([f"# Papers\n\n{NOTE}{PAPERS}\n## Methods\n", *head, *rows, "\n## Audits, data, guarantees, and what is not here\n", *more]) + "\n"


def checks_page() -> str:
    """All checks: what they measure and what they need."""
    parts = []
    for check in CHECKS.values():
        about = (check.function.__doc__ or "").strip().split("\n\n")[0]
        needs = [*check.needs, *(["a retrained reference"] if check.reference else [])]
        slow = " It trains, so `--fast` audits leave it out." if check.slow else ""
        parts.append(f"## {check.name}\n\n{' '.join(about.split())}\n\nTasks: {', '.join(check.tasks)}. Needs: {', '.join(needs)}.{slow}\n")
    return f"# Checks\n\n{NOTE}" + "\n".join(parts)


def help_of(*command: str) -> str:
    """What `expunge COMMAND --help` prints, at a fixed width and without colour."""
    env = {**os.environ, "COLUMNS": "120", "TERMINAL_WIDTH": "120", "NO_COLOR": "1", "TERM": "dumb", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    run = "import sys; sys.argv[0] = 'expunge'; from expunge.cli.app import main; main()"
    done = subprocess.run([sys.executable, "-c", run, *command, "--help"], capture_output=True, text=True, env=env)
    if done.returncode:
        raise SystemExit(f"expunge {' '.join(command)} --help failed: {done.stderr.strip()[-400:]}")
    return "\n".join(line.rstrip() for line in done.stdout.strip("\n").splitlines())


def commands(text: str) -> list[str]:
    """The sub-commands that a help page lists, in its order: boxed (rich) or plain."""
    out, inside = [], False
    for line in text.splitlines():
        bare = line.strip("│| ").rstrip()
        if re.match(r"(╭─|\+-)? ?\w[\w ]*", line.strip()) and ("─" in line or line.endswith(":")):
            inside = "ommands" in line
        elif inside and (found := re.match(r"^[│|]? {1,2}([a-z][\w-]*)(\s|$)", line)) and bare:
            out.append(found[1])
    return out


def cli_page() -> str:
    """Help of the command line and of each command; the methods' own commands are told on their pages."""
    root = help_of()
    parts = [f"# Command line\n\n{NOTE}```text\n{root}\n```\n"]
    parts += [f"## expunge {name}\n\n```text\n{help_of(name)}\n```\n" for name in commands(root)]
    return "\n".join(parts)


def pages() -> dict[Path, str]:
    """Every generated file and what it must hold."""
    out = {DOCS / "methods" / f"{m.name}.md": method_page(m) for m in METHODS.values()}
    out[DOCS / "methods" / "index.md"] = f"# Methods\n\n{NOTE}{method_table()}\n"
    out[DOCS / "papers.md"] = papers_page()
    out[DOCS / "checks.md"] = checks_page()
    out[DOCS / "cli.md"] = cli_page()
    out[DOCS / "architecture.svg"] = house.picture()
    return out


def stale(wanted: dict[Path, str]) -> list[Path]:
    """Files that differ from what they must hold, and pages of methods that are gone."""
    differ = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    return differ + [path for path in sorted((DOCS / "methods").glob("*.md")) if path not in wanted]


def main() -> int:
    """Exit status: 0 when all is current or was written, 1 when --check found stale files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a page is stale")
    check = parser.parse_args().check
    wanted = pages()
    for path in stale(wanted):
        print(f"{'stale' if check else 'written'}: {path.relative_to(ROOT)}")
        if check:
            continue
        if path in wanted:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(wanted[path])
        else:
            path.unlink()
    if check and stale(wanted):
        print("run: make docs-write")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
