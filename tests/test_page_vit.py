"""docs/image-folder-and-vit.md, run as it stands: its scripts, its commands, and the lines that it says they print."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
PAGE = (Path(__file__).parent.parent / "docs" / "image-folder-and-vit.md").read_text()


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def run(words: list[str], place: Path) -> tuple[int, str, str]:
    found = subprocess.run([sys.executable, "-W", "ignore", *words], cwd=place, capture_output=True, text=True, check=False)
    return found.returncode, found.stdout, found.stderr


def expunge(line: str, place: Path) -> tuple[int, str, str]:
    return run(["-m", *shlex.split(line)], place)


@pytest.mark.slow
def test_the_page_is_what_happens(tmp_path):
    practise, use = blocks("python")
    forget, after = blocks("sh")
    understood = blocks("text")[0].splitlines()
    assert run(["-c", practise], tmp_path)[0] == 0
    code, out, err = expunge(f"{forget.strip()} --mean 200 --std 0.01", tmp_path)
    assert code == 2 and "is near chance on kept records" in err and "--anyway goes on" in err
    assert not (tmp_path / "out" / "latest").exists()
    code, out, err = expunge(forget.strip(), tmp_path)
    assert code == 0, err
    assert out.splitlines()[1:3] == understood[1:3]
    assert out.splitlines()[0].endswith("classes 0 across, 1 down, 2 falling, 3 rising")
    assert float(re.search(r"accuracy ([0-9.]+) on kept records \(n = 180; chance 0.333\)", out.splitlines()[3])[1]) > 0.9
    assert "released: loaded back it is the audited model bit for bit" in " ".join(out.split())
    code, out, err = run(["-c", use], tmp_path)
    read = {tuple(line.split()[:2]): float(line.split()[2]) for line in out.splitlines()}
    assert code == 0 and len(read) == 8
    assert read["model", "rising"] > 0.9 and read["out/latest/released", "rising"] <= 0.05
    assert all(read["out/latest/released", kept] > 0.85 for kept in ("across", "down", "falling"))
    for line in after.strip().splitlines():
        code, out, err = expunge(line, tmp_path)
        assert code == 0, (line, err)
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (tmp_path / "model" / "model.safetensors").read_bytes()
    assert (tmp_path / "edited" / "model.safetensors").read_bytes() == (tmp_path / "out" / "latest" / "released" / "model.safetensors").read_bytes()
    assert (tmp_path / "edited" / "preprocessor_config.json").is_file()
    code, out, err = run(["-c", "import expunge\n" + blocks("py")[0] + "\nprint(verdict.passed, split.asked)"], tmp_path)
    assert code == 0, err
    assert out.startswith("The model as it is fed: accuracy") and out.rstrip().endswith("True class:rising")
