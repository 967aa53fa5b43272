"""The notebook: committed without outputs, and it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

# Fewer images, steps and samples than the page shows: the same calls, in seconds.
QUICK = {
    "data.test.arrays(1000)": "data.test.arrays(200)",
    "data.train.arrays(3000)": "data.train.arrays(256)",
    "steps=40": "steps=2",
    "time_limit_s=2": "time_limit_s=0.1",
}
NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "quickstart.ipynb"


def test_the_notebook_is_committed_without_outputs() -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(code) > 5
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def test_the_notebook_runs_and_shows_pictures(tmp_path: Path) -> None:
    for module in ("nbclient", "nbformat", "ipykernel"):
        pytest.importorskip(module, reason=f"no {module}: pip install 'vitrim[notebook]'")
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)  # type: ignore[no-untyped-call]
    for text, quick in QUICK.items():
        (cell,) = [cell for cell in notebook.cells if text in cell.source]
        cell.source = cell.source.replace(text, quick)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute(cwd=str(tmp_path))
    outputs: list[Any] = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    pictures = [out for out in outputs if "image/png" in out.get("data", {})]
    printed = "".join(out["text"] for out in outputs if out["output_type"] == "stream")
    assert len(pictures) == 2
    assert "relative error" in printed
    assert "p50" in printed
