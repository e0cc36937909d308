"""How text records are read: JSON lines (or one JSON list), and files of rewritten records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from expunge.core.errors import DataError, printable
from expunge.modalities import strict_json
from expunge.modalities.language.records.artefact import MAX_BYTES, parsed
from expunge.modalities.language.records.forms import recognised


def read_jsonl(path: Path | str) -> list[dict[str, Any]]:
    """Records of a JSON-lines file, of a .json file that holds one list, or of a .txt file (one raw text), in any of the forms of `records.forms`.
    Raises DataError naming the line."""
    return read(path)[0]


def read(path: Path | str) -> tuple[list[dict[str, Any]], str]:
    """(records as `read_jsonl` gives them, how they were read in words)."""
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{path.name} is larger than {MAX_BYTES} bytes")
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path.name}: {getattr(error, 'strerror', None) or error}") from None
    if path.suffix.lower() == ".txt":
        lines: list[tuple[int, Any]] = [(1, {"text": content})]
    elif content[:400].lstrip().startswith('{"expunge"'):
        return [dict(row) for row in parsed(path)[1]], "a file that expunge wrote"
    elif content.lstrip()[:1] == "[":
        lines = list(enumerate(strict_json.parsed(content, path.name), 1))
    else:
        lines = [(k, strict_json.parsed(line, f"line {k} of {path.name}")) for k, line in enumerate(content.split("\n"), 1) if line.strip()]
    if not lines:
        raise DataError(f"{path.name} holds no record")
    found, forms, notes = [], {}, dict[str, None]()
    for number, row in lines:
        where = f"line {number} of {path.name}"
        if not isinstance(row, dict):
            raise DataError(f"{where} is no object with question and answer, or text")
        record, form = recognised(row, where)
        found.append(record)
        forms[form] = forms.get(form, 0) + 1
        notes |= dict.fromkeys(k for k in record if k not in ("question", "answer", "text", "system", "history"))
    told = ", ".join(f"{n} as {form}" if len(forms) > 1 else form for form, n in forms.items())
    return found, f"{told} (no text that is trained: {', '.join(map(printable, notes))})" if notes else told
