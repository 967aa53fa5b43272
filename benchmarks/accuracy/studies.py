"""The studies of the package at the size that two cores allow, and what is committed of them.

    python -m benchmarks.accuracy.studies structured magnitude tokens tandem
    python -m benchmarks.accuracy.studies structured --set train.precision=bf16 --jobs 2

runs each as `vitrim study NAME` does, and then writes `results/studies/NAME/`: `study.md` with the
claims of the sources, the means and the fronts, the machine and the hours; its figures; and all
runs as `runs.csv`. The same command resumes, and a finished study is only written again. A page
leads to the reports of runs only in the folder of its study, so that its links are left out.
"""

from __future__ import annotations

import argparse
import json
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path

from vitrim.bench.local.environment import read_machine
from vitrim.cli import call
from vitrim.core.storage import replace_file
from vitrim.pipeline.studies.exports import as_csv
from vitrim.pipeline.studies.report import TEXT_FILE
from vitrim.pipeline.studies.summary import Summary, summarise
from vitrim.pipeline.studies.table import RUNS, StudyTable

from ..results_file import RESULTS

LINK = re.compile(r"\[([^\]]*)\]\(runs/[^)]*\)")
PICTURE = re.compile(r"!\[[^\]]*\]\((study-[^)]+\.svg)\)")
# Dates, and what differs by the folder.
LEFT_OUT = ("changed_at", "reason")


def main() -> int:
    """Run, write, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="+", help="structured, magnitude, tokens, tandem")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="sets")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    parser.add_argument("--folder", type=Path, default=Path("runs/studies"))
    parser.add_argument("--out", type=Path, default=RESULTS / "studies")
    options = parser.parse_args()
    for name in options.names:
        folder = options.folder / name
        if (folder / "study.sqlite").is_file():
            command = ["study", str(folder / "study.toml"), "--resume"]
        else:
            sets = [part for each in options.sets for part in ("--set", each)]
            command = ["study", name, *sets]
        status = call([*command, "--out", str(folder), "--jobs", str(options.jobs)])
        if status:
            return status
        commit_study(name, folder, options.out / name)
        print(options.out / name / TEXT_FILE)
    return 0


def commit_study(name: str, folder: Path, out: Path) -> None:
    """Write what is committed of a study.

    Args:
        name: Its name, for the command.
        folder: The study folder, with its report.
        out: Where to write.
    """
    summary = summarise(StudyTable(folder))
    page = (folder / TEXT_FILE).read_text(encoding="utf-8")
    out.mkdir(parents=True, exist_ok=True)
    for file in PICTURE.findall(page):
        replace_file(out / file, (folder / file).read_text(encoding="utf-8"))
    replace_file(out / TEXT_FILE, committed_page(page, provenance(name, summary, folder)))
    columns = [each.name for each in summary.columns if each.name not in LEFT_OUT]
    replace_file(out / "runs.csv", as_csv(summary.rows, columns))


def committed_page(page: str, first: Sequence[str]) -> str:
    """The report of a study without its links and its table of all runs.

    Args:
        page: study.md.
        first: Paragraphs that follow its title.
    """
    title, *parts = re.split(r"\n(?=## )", LINK.sub(r"\1", page).strip())
    kept = [part for part in parts if not part.startswith("## All runs")]
    heading, _, rest = title.partition("\n\n")
    return "\n\n".join([heading, *first, rest, *(part.strip() for part in kept)]) + "\n"


def provenance(name: str, summary: Summary, folder: Path) -> list[str]:
    """The command, the machine and the processor hours of a study."""
    sets = tomllib.loads(summary.facts["toml"]).get("overrides", {})
    given = "".join(f" --set {key}={json.dumps(value)}" for key, value in sets.items())
    machine = read_machine()["cpu_model"]
    text = (
        f"`python -m benchmarks.accuracy.studies {name}{given}`, "
        f"{step_hours(folder):.1f} hours on {machine}, one thread for each training. "
        "`runs.csv` has all runs."
    )
    return [text.replace('"', "")]


def step_hours(folder: Path) -> float:
    """The hours of all steps of all runs; a step that runs share counts once."""
    seconds: dict[str, float] = {}
    for path in sorted((folder / RUNS).glob("*/steps.json")):
        for step in json.loads(path.read_text(encoding="utf-8"))["steps"].values():
            seconds[step["fingerprint"]] = step["seconds"]
    return sum(seconds.values()) / 3600.0


if __name__ == "__main__":
    raise SystemExit(main())
