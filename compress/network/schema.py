"""The JSON schema of architecture.json, for whoever reads or writes one without this package.

`python -m vitrim.compress.network.schema` writes it anew after a change of architecture.py; a test
keeps the file equal to the code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...core.storage import replace_file
from .architecture import SCHEMA, Architecture

SCHEMA_FILE = Path(__file__).with_name("architecture.schema.json")


def architecture_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of what `save` writes as architecture.json."""
    schema = Architecture.model_json_schema(by_alias=True, mode="validation")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:{SCHEMA.replace('/', ':')}",
        **schema,
    }


def schema_text() -> str:
    """The schema as the file holds it."""
    return json.dumps(architecture_schema(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    replace_file(SCHEMA_FILE, schema_text())
