"""Records found by folder and by entry point."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any

from expunge.core.errors import SettingError, suggest


class Registry(Mapping):
    """Name -> record, filled on first use from all modules below a package (or those whose full name the pattern `only` finds) and from an entry-point
    group, called as the package if it has no name of its own."""

    def __init__(self, package: str, kind: str, *, only: str = "", group: str = "") -> None:
        self.package, self.kind, self.only, self.group = package, kind, only, group or package
        self._found: dict[str, Any] = {}
        self._loaded = False

    def add(self, record: Any) -> None:
        """Register; two records of one name are a mistake."""
        if record.name in self._found:
            raise SettingError(f"two {self.kind}s are called '{record.name}'")
        self._found[record.name] = record

    def _load(self) -> dict[str, Any]:
        if not self._loaded:
            self._loaded = True
            folder = importlib.import_module(self.package)
            for info in pkgutil.walk_packages(folder.__path__, f"{self.package}."):
                if re.search(self.only, info.name):
                    importlib.import_module(info.name)
            for point in entry_points(group=self.group):
                point.load()
        return self._found

    def __getitem__(self, name: str) -> Any:
        found = self._load()
        if name not in found:
            raise SettingError(suggest(f"no {self.kind}", name, sorted(found)))
        return found[name]

    def __contains__(self, name: object) -> bool:
        return name in self._load()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._load()))

    def __len__(self) -> int:
        return len(self._load())
