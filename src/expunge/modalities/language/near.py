"""Near copies among texts: kept records that say almost the words of one to forget.

    words      of question, answer and text: NFKC, case folded, without marks and characters that do not show; ideographs are words of their own
    shingles   all runs of SIZE words, as a set; the whole text where it is shorter
    likeness   Jaccard: shared shingles over all shingles of the two

MinHash: the smallest of the shingles' hashes is the same for two sets with probability Jaccard. Of HASHES such, in bands of ROWS, two texts are candidates when
all of one band agree: at a Jaccard of 0.8 that fails 5 times in 100,000, at 0.3 it happens 6 times in 100. Candidates whose share of equal hashes is GUESS or
more are then compared shingle by shingle. (Broder 1997; Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, ch. 3.)
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from expunge.core.types import Split

SIZE, LIKE = 3, 0.8
BANDS, ROWS = 25, 5
HASHES = BANDS * ROWS
GUESS = 0.65
"""Four standard deviations of the estimate below LIKE."""
MOST = 32
"""Most candidates of one kept text in a band, and most of its candidates that are compared shingle by shingle."""
BLOCK = 256
"""Kept texts that are held at once."""

_IDEOGRAPHS = "\\u3040-\\u30ff\\u3400-\\u4dbf\\u4e00-\\u9fff\\uf900-\\ufaff"
_WORD = re.compile(f"[{_IDEOGRAPHS}]|[^\\s{_IDEOGRAPHS}]+")


class _Plain(dict):
    """Code point -> what stands for it: nothing for what does not show, a space for marks, itself for the rest; filled as it is read."""

    def __missing__(self, point: int) -> str | None:
        kind = unicodedata.category(chr(point))
        shown = kind != "Cf" and not 0xFE00 <= point <= 0xFE0F
        self[point] = (" " if kind[0] in "PSZ" or kind == "Cc" else chr(point)) if shown else None
        return self[point]


_PLAIN = _Plain()


def words(text: str) -> list[str]:
    """The words by which texts are compared.

    >>> words("\\u201cZo\\u200be  \\uff33mith\\u201d, n\\u00e9e ZOE\\u0301!"), words("\\u6771\\u4eac 2020")
    (['zoe', 'smith', 'n\\xe9e', 'zo\\xe9'], ['\\u6771', '\\u4eac', '2020'])
    """
    return _WORD.findall(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).translate(_PLAIN))


def shingles(said: Sequence[str]) -> set[tuple[str, ...]]:
    """All runs of SIZE words; of a shorter text the whole; of none nothing."""
    return {tuple(said[k : k + SIZE]) for k in range(max(1, len(said) - SIZE + 1))} if said else set()


def jaccard(a: set, b: set) -> float:
    """Shared over all; 0 for two empty sets."""
    return len(a & b) / len(a | b) if a or b else 0.0


def texts(split: Split) -> list[tuple[int, int, float]] | None:
    """(forget id, kept id, likeness) of each kept record that is LIKE or more alike to one to forget, with the one that it is most like; the most alike first.
    None without retain."""
    if split.retain is None:
        return None
    gone = {k: said for k, row in enumerate(split.forget.rows) if (said := words(_said(row)))}
    if not gone:
        return []
    places, wanted = np.array(list(gone)), signatures(list(gone.values()))
    keys, sets = bands(wanted), {k: shingles(said) for k, said in gone.items()}
    order = keys.argsort(0, kind="stable")
    keys = np.take_along_axis(keys, order, 0)
    found = []
    for start in range(0, len(split.retain), BLOCK):
        kept = {start + k: said for k, row in enumerate(split.retain.rows[start : start + BLOCK]) if (said := words(_said(row)))}
        if not kept:
            continue
        here, mine = np.array(list(kept)), signatures(list(kept.values()))
        for r, near in _candidates(mine, bands(mine), wanted, keys, order).items():
            whole = shingles(kept[int(here[r])])
            likeness, which = max(((jaccard(sets[int(places[f])], whole), int(places[f])) for f in near), key=lambda one: one[0])
            if likeness >= LIKE:
                found.append((int(split.forget.ids[which]), int(split.retain.ids[int(here[r])]), likeness))
    return sorted(found, key=lambda pair: (-pair[2], pair[1]))


def _said(row: Mapping[str, Any]) -> str:
    return " ".join(str(row.get(k, "")) for k in ("question", "answer", "text"))


def signatures(texts: Sequence[Sequence[str]]) -> np.ndarray:
    """(N, HASHES) uint32 MinHash signatures of texts of at least one word each."""
    out = np.empty((len(texts), HASHES), np.uint32)
    by, plus = np.random.default_rng(0).integers(1, 1 << 63, (2, HASHES), dtype=np.uint64)
    for start in range(0, len(texts), BLOCK):
        codes = [[zlib.crc32(w.encode("utf-8", "surrogatepass")) + 1 for w in said] for said in texts[start : start + BLOCK]]
        codes = [c + [0] * (SIZE - len(c)) for c in codes]
        runs = np.array([len(c) - SIZE + 1 for c in codes])
        flat = np.array([code for c in codes for code in c], np.uint64)
        first = np.repeat(np.cumsum([0, *(len(c) for c in codes[:-1])]) - np.cumsum([0, *runs[:-1]]), runs) + np.arange(runs.sum())
        mixed = np.zeros(len(first), np.uint64)
        for k in range(SIZE):
            mixed = _mixed(mixed ^ flat[first + k])
        starts = np.cumsum([0, *runs[:-1]])
        for j in range(HASHES):
            out[start : start + BLOCK, j] = np.minimum.reduceat((mixed * (by[j] | np.uint64(1)) + plus[j]) >> np.uint64(32), starts)
    return out


def _mixed(x: np.ndarray) -> np.ndarray:
    """splitmix64: every bit of the result depends on every bit of x."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    for shift, by in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(by)
    return x ^ (x >> np.uint64(31))


def bands(signed: np.ndarray) -> np.ndarray:
    """(N, BANDS) one number per band of the signatures: equal bands give equal numbers."""
    out = np.zeros((len(signed), BANDS), np.uint64)
    for k in range(ROWS):
        out = _mixed(out ^ signed[:, k::ROWS].astype(np.uint64))
    return out


def _candidates(mine: np.ndarray, keys: np.ndarray, wanted: np.ndarray, sorted_keys: np.ndarray, order: np.ndarray) -> dict[int, list[int]]:
    """Row of `mine` -> rows of `wanted` that share a band with it and are alike by their signatures, at most MOST, the most alike first."""
    pairs = []
    for band in range(BANDS):
        low, high = (np.searchsorted(sorted_keys[:, band], keys[:, band], side) for side in ("left", "right"))
        count = np.minimum(high - low, MOST)
        rows = np.repeat(np.arange(len(mine)), count)
        at = np.repeat(low - np.cumsum(count) + count, count) + np.arange(count.sum())
        pairs.append(rows * len(wanted) + order[at, band])
    r, f = np.divmod(np.unique(np.concatenate(pairs)), len(wanted))
    guess = (mine[r] == wanted[f]).mean(1)
    out: dict[int, list[int]] = {}
    for k in np.lexsort((f, -guess, r)):
        if guess[k] >= GUESS and len(out.setdefault(int(r[k]), [])) < MOST:
            out[int(r[k])].append(int(f[k]))
    return out
