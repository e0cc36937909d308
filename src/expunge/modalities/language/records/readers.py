"""How text records are read: JSON lines (or one JSON list), and files of rewritten records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from expunge.core.errors import DataError
from expunge.modalities.language.records.artefact import MAX_BYTES, parsed

ALIASES = {"prompt": "question", "instruction": "question", "completion": "answer", "response": "answer", "output": "answer"}


def read_jsonl(path: Path | str) -> list[dict[str, Any]]:
    """Records of a JSON-lines file (or of a .json file that holds one list): {"question", "answer"} or {"text"}; `prompt`, `completion`, `response` and the
    like are read as question and answer. Raises DataError naming the line."""
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{path.name} is larger than {MAX_BYTES} bytes")
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path.name}: {getattr(error, 'strerror', None) or error}") from None
    if content[:400].lstrip().startswith('{"expunge"'):
        return [dict(row) for row in parsed(path)[1]]
    lines: list[tuple[int, Any]] = []
    if content.lstrip()[:1] == "[":
        try:
            lines = list(enumerate(json.loads(content), 1))
        except json.JSONDecodeError as error:
            raise DataError(f"{path.name} is not JSON: {error}") from None
    else:
        for number, line in enumerate(content.splitlines(), 1):
            if line.strip():
                try:
                    lines.append((number, json.loads(line)))
                except json.JSONDecodeError as error:
                    raise DataError(f"line {number} of {path.name} is not JSON: {error.msg}") from None
    if not lines:
        raise DataError(f"{path.name} holds no record")
    return [_record(row, f"line {number} of {path.name}") for number, row in lines]


def _record(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{where} is no object with question and answer, or text")
    row = {ALIASES.get(k, k): v for k, v in row.items()}
    if "text" in row and "labels" in row:
        row = {**{k: v for k, v in row.items() if k not in ("text", "labels")}, "question": row["text"], "answer": row["labels"]}
    wanted = ("question", "answer") if "question" in row or "answer" in row else ("text",)
    for key in wanted:
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise DataError(f"{where} has an empty or missing {key}; a record holds question and answer, or text")
    return row
