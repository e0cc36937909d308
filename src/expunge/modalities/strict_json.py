"""JSON of files that people wrote: read as it stands, or refused in one line."""

from __future__ import annotations

import json
from typing import Any

from expunge.core.errors import DataError
from expunge.core.files import doubled


def parsed(text: str, where: str) -> Any:
    """The value of a JSON text. Raises DataError that begins with `where` for anything that is none, a name that stands twice in an object, NaN and infinities,
    half a character (a lone surrogate), nesting or numbers beyond Python's limits (4,300 digits)."""
    try:
        found = json.loads(text, object_pairs_hook=_once, parse_constant=_never)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(found, ensure_ascii=False).encode()
        return found
    except DataError as error:
        raise DataError(f"{where} {error}") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON: {error.msg}") from None
    except UnicodeEncodeError:
        raise DataError(f"{where} holds half a character (a lone surrogate)") from None
    except RecursionError:
        raise DataError(f"{where} is nested too deeply") from None
    except ValueError as error:  # an integer of thousands of digits
        raise DataError(f"{where} cannot be read: {str(error).partition(';')[0]}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if name := doubled(pairs):
        raise DataError(f"names {name} twice")
    return dict(pairs)


def _never(word: str) -> Any:
    raise DataError(f"holds {word}, which is no JSON")
