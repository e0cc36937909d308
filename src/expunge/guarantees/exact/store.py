"""The store: checkpoints named by what went into them, in one folder, and the book that says which of them stand.

`parts/KEY.safetensors` holds the weights that the training named KEY moved; `book.json` holds design, layout and the keys in force. A file is written whole
or not at all; what is read back must be what its name and its digest say. Two trainings that begin alike share what they share.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from expunge.core.errors import StoreError
from expunge.core.files import file_digest, write

VERSION = 1
MAX_BOOK = 1 << 28
"""Largest book that is read, in bytes: some millions of records."""


@dataclass(frozen=True)
class Store:
    """Checkpoints and book of one ensemble."""

    folder: Path

    def path(self, key: str) -> Path:
        """The file of a key. Raises StoreError for what is no key."""
        if not re.fullmatch(r"[0-9a-f]{64}", key):
            raise StoreError(f"'{key[:80]}' is no key of a checkpoint")
        return self.folder / "parts" / f"{key}.safetensors"

    def has(self, key: str) -> bool:
        """Whether the checkpoint is there (whole: half a file never is)."""
        return self.path(key).is_file()

    def put(self, key: str, tensors: Mapping[str, Tensor], **facts: Any) -> None:
        """Write a checkpoint, with facts about it in its header."""
        from safetensors.torch import save

        body = json.dumps({"key": key, "version": VERSION, **facts}, sort_keys=True)
        held = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}
        write(self.path(key), save(held, {"part": json.dumps([body, file_digest(body, held)])}))  # one entry: the order of several is not fixed

    def get(self, key: str) -> dict[str, Tensor]:
        """The tensors of a checkpoint. Raises StoreError when it is missing, damaged, changed, of another version, or another checkpoint under this name."""
        from safetensors import SafetensorError, safe_open

        path, short = self.path(key), key[:12]
        if not path.is_file():
            raise StoreError(f"checkpoint {short} is missing from {self.folder.name}; fit again into the same folder to train what is missing")
        try:
            with safe_open(path, framework="pt") as f:
                head = f.metadata() or {}
                tensors = {n: f.get_tensor(n) for n in f.keys()}  # noqa: SIM118
            body, digest = json.loads(head["part"])
            doc = json.loads(body)
            found, version = doc["key"], doc["version"]
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise StoreError(f"checkpoint {short} cannot be read ({str(error).splitlines()[0][:80]}): it was damaged or is none") from None
        if version != VERSION:
            raise StoreError(f"checkpoint {short} is of version {version}; this expunge reads version {VERSION}")
        if found != key or digest != file_digest(body, tensors):
            raise StoreError(f"checkpoint {short} was changed after it was written: its content is not what its digest says")
        return tensors

    def parent(self, key: str) -> str:
        """Key of the checkpoint that this one was trained from; "" for none."""
        from safetensors import safe_open

        with safe_open(self.path(key), framework="pt") as f:
            return str(json.loads(json.loads((f.metadata() or {})["part"])[0])["parent"])

    def digest(self, key: str) -> str:
        """SHA-256 over the bytes of the file: what `sha256sum` prints. Equal trainings give equal files."""
        try:
            return hashlib.sha256(self.path(key).read_bytes()).hexdigest()
        except OSError:
            raise StoreError(f"checkpoint {key[:12]} is missing from {self.folder.name}") from None

    def keep(self, keys: Iterable[str]) -> int:
        """Remove every checkpoint but these, and what a killed write left; returns how many checkpoints went. Trained on deleted records, they are personal
        data.
        """
        wanted, gone = {self.path(k).name for k in keys}, 0
        for path in (self.folder / "parts").glob("*"):
            if path.name not in wanted and (path.suffix == ".safetensors" or path.name.endswith(".tmp")):
                gone += path.suffix == ".safetensors"
                path.unlink(missing_ok=True)
        for path in self.folder.glob(".book.json.*.tmp"):
            path.unlink(missing_ok=True)
        return gone

    def bytes(self) -> int:
        """Size of all checkpoints."""
        return sum(p.stat().st_size for p in (self.folder / "parts").glob("*.safetensors"))

    def write_book(self, book: Mapping[str, Any]) -> None:
        """Put the book in force: the one moment at which a deletion becomes true."""
        doc = {"version": VERSION, **book}
        body = json.dumps(doc, sort_keys=True)
        write(self.folder / "book.json", json.dumps({"book": doc, "sha256": hashlib.sha256(body.encode()).hexdigest()}))

    def read_book(self) -> dict[str, Any] | None:
        """The book, or None where none was written. Raises StoreError for one that is damaged, changed or of another version."""
        path = self.folder / "book.json"
        if not path.is_file():
            return None
        if path.stat().st_size > MAX_BOOK:
            raise StoreError(f"book.json of {self.folder.name} is larger than {MAX_BOOK} bytes")
        try:
            doc = json.loads(path.read_text(encoding="utf-8"))
            book, digest = dict(doc["book"]), doc["sha256"]
            version = book["version"]
        except (OSError, ValueError, KeyError, TypeError):
            raise StoreError(f"book.json of {self.folder.name} cannot be read: it was damaged or is none") from None
        if version != VERSION:
            raise StoreError(f"{self.folder.name} was written by another version of expunge (store version {version}, this one reads {VERSION}); fit anew")
        if hashlib.sha256(json.dumps(book, sort_keys=True).encode()).hexdigest() != digest:
            raise StoreError(f"book.json of {self.folder.name} was changed after it was written: its content is not what its digest says")
        return book
