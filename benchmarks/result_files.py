"""What a benchmark leaves: JSON for programs and Markdown for people, neither ever half-written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vitrim.core.storage import replace_file


def save_result(out: Path, result: dict[str, Any], words: str) -> None:
    """Write `out` with the endings .json and .md."""
    replace_file(out.with_suffix(".json"), json.dumps(result, indent=1) + "\n")
    replace_file(out.with_suffix(".md"), words)
