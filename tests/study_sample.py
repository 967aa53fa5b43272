"""A study of tiny runs, and tables of many rows, for tests of studies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from photo_folder import write_photos, write_recipe
from vitrim.pipeline.studies.table import StudyTable

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


def logged_processes(folder: Path) -> list[int]:
    """The numbers of the processes that did the jobs of a study, by the lines that are complete."""
    lines = [
        line
        for log in sorted((folder / "logs").glob("*.log"))
        for line in log.read_text(encoding="utf-8").splitlines(keepends=True)
    ]
    starts = [line for line in lines if line.startswith("--- ") and line.endswith("\n")]
    return [int(line.rpartition(" ")[2]) for line in starts]


def large_table(folder: Path, count: int) -> StudyTable:
    """A table with finished runs of two axes and three seeds, in an empty folder."""
    # From the root of the repository, where pytest runs.
    from benchmarks.measurement.study_table import write_table

    def planted(number: int, count: int) -> dict[str, Any]:
        sharing = ("full", "residual")[number % 2]
        return {"masks.params": 0.1 + number // 3 / count, "masks.sharing": sharing}

    return write_table(folder, count, planted)
