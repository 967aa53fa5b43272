"""history.jsonl: one JSON line an epoch, for every phase of a run; a resumed phase drops the lines
past its checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...core.storage import replace_file


def read_history(path: Path) -> list[dict[str, Any]]:
    """The lines of a history; a line cut short by a kill is left out."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict):
            lines.append(record)
    return lines


def rewind_history(path: Path, phase: str, last_epoch: int) -> list[dict[str, Any]]:
    """Keep this phase's lines up to `last_epoch` and every line of other phases; returns this
    phase's.
    """
    records = read_history(path)
    kept = [
        record
        for record in records
        if record.get("phase") != phase or int(record.get("epoch", 0)) <= last_epoch
    ]
    if path.is_file():
        replace_file(path, "".join(f"{json.dumps(record)}\n" for record in kept))
    return [record for record in kept if record.get("phase") == phase]


def append_history(path: Path, record: Mapping[str, Any]) -> None:
    """Add one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(dict(record)) + "\n")
