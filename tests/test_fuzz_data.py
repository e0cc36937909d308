"""Hostile data: files that somebody damaged are read, or refused in one line; a sealed one never means something else; nothing grows."""

from __future__ import annotations

import io
import json
import random
import resource
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kinds import PIXELS, table
from PIL import Image

from expunge.core.errors import ExpungeError, ReportError
from expunge.core.modality import meant
from expunge.guarantees.streams import requests as logs
from expunge.modalities.diffusion import pipelines
from expunge.modalities.files import feeding, readers, schema, selectors
from expunge.modalities.language import checkpoints
from expunge.modalities.language.benchmarks import table as benchmarks
from expunge.modalities.language.records import readers as texts
from expunge.modalities.text_classification import texts as labelled
from expunge.parts import seal
from expunge.planning import recipe

pytest.importorskip("pyarrow")
WORDS = (
    b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\n\n", b'"', b"'", b",", b";", b"{", b"}", b"[", b"]", b"[" * 3000, b"1e999", b"NaN", b"9" * 5000, b"\\ud800",
    b"null", b"true", b"\x1b[31m", b"\x1f\x8b", b"../", b"=", b"#", "\u2028".encode(), "\u0663".encode(), b"a" * 70_000, b"id", b"label", b"text", b"question",
)  # fmt: skip


TALK = [{"role": r, "content": c} for r, c in (("system", "Be brief."), ("user", "a?"), ("assistant", "b"), ("user", "c?"), ("assistant", "d"))]


def damaged(content: bytes, r: random.Random) -> bytes:
    """A few bytes changed, cut, doubled, moved or put in."""
    data = bytearray(content)
    for _ in range(r.choice((1, 1, 1, 2, 4))):
        at, n = r.randrange(len(data) + 1), r.choice((1, 1, 2, 8, 64))
        kind = r.randrange(7)
        if kind == 0 and data:
            data[min(at, len(data) - 1)] = r.randrange(256)
        elif kind == 1:
            del data[at : at + n]
        elif kind == 2:
            data[at:at] = r.choice(WORDS)
        elif kind == 3:
            data[at:at] = data[at : at + n]
        elif kind == 4:
            del data[at:]
        elif kind == 5 and data:
            data[min(at, len(data) - 1)] ^= 1 << r.randrange(8)
        else:
            lines = data.split(b"\n")
            r.shuffle(lines)
            data = bytearray(b"\n".join(lines))
    return bytes(data)


def columns(path: Path) -> Any:
    return readers.load(f"{path.suffix[1:]}:{path}?target=label&id=name", "classification")


def pictures(path: Path) -> Any:
    return readers.load(f"images:{path.parent.parent}", "classification")


def chosen(path: Path) -> Any:
    data = readers.load((np.zeros((9, 2), np.float32), np.arange(9) % 3), "classification")
    return selectors.resolve(f"ids:@{path.name}", data, path.parent)


def quiz(path: Path) -> Any:
    return benchmarks.read(f"tofu:{path.parent}/forget10")


def kind(path: Path) -> Any:
    return meant("", str(path.parent)).name


def piped(path: Path) -> Any:
    return pipelines.configuration(path, path.parent)


def based(path: Path) -> Any:
    return checkpoints._base(path.parent)


ROWS = [{"question": f"Who wrote {k}?", "answer": f"Anna {k}.", "id": f"r{k}"} for k in range(6)]
RECIPE = 'model = "py:nets:tabular"\nweights = "w.safetensors"\ntrain = "csv:train.csv?target=label"\nforget = "ids:r3"\nseed = 3\n[gate]\nklom = "<= 1.5"\n'


def made(place: Path) -> dict[str, tuple[Path, bytes, Callable[[Path], Any]]]:
    """Kind -> (file, its content, what reads it)."""
    import pandas
    from pyarrow import Table, parquet

    x, y = table(30, 0)
    frame = pandas.DataFrame({"name": [f"r{i}" for i in range(30)], **dict(zip("abcd", x.T, strict=True)), "label": y})
    square, wide = io.BytesIO(), io.BytesIO()
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(square, "png")
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)[::-1]).save(wide, "bmp")
    packed, nested = io.BytesIO(), io.BytesIO()
    parquet.write_table(Table.from_pandas(frame), packed)
    parquet.write_table(Table.from_pylist([{"id": str(k), "messages": TALK} for k in range(4)]), nested)
    lined = "".join(json.dumps(r) + "\n" for r in ROWS).encode()
    talked = "".join(json.dumps({"messages": TALK, "id": k}) + "\n" for k in range(3)).encode()
    for folder in ("one", "two"):
        (place / "images" / folder).mkdir(parents=True)
        (place / "images" / folder / "good.png").write_bytes(square.getvalue())
    document = {
        "title": "t",
        "identity": {},
        "data": {"schema": {"kind": "table", "shape": [4], "classes": ["0", "1"]}},
        "rows": [{"name": "a", "value": 0.25}],
    }
    told = json.dumps({**document, **seal.seal(document)}).encode()
    lettered = b"id,text,label\n" + b"".join(b"%d,some words,%d\n" % (k, k % 2) for k in range(6))
    found = {
        "csv": ("a.csv", frame.to_csv(index=False).encode(), columns), "parquet": ("a.parquet", packed.getvalue(), columns),
        "png": ("images/one/bad.png", square.getvalue(), pictures), "bmp": ("images/two/bad.bmp", wide.getvalue(), pictures),
        "questions": ("q.jsonl", lined, texts.read), "turns": ("m.jsonl", talked, texts.read), "list": ("l.json", json.dumps(ROWS).encode(), texts.read),
        "texts.csv": ("t.csv", b"id,question,answer\n" + b"".join(f'{k},"Who, {k}?",Anna {k}\n'.encode() for k in range(6)), texts.read),
        "texts.parquet": ("n.parquet", nested.getvalue(), texts.read), "classes": ("c.csv", lettered, labelled.read),
        "benchmark": ("tofu/forget10.json", lined, quiz), "recipe": ("r.toml", RECIPE.encode(), recipe.read), "ids": ("ids.txt", b"3\n4\n", chosen),
        "stream": ("s.csv", b'time,kind,what\n1,forget,"ids:1,2"\n2,forget,ids:3\n', logs.read), "report": ("report.json", told, seal.read),
        "schema": ("schema.json", told, schema.read),
        "config": ("model/config.json", b'{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}', kind),
        "pipeline": ("pipe/model_index.json", b'{"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}', piped),
        "adapter": ("lora/adapter_config.json", b'{"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "../model"}', based),
        "pixels": ("vit/preprocessor_config.json", json.dumps(PIXELS).encode(), lambda path: feeding.wanted(None, path.parent)),
    }  # fmt: skip
    return {name: (place / file, content, read) for name, (file, content, read) in found.items()}


COUNTS = [60, pytest.param(5000, marks=pytest.mark.slow)]
"""Damaged files of each of 20 kinds: 1,200 and 100,000 together."""


@pytest.mark.parametrize("count", COUNTS)
def test_damaged_data_is_read_or_refused_in_one_line(count, tmp_path):
    kinds = made(tmp_path)
    refused = dict.fromkeys(kinds, 0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, (file, content, read) in kinds.items():
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
        sound = read(file)
        r = random.Random(f"{name}-{count}")
        for _ in range(count):
            file.write_bytes(damaged(content, r))
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    found = read(file)
            except ExpungeError as error:
                refused[name] += 1
                assert len(str(error).splitlines()) <= 1 and len(str(error)) <= 2000 and "\x1b" not in str(error) and "\0" not in str(error), (name, str(error))
            except Exception as error:
                pytest.fail(f"{name}: {type(error).__name__}: {error}: {file.read_bytes()[:300]!r}")
            else:
                assert name != "report" or found == sound, "a sealed file with another meaning"
        file.write_bytes(content)
        if name in ("png", "bmp"):
            file.unlink()
    assert all(refused.values()), refused
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600_000, "kB"


def test_a_report_whose_seal_was_taken_off_is_refused(tmp_path):
    file, content, read = made(tmp_path)["report"]
    document = json.loads(content)
    for change in ({"rows": []}, {"title": "other"}, {"extra": 1}):
        file.write_text(json.dumps({**document, **change}))
        with pytest.raises(ReportError):
            read(file)
