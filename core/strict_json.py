"""Strict parsing of untrusted JSON."""

from __future__ import annotations

import json
import re
from typing import Any

_MOST_REASON_CHARACTERS = 200
_MOST_KEY_CHARACTERS = 80


def parse(content: bytes | str) -> Any:
    """Parse a UTF-8 JSON text without repeated keys, NaN, Infinity or excessive nesting.

    Numbers that overflow (1e999) are not rejected here; the schema of the file validates ranges.

    Args:
        content: The whole text.

    Returns:
        Dicts, lists, strings, numbers, booleans and None.

    Raises:
        ValueError: The text is malformed; the message is one printable line.
    """
    try:
        text = content.decode("utf-8") if isinstance(content, bytes) else content
        return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_reject_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    except ValueError as error:
        raise ValueError(_printable(str(error), _MOST_REASON_CHARACTERS)) from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            key = _printable(key, _MOST_KEY_CHARACTERS)
            raise ValueError(f"the key {key!r} is there twice")
        found[key] = value
    return found


def _reject_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _printable(text: str, most: int) -> str:
    text = re.sub(r"[^\x20-\x7e]", "?", " ".join(text.split()))
    return text if len(text) <= most else text[: most - 3] + "..."
