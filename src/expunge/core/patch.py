"""The patch: what an unlearning run leaves. New values, never differences; `apply` returns the exact inverse.

File format (one safetensors file): tensors `{k}.values` with `{k}.bits` (one bit per place) or `{k}.index` (flat int64 places) where the
edit is partial, `{k}.up` and `{k}.down` for low rank, `{k}.hook.{name}` for a guard; the header's `expunge` entry is JSON with the edits, the meta
data and a SHA-256 over all of it; with a key, an HMAC-SHA256 over that digest. Nothing in the file is ever executed.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from expunge.core import hooks
from expunge.core.digest import bare
from expunge.core.edits import Edit, Hook, LowRank, Replace, bits, facts, feed, raw
from expunge.core.errors import PatchError, plain, printable
from expunge.core.files import file_digest, verified, write

MAX_BYTES = 1 << 36
"""Largest patch file that is read: 64 GiB."""
CLAIMS = 1 << 30
"""Places of all tensors of which a file lists the edited ones one by one; reading takes a byte for each. Beyond it a file holds a bit for each place."""
META = {"base": str, "method": str, "settings": dict, "seed": int, "version": str, "asked": str, "inverse_of": str, "assurance": str, "stable": bool}
"""Types of what a patch says of itself, where it says it."""


@dataclass(frozen=True, eq=False, repr=False)
class Patch:
    """Edits and what is known about them. `meta` is JSON: base digest, method, settings, seed, version."""

    edits: tuple[Edit, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.edits)

    def __repr__(self) -> str:
        return f"Patch({self.meta.get('method', 'no method')}: {self.places:,} values in {len(self)} tensors)"

    def apply(self, model: nn.Module, *, force: bool = False) -> Patch:
        """Edit the model in place and return the inverse patch: applying that restores every bit.

        Raises PatchError, with the model unchanged, if a name or shape does not fit, or if the touched places do not hold the values
        the patch was made for (applied already, or another model); `force` skips only the last. What a guard depends on is the whole model: all its
        parameters and buffers, and whatever guard stands under the same name.
        """
        model = bare(model)
        tensors = _named(model)
        self._fit(model, tensors)
        found, wanted = _digest(self.edits, model), self.meta.get("base")
        if wanted and found != wanted and not force:
            raise PatchError(f"patch was made for base {wanted[:8]}, this model is {found[:8]}: applied already, or another model?")
        undo: list[Edit] = []
        try:
            self._write(model, undo)
        except BaseException:
            Patch(tuple(reversed(undo)))._write(model, [])
            raise
        inverse = tuple(reversed(undo))
        return Patch(inverse, {"base": _digest(inverse, model), "inverse_of": self.meta.get("method", "")})

    @contextlib.contextmanager
    def tried(self, model: nn.Module) -> Iterator[nn.Module]:
        """Inside, the model is edited; outside, also after an exception, every bit is as it was. What the places hold is not checked, only names and shapes."""
        inner = bare(model)
        self._fit(inner, _named(inner))
        undo: list[Edit] = []
        try:
            self._write(inner, undo)
            yield model
        finally:
            Patch(tuple(reversed(undo)))._write(inner, [])

    def _write(self, model: nn.Module, undo: list[Edit]) -> None:
        """Edit the model in place; before each edit, what restores it is added to `undo`."""
        tensors = _named(model)
        with torch.no_grad():
            for edit in self.edits:
                if isinstance(edit, Hook):
                    undo.append(hooks.attach(model, edit))
                    continue
                t = tensors[edit.name]
                if isinstance(edit, LowRank):
                    undo.append(Replace(edit.name, t.detach().clone()))
                    t.add_((edit.scale * (edit.up.to(t) @ edit.down.to(t))).view_as(t))
                elif edit.mask is None:
                    undo.append(Replace(edit.name, t.detach().clone()))
                    t.copy_(edit.values)
                else:
                    mask = edit.mask.to(t.device)
                    undo.append(Replace(edit.name, t.detach()[mask], edit.mask))
                    t[mask] = edit.values.to(t.device)

    def _fit(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        names = [e.name for e in self.edits if isinstance(e, Hook)]
        if twice := {n for n in names if names.count(n) > 1}:
            raise PatchError(f"patch holds two guards called {min(twice)}")
        for edit in self.edits:
            if isinstance(edit, Hook):
                hooks.fit(model, edit)
                continue
            if edit.name not in tensors:
                raise PatchError(f"patch edits {edit.name}, which this model does not have: another architecture?")
            t = tensors[edit.name]
            if isinstance(edit, LowRank):
                good = _low(edit, t) and math.isfinite(edit.scale) and t.is_floating_point()
                got = f"{tuple(edit.up.shape)} @ {tuple(edit.down.shape)}"
            else:
                shape = edit.values.shape if edit.mask is None else edit.mask.shape
                good, got = shape == t.shape and edit.values.dtype == t.dtype, f"{tuple(shape)} {edit.values.dtype}"
                good = good and (edit.mask is None or (edit.mask.dtype is torch.bool and edit.values.shape == (int(edit.mask.sum()),)))
            if not good:
                raise PatchError(f"patch holds {edit.name} as {got}, this model has {tuple(t.shape)} {t.dtype}: another model?")

    def __or__(self, other: Patch) -> Patch:
        """Both patches as one, if no place is shared; the result has no audit until it is audited again."""
        mine = {(isinstance(e, Hook), e.name): e for e in self.edits}
        clash = [e.name for e in other.edits if (key := (isinstance(e, Hook), e.name)) in mine and _overlap(mine[key], e)]
        if clash:
            raise PatchError(f"both patches edit the same places of {', '.join(clash)}; apply them one after another instead")
        return Patch(self.edits + other.edits, {"parts": [dict(self.meta), dict(other.meta)]})

    def stamped(self, model: nn.Module, **facts: Any) -> Patch:
        """The same edits with meta data added; `base` is the digest of what `model` holds at the touched places now."""
        return replace(self, meta={**self.meta, **facts, "base": _digest(self.edits, model)})

    @property
    def digest(self) -> str:
        """SHA-256 over the edits alone, and over all of each: kind, name, scale, and type, shape and bits of its tensors and mask.

        Patches with the same digest write the same bits to the same model. Order counts where it decides what is written: among edits of one name, and among
        guards, of which the later stands inside. A mask of all places is told apart from none, though both write the same.
        """
        h = hashlib.sha256()
        for edit in (*sorted((e for e in self.edits if not isinstance(e, Hook)), key=lambda e: e.name), *(e for e in self.edits if isinstance(e, Hook))):
            if isinstance(edit, Hook):
                feed(h, "hook", edit.digest)
            elif isinstance(edit, LowRank):
                feed(h, "lowrank", edit.name, struct.pack("<d", edit.scale), *facts(edit.up), *facts(edit.down))
            else:
                feed(h, "replace", edit.name, *facts(edit.values), *(() if edit.mask is None else facts(edit.mask)))
        return h.hexdigest()

    @property
    def places(self) -> int:
        """How many single weights and buffer entries are written; of a guard, which writes none, how many numbers it holds."""
        return sum(_places(e) for e in self.edits)

    @property
    def storage(self) -> int:
        """Bytes of the tensors that its file holds."""
        tensors: dict[str, Tensor] = {}
        for k, edit in enumerate(self.edits):
            _pack(edit, str(k), tensors)
        return sum(t.nbytes for t in tensors.values())

    def save(self, path: str | Path, key: bytes | None = None) -> Path:
        """Write one file, whole or not at all (temporary file, fsync, rename). Raises PatchError if it cannot be written."""
        from safetensors.torch import save

        tensors: dict[str, Tensor] = {}
        listed = [_pack(edit, str(k), tensors) for k, edit in enumerate(self.edits)]
        if _claimed(listed) > CLAIMS:
            tensors.clear()
            listed = [_pack(edit, str(k), tensors, sparse=False) for k, edit in enumerate(self.edits)]
        body = json.dumps({"format": 1, "edits": listed, "meta": dict(self.meta)}, sort_keys=True)
        digest = file_digest(body, tensors)
        header = {"expunge": body, "sha256": digest}
        if key is not None:
            header["hmac"] = hmac.new(key, digest.encode(), hashlib.sha256).hexdigest()
        return write(path, save(tensors, header))

    @staticmethod
    def load(path: str | Path, key: bytes | None = None) -> Patch:
        """Read and verify a file written by `save`. Raises PatchError for anything damaged, foreign or signed by another key."""
        path = Path(path)
        header, tensors = verified(path, "expunge", PatchError, "is no patch, or is truncated", "is a safetensors file but no expunge patch", MAX_BYTES)
        body, digest = header["expunge"], header["sha256"]
        if key is not None and not hmac.compare_digest(header.get("hmac", ""), hmac.new(key, digest.encode(), hashlib.sha256).hexdigest()):
            raise PatchError(f"{path.name} is not signed by this key")
        try:
            doc = json.loads(body)
            if doc["format"] != 1:
                raise PatchError(f"{path.name} has format {doc['format']}, this version reads 1")
            meta, listed = doc["meta"], doc["edits"]
            if not isinstance(listed, list) or not isinstance(meta, dict):
                raise TypeError("edits must be a list, meta a mapping")
            if odd := [n for n, kind in META.items() if n in meta and (not isinstance(meta[n], kind) or isinstance(meta[n], bool) is not (kind is bool))]:
                raise TypeError(f"{odd[0]} of meta must be {META[odd[0]].__name__}")
            if _claimed(listed) > CLAIMS:
                raise PatchError(f"{path.name} declares {_claimed(listed)} places that it lists one by one; the most are {CLAIMS}")
            return Patch(tuple(_unpack(e, str(k), tensors) for k, e in enumerate(listed)), meta)
        except PatchError:
            raise
        except (KeyError, TypeError, IndexError, RuntimeError, ValueError, OverflowError, AttributeError, RecursionError) as error:
            raise PatchError(f"{printable(path.name)} is not well-formed ({plain(error)})") from None


def difference(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Patch:
    """The patch that turns `before` into `after`: exactly the places whose bits differ."""
    edits = []
    for name, new in after.items():
        if name not in before:
            continue
        moved = bits(before[name].contiguous()) != bits(new.detach().contiguous())
        if bool(moved.all()):
            edits.append(Replace(name, new.detach().clone()))
        elif bool(moved.any()):
            edits.append(Replace(name, new.detach()[moved].clone(), moved))
    return Patch(tuple(edits))


def _named(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _places(edit: Edit) -> int:
    if isinstance(edit, Hook):
        return sum(t.numel() for t in edit.tensors.values())
    return edit.up.shape[:-1].numel() * edit.down.shape[-1] if isinstance(edit, LowRank) else edit.values.numel()


def _low(edit: LowRank, t: Tensor) -> bool:
    """Whether factors fit a tensor: two matrices, or two stacks of matrices for a stack of as many."""
    up, down = edit.up, edit.down
    if up.ndim == down.ndim == 3:
        return t.shape == (len(up), up.shape[1], down.shape[2]) and len(up) == len(down) and up.shape[2] == down.shape[1]
    good = t.ndim >= 2 and up.ndim == down.ndim == 2 and up.shape[1] == down.shape[0]
    return good and (up.shape[0], down.shape[1]) in (t.flatten(1).shape, t.flatten(0, -2).shape)


def _digest(edits: tuple[Edit, ...], model: nn.Module) -> str:
    """SHA-256 of the values that stand at the places the edits touch; for a guard, of all weights and of the guard that stands under its name."""
    h, tensors = hashlib.sha256(), _named(model)
    if any(isinstance(e, Hook) for e in edits):
        for name in sorted(tensors):
            h.update(f"{name}{tensors[name].dtype}{tuple(tensors[name].shape)}".encode())
            h.update(raw(tensors[name]))
    for edit in sorted(edits, key=lambda e: e.name):
        if isinstance(edit, Hook):
            there = hooks.guards(model).get(edit.name)
            h.update(f"{edit.name}/{there.hook.digest if there else 'none'}".encode())
            continue
        t = tensors[edit.name].detach()
        mask = None if isinstance(edit, LowRank) else edit.mask
        h.update(f"{edit.name}{t.dtype}{tuple(t.shape)}".encode())
        h.update(raw(t if mask is None else t[mask.to(t.device)]))
    return h.hexdigest()


def _overlap(a: Edit, b: Edit) -> bool:
    if not (isinstance(a, Replace) and isinstance(b, Replace)) or a.mask is None or b.mask is None:
        return True
    return a.mask.shape != b.mask.shape or bool((a.mask & b.mask).any())


def _claimed(listed: list[Any]) -> int:
    """Places of all tensors whose edited places are listed one by one."""
    return sum(math.prod(_shape(e)) for e in listed if e.get("places") == "index")


def _shape(listed: dict[str, Any]) -> list[int]:
    """The shape that an edit declares. Raises ValueError for one that no tensor has."""
    shape = listed["shape"]
    if not isinstance(shape, list) or len(shape) > 16 or not all(type(s) is int and 0 <= s < 1 << 40 for s in shape):
        raise ValueError("an edit's shape must list sizes")
    return shape


def _pack(edit: Edit, k: str, tensors: dict[str, Tensor], sparse: bool = True) -> dict[str, Any]:
    if isinstance(edit, Hook):
        tensors |= {f"{k}.hook.{n}": t.detach().contiguous().clone() for n, t in edit.tensors.items()}
        return {"kind": "hook", "name": edit.name, "wrap": edit.kind, "tensors": sorted(edit.tensors), "config": dict(edit.config)}
    if isinstance(edit, LowRank):
        tensors[f"{k}.up"], tensors[f"{k}.down"] = edit.up.detach().contiguous(), edit.down.detach().contiguous()
        return {"kind": "lowrank", "name": edit.name, "scale": edit.scale}
    tensors[f"{k}.values"] = edit.values.detach().contiguous()
    if edit.mask is None:
        return {"kind": "replace", "name": edit.name, "places": "all"}
    listed = {"kind": "replace", "name": edit.name, "shape": list(edit.mask.shape)}
    flat = edit.mask.reshape(-1)
    if sparse and edit.values.numel() < flat.numel() / 64:
        tensors[f"{k}.index"] = flat.nonzero().squeeze(1)
        return {**listed, "places": "index"}
    import numpy as np

    tensors[f"{k}.bits"] = torch.from_numpy(np.packbits(flat.cpu().numpy()))
    return {**listed, "places": "bits"}


def _unpack(listed: dict[str, Any], k: str, tensors: Mapping[str, Tensor]) -> Edit:
    name = listed["name"]
    if not isinstance(name, str) or not name:
        raise TypeError("an edit's name must be text")
    if listed["kind"] == "hook":
        return Hook(name, listed["wrap"], {n: tensors[f"{k}.hook.{n}"] for n in listed["tensors"]}, listed["config"])
    if listed["kind"] == "lowrank":
        up, down, scale = tensors[f"{k}.up"], tensors[f"{k}.down"], listed["scale"]
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
            raise PatchError(f"patch scales {printable(name)} by {scale!r}, which is no finite number")
        if up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0] or not (up.is_floating_point() and down.is_floating_point()):
            raise PatchError(f"patch holds {printable(name)} as {tuple(up.shape)} @ {tuple(down.shape)}: no product of two matrices")
        return LowRank(name, up, down, float(scale))
    if listed["kind"] != "replace" or listed["places"] not in ("all", "index", "bits"):
        raise PatchError(f"patch holds {printable(name)} in a form that this version does not know")
    values = tensors[f"{k}.values"]
    if listed["places"] == "all":
        return Replace(name, values)
    if values.ndim != 1:
        raise PatchError(f"patch holds values of {printable(name)} in {values.ndim} dimensions, not 1")
    shape = _shape(listed)
    size = math.prod(shape)
    mask = torch.zeros(0, dtype=torch.bool)
    if listed["places"] == "index":
        index = tensors[f"{k}.index"]
        if index.dtype is not torch.int64 or index.ndim != 1:
            raise PatchError(f"patch lists places of {printable(name)} as {index.dtype} in {index.ndim} dimensions")
        if index.numel() and (int(index.min()) < 0 or int(index.max()) >= size):
            raise PatchError(f"patch names places outside {printable(name)}")
        if size > 64 * max(1, index.numel()) * (1 << 20):
            raise PatchError(f"patch declares {size} places for {name}, far more than it fills")
        mask = torch.zeros(size, dtype=torch.bool)
        mask[index] = True
    else:
        import numpy as np

        packed = tensors[f"{k}.bits"].numpy()
        if packed.dtype != np.uint8 or packed.ndim != 1:
            raise PatchError(f"patch holds no bits for {printable(name)}")
        if packed.size != -(-size // 8):
            raise PatchError(f"patch declares {size} places for {name} but holds bits for {packed.size * 8}")
        mask = torch.from_numpy(np.unpackbits(packed, count=size).astype(bool))
    if int(mask.sum()) != values.numel():
        raise PatchError(f"patch holds {values.numel()} values for {int(mask.sum())} places of {name}")
    return Replace(name, values, mask.reshape(shape))
