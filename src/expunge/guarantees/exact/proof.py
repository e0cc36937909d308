"""Before and after a deletion: which components it touches, and the record that proves that it touched no others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from expunge.core.errors import StoreError, plain
from expunge.core.files import seal_json, unsealed_json, write


@dataclass(frozen=True)
class Touch:
    """What a deletion will do, told before it runs.

    ids        records that will go          already    records that went before: nothing happens for them
    retrain    components that are trained anew on what is left, detach those that are taken away, both by name
    kept       how many components stay as they are, to the bit
    examples   sample passes of the training that follows          share    the same over that of all components
    """

    ids: tuple[int, ...]
    already: tuple[int, ...]
    retrain: tuple[str, ...]
    detach: tuple[str, ...]
    kept: int
    examples: int
    share: float

    def __str__(self) -> str:
        said = f"{len(self.ids)} record(s): {len(self.retrain)} component(s) trained anew, {len(self.detach)} detached, {self.kept} stay to the bit; "
        said += f"{self.examples:,} sample passes ({100 * self.share:.1f} % of all)"
        return said + (f"; {len(self.already)} deleted before" if self.already else "")


@dataclass(frozen=True)
class Proof:
    """What a deletion did: keys and file digests of every component before and after. JSON-serialisable.

    before, after    component -> {"key", "sha256"} of its checkpoint file; a component without records has none
    touched          components whose data held a deleted record: their keys differ, and the old files are gone
    untouched        components whose key and file are what they were
    """

    ids: tuple[int, ...]
    already: tuple[int, ...]
    touched: tuple[str, ...]
    untouched: tuple[str, ...]
    trained: tuple[str, ...]
    before: Mapping[str, Mapping[str, str]]
    after: Mapping[str, Mapping[str, str]]
    examples: int
    share: float
    seconds: float
    removed: int
    assurance: str = "exact"

    @property
    def holds(self) -> bool:
        """Untouched components are equal in key and bytes; no touched one kept its key."""
        same = all(self.before[n] == self.after.get(n) for n in self.untouched)
        return same and not any(n in self.after and self.after[n]["key"] == self.before[n]["key"] for n in self.touched if n in self.before)

    def document(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "holds": self.holds}

    def save(self, path: Path | str) -> Path:
        """Write it as JSON, with its checksum."""
        return write(path, seal_json(self.document()))

    def __str__(self) -> str:
        if not self.ids:
            return f"nothing to do: {len(self.already)} record(s) were deleted before"
        how = f"{len(self.touched)} component(s) touched, {len(self.trained)} trained anew, {len(self.untouched)} equal to the bit"
        return f"{len(self.ids)} record(s) deleted: {how}; {100 * self.share:.1f} % of a full training in {self.seconds:.2f} s" + (
            f"; {len(self.already)} were deleted before" if self.already else ""
        )


def read(path: Path | str) -> Proof:
    """A proof from its file. Raises StoreError for a file that is none."""
    path = Path(path)
    doc = unsealed_json(path, StoreError, "is no proof of a deletion")
    try:
        held = doc.pop("holds")
        lists = {n: tuple(doc[n]) for n in ("ids", "already", "touched", "untouched", "trained")}
        found = Proof(**{**doc, **lists})
        same = found.holds is held
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path.name} is no proof of a deletion: {plain(error)[:80]}") from None
    if not same:
        raise StoreError(f"{path.name} says that it holds where its components do not, or the other way round")
    return found
