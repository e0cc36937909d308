"""The manual pages say all they must, and the generated pages are those of the code as it stands."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from expunge.core.registry import CHECKS, METHODS

ROOT = Path(__file__).parent.parent
_spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build)

NAMES = sorted(METHODS)


@pytest.mark.parametrize("name", NAMES)
def test_every_heading_is_there(name):
    missing = set(build.HEADINGS) - build.headings(METHODS[name].manual)
    assert not missing, f"the manual of {name} lacks {', '.join(sorted(missing))}"


@pytest.mark.parametrize("name", NAMES)
def test_settings_section_and_signature_agree(name):
    said = build.explained(METHODS[name].manual)
    assert list(said) == list(METHODS[name].defaults), "same settings in the same order"
    assert all(said.values())


@pytest.mark.parametrize("name", NAMES)
def test_check_section_holds_an_example(name):
    manual = METHODS[name].manual
    assert re.search(r"^Check\n(.*\n)*?\s*>>> ", manual, re.MULTILINE)
    assert METHODS[name].function.__module__.rpartition(".")[2] == name, "the file is called as the method"


def test_every_check_says_what_it_measures():
    assert [name for name in CHECKS if not (CHECKS[name].function.__doc__ or "").strip()] == []


def test_headings_are_found_as_words_of_their_own():
    manual = "X: y.\n\nPaper    A.\nForgets  records.          Needs    forget.\nScope    all.   Forget  -CE.   Retain  none.\nSettings\n    a  b\n"
    assert build.headings(manual) == {"Paper", "Forgets", "Needs", "Scope", "Forget", "Retain", "Settings"}
    assert build.headings("no Paper or Check here") == set()


def test_settings_are_read_with_their_continuations():
    assert build.explained("X.\nSettings\n    lr      step size\n    order   one: a\n            or two\nDiffers  lr  is else\n    b   c\n") == {
        "lr": "step size",
        "order": "one: a or two",
    }


def test_commands_are_read_from_boxed_and_plain_help():
    boxed = "╭─ Options ─────╮\n│ --help  Show  │\n╰───────────────╯\n"
    boxed += "╭─ Commands ────╮\n│ demo   Runs.  │\n│ bench  Table. │\n│        more   │\n╰───────────────╯\n"
    assert build.commands(boxed) == ["demo", "bench"]
    assert build.commands("Usage: x\n\nOptions:\n  --help  Show.\n\nCommands:\n  demo   Runs.\n  bench  Table.\n") == ["demo", "bench"]
