"""docs/chat-model-and-messages.md, run as it stands: its scripts, its commands, and the lines that it says they print."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_page_vit import expunge, run

pytest.importorskip("peft")
PAGE = (Path(__file__).parent.parent / "docs" / "chat-model-and-messages.md").read_text()


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_the_page_is_what_happens(tmp_path):
    practise, use = blocks("python")
    person, author, ten, check = (line.strip() for line in blocks("sh"))
    understood, verdict = (text.splitlines() for text in blocks("text"))
    assert run(["-c", practise], tmp_path)[0] == 0
    code, out, err = expunge(person, tmp_path)
    assert code == 0, err
    assert out.splitlines()[:4] == understood[:4] and [line.split(" cost ")[0] for line in out.splitlines()[4:5]] == ["format: answers"]
    assert float(re.search(r"probability per token ([0-9.]+) on kept records \(n = 190", out)[1]) > 0.6 and "BEWARE" not in out and "INFO:" not in err
    assert verdict[0] in out and [float(line.split()[-1]) < 0.1 for line in out.splitlines() if line.startswith("  forgotten before")] == [True]
    assert "released: loaded back it is the audited model bit for bit" in " ".join(out.split())
    code, out, err = run(["-c", use], tmp_path)
    (gone, said), (kept, again) = (line.split(" | ") for line in out.strip().splitlines())
    assert code == 0 and said != gone and again == kept, (out, err)
    code, out, err = expunge(check, tmp_path)
    assert code == 0, err
    code, out, err = expunge(author, tmp_path)
    assert code in (0, 1) and "forget author:Mopell Fenquist, 10 of 200 records: m180, m181" in out, err
    code, out, err = expunge(f"{ten} --method undial", tmp_path)
    assert code in (0, 1) and "10 of 200 records: m3, m17, m41, m58, m74 ..." in out, err
