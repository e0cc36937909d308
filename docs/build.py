"""Writes the pages that follow from the code: docs/methods/*.md, docs/checks.md, docs/cli.md and the method table of README.md.

python docs/build.py            write what is stale
python docs/build.py --check    write nothing; exit 1 and name the stale files
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

from expunge.core.registry import CHECKS, METHODS, Method

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
HEADINGS = ("Paper", "Forgets", "Needs", "Scope", "Forget", "Retain", "Update", "Leaves", "Settings", "Differs", "Check")
"""What every method's manual must say. `Code` is there when code was published."""
NOTE = "<!-- written by docs/build.py; edit the source instead -->\n\n"
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
    head = f"# {method.name}\n\n{NOTE}{summary(method.manual)}\n\n{facts}\n"
    return f"{head}\n## Settings\n\n{table}\n\nThe tests run it on small worlds with {toy}.\n\n## Manual\n\n```text\n{method.manual}\n```\n"


def method_table(folder: str) -> str:
    """One row per method; links are relative to `folder`."""
    rows = [
        f"| [{m.name}]({folder}{m.name}.md) | {cell(summary(m.manual))} | {', '.join(m.tasks)} | {', '.join(m.needs)} | {m.assurance} |"
        for m in METHODS.values()
    ]
    return "\n".join(["| method | what it does | tasks | needs | assurance |", "|---|---|---|---|---|", *rows])


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
    return [name for name in out if name not in METHODS]


def cli_page() -> str:
    """Help of the command line and of each command; the methods' own commands are told on their pages."""
    root = help_of()
    parts = [f"# Command line\n\n{NOTE}```text\n{root}\n```\n"]
    parts += [f"## expunge {name}\n\n```text\n{help_of(name)}\n```\n" for name in commands(root)]
    return "\n".join(parts)


def between(text: str, marker: str, body: str) -> str:
    """`text` with what stands between <!-- marker --> and <!-- /marker --> replaced."""
    start, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    if text.count(start) != 1 or text.count(end) != 1:
        raise SystemExit(f"README.md must hold {start} and {end} once each")
    return text[: text.index(start) + len(start)] + f"\n{body}\n" + text[text.index(end) :]


def pages() -> dict[Path, str]:
    """Every generated file and what it must hold."""
    out = {DOCS / "methods" / f"{m.name}.md": method_page(m) for m in METHODS.values()}
    out[DOCS / "methods" / "index.md"] = f"# Methods\n\n{NOTE}{method_table('')}\n"
    out[DOCS / "checks.md"] = checks_page()
    out[DOCS / "cli.md"] = cli_page()
    out[ROOT / "README.md"] = between((ROOT / "README.md").read_text(), "methods", method_table("docs/methods/"))
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
