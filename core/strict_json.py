"""JSON from strangers: no repeated keys, no NaN or Infinity, no depth that breaks the parser.
(1e999 is left to whoever knows the key.)
"""

from __future__ import annotations

import json
import re
from typing import Any


def parse(content: bytes | str) -> Any:
    """The value of a UTF-8 JSON text. Errors: ValueError with the reason in one printable line."""
    try:
        text = content.decode("utf-8") if isinstance(content, bytes) else content
        return json.loads(text, object_pairs_hook=_each_once, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    except ValueError as error:
        raise ValueError(_printable(str(error), 200)) from None


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {_printable(key, 80)!r} is there twice")
        found[key] = value
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _printable(text: str, most: int) -> str:
    text = re.sub(r"[^\x20-\x7e]", "?", " ".join(text.split()))
    return text if len(text) <= most else text[: most - 3] + "..."
