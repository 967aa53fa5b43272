"""A study of tiny runs, and tables of many rows, for tests of studies."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

from photo_folder import write_photos, write_recipe
from vitrim.pipeline.recipe import load_recipe
from vitrim.pipeline.studies.expansion import StudyRun
from vitrim.pipeline.studies.table import Column, StudyTable

QUICK = (
    '[export]\nprecisions = ["fp32"]\n[bench]\ntime_limit_s = 0.1\n[report]\nestimate_for = []\n'
)


def write_study(folder: Path, text: str, name: str = "trial") -> Path:
    """Write photos, a recipe for them and a study of it; `text` are its tables.

    Returns:
        The study file.
    """
    if not (folder / "photos").exists():
        write_photos(folder / "photos")
        write_recipe(folder / "tiny.toml", folder / "photos", QUICK, masks_epochs=1)
    path = folder / f"{name}.toml"
    path.write_text(f'recipe = "tiny.toml"\n{text}', encoding="utf-8")
    return path


def rows_without_time(table: StudyTable) -> list[dict[str, Any]]:
    """The rows without what differs between two runs of the same study."""
    timed = ("changed_at", "train_s")
    return [
        {
            name: value
            for name, value in row.items()
            if name not in timed and not name.endswith("_ms")
        }
        for row in table.rows()
    ]


def large_table(folder: Path, count: int) -> StudyTable:
    """A table with finished runs of two axes and three seeds, in an empty folder."""
    recipe = load_recipe()
    table = StudyTable.create(folder, {"name": "large", "toml": "", "base": recipe.toml()})
    runs = [
        StudyRun(
            f"{number:010x}",
            number + 1,
            (7, 13, 42)[number % 3],
            1,
            {
                "masks.params": 0.1 + number // 3 / count,
                "masks.sharing": ("full", "residual")[number % 2],
            },
            recipe,
        )
        for number in range(count)
    ]
    table.add_runs(runs)
    # While a connection is open, closing the others writes no checkpoint.
    link = sqlite3.connect(table.path)
    link.execute("SELECT count(*) FROM runs").fetchone()
    latency = Column("compact_fp32_ms", "figure", "REAL", "median latency in milliseconds")
    for number, run in enumerate(runs):
        share = run.values["masks.params"]
        figures: dict[str, Any] = {
            "top1": 0.5 + 0.4 * share + 0.01 * (number % 7),
            "top1_dense": 0.95,
            "params": round(1e6 * share),
            "params_dense": 1_000_000,
            "macs": round(4e7 * share),
            "macs_dense": 40_000_000,
            "compact_fp32_ms": 3.0 * share + 0.1,
        }
        table.change(run.id, "done", figures=figures, columns=[latency])
    link.close()
    return table
