"""docs/bert-and-csv.md, run as it stands: its scripts, its commands, and the lines that it says they print."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_page_vit import expunge, run

pytest.importorskip("transformers")
PAGE = (Path(__file__).parent.parent / "docs" / "bert-and-csv.md").read_text()


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_the_page_is_what_happens(tmp_path):
    practise, use = blocks("python")
    forget, ten, after = (text.strip() for text in blocks("sh"))
    understood, verdict = (text.splitlines() for text in blocks("text"))
    assert run(["-c", practise], tmp_path)[0] == 0
    code, out, err = expunge(forget, tmp_path)
    assert code == 0 and out.splitlines()[:2] == understood and out.splitlines()[2].startswith("forget class:3 (music): class 3, "), err
    assert verdict[0] in out and "released: loaded back it is the audited model bit for bit" in " ".join(out.split())
    code, out, err = run(["-c", use], tmp_path)
    before, now = (int(line.split()[1]) for line in out.strip().splitlines())
    assert code == 0 and before >= 40 and now <= 2, err
    for line in after.splitlines():
        code, out, err = expunge(line, tmp_path)
        assert code == 0, (line, err)
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (tmp_path / "model" / "model.safetensors").read_bytes()
    assert (tmp_path / "clean" / "model.safetensors").read_bytes() == (tmp_path / "out" / "latest" / "released" / "model.safetensors").read_bytes()
    code, out, err = expunge(f"{ten} --method fine_tune", tmp_path)
    assert code in (0, 1) and "10 of 900 records: train-3, train-14, train-15, train-32, train-35 ..." in out, err
