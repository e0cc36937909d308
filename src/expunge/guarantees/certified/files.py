"""Files of certified heads: safetensors with JSON, a checksum and, with a key, a signature. The certificate is computed anew when one is read."""

from __future__ import annotations

import hashlib
import hmac
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expunge.core.errors import ExpungeError, ModelError
from expunge.core.files import file_digest, verified, write
from expunge.guarantees.certified.certificate import Certificate, Phase, Settings, certify

FORMAT = 1
MAX_BYTES = 1 << 34
"""Largest file that is read: 16 GiB."""


def store(path: str | Path, kind: str, certificate: Certificate, tensors: dict[str, Tensor], key: bytes | None, **facts: Any) -> Path:
    """Write one file, whole or not at all."""
    from safetensors.torch import save

    held = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}
    text = json.dumps({"format": FORMAT, "kind": kind, "certificate": asdict(certificate), **facts}, sort_keys=True)
    header = {"certified": text, "sha256": file_digest(text, held)}
    if key is not None:
        header["hmac"] = hmac.new(key, header["sha256"].encode(), hashlib.sha256).hexdigest()
    return write(path, save(held, header))


def read(path: str | Path, kind: str, names: set[str], key: bytes | None) -> tuple[dict[str, Any], dict[str, Tensor], Certificate]:
    """Body, tensors and certificate of a file, the certificate computed anew from its settings and history."""
    path, broken = Path(path), "is no certified head, or is truncated"
    header, tensors = verified(path, "certified", ModelError, broken, broken, MAX_BYTES)
    text, digest = header["certified"], header["sha256"]
    if key is not None and not hmac.compare_digest(header.get("hmac", ""), hmac.new(key, digest.encode(), hashlib.sha256).hexdigest()):
        raise ModelError(f"{path.name} is not signed by this key")
    try:
        body = json.loads(text)
        if body["format"] != FORMAT:
            raise ModelError(f"{path.name} has format {body['format']}, this version reads {FORMAT}")
        if body["kind"] != kind or set(tensors) != names:
            raise ModelError(f"{path.name} is a file of kind '{body['kind']}', not '{kind}'")
        found = body["certificate"]
        certificate = certify(Settings(**found["settings"]), tuple(Phase(**p) for p in found["history"]), noise=found["noise"])
        same = all(math.isclose(getattr(certificate, n), found[n], rel_tol=1e-9, abs_tol=1e-12) for n in ("epsilon", "delta", "learning"))
        same = same and (certificate.covers, list(certificate.excludes)) == (found["covers"], found["excludes"])
    except ModelError:
        raise
    except ExpungeError as error:
        raise ModelError(f"{path.name} asks for a certificate that cannot be given ({error})") from None
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ModelError(f"{path.name} is not well-formed ({type(error).__name__}: {error})") from None
    if not same:
        raise ModelError(f"{path.name} states another certificate than its settings and history give")
    w, s = tensors["weights"], certificate.settings
    if w.ndim != 2 or len(w) != s.classes or w.dtype != torch.double or not bool(torch.isfinite(w).all()):
        raise ModelError(f"{path.name} holds weights of shape {tuple(w.shape)} {w.dtype} for {s.classes} classes")
    return body, tensors, certificate
