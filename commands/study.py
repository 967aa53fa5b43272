"""`vitrim study`: many runs from one file, their table and their report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from ..core.console import echo, show, unit_count
from ..core.errors import InputError
from ..core.storage import replace_file, require_separate
from .option_groups import Quiet
from .run import import_torch_with_sleeping_threads

Format = Literal["table", "csv", "json", "parquet"]
# Columns of the text table beside the axes; others are in the other formats, or by --columns.
SHOWN = ("top1", "val_top1", "params", "macs")


class _RunByDefault(typer.core.TyperGroup):
    """`vitrim study FILE` is `vitrim study run FILE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = {*self.commands, *ctx.help_option_names}
        if args and args[0] not in own:
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_RunByDefault,
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Run many recipes from one file: a grid with seeds, one table, one report.\n\n"
    "[bold]Examples[/bold]\n\n"
    "  vitrim study structured --dry-run\n\n"
    "  vitrim study my_study.toml --out studies/mine --jobs 2\n\n"
    "  vitrim study show studies/mine --sort top1 --where 'params < 1e6'\n\n"
    "  vitrim study report studies/mine --latex",
)
StudyName = Annotated[
    str,
    typer.Argument(
        metavar="STUDY",
        help="A study (TOML), or the name of one in the package.",
        show_default=False,
    ),
]
Folder = Annotated[
    Path, typer.Argument(help="A study folder, written by `vitrim study FILE --out FOLDER`.")
]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Replace a value of all runs, by recipe key, e.g. --set finetune.epochs=2. May be "
        "repeated.",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out", help="Study folder. Default: runs/studies/NAME of the file.", show_default=False
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Continue the study in the folder; finished runs are kept, and so are complete steps "
        "of the others. The file may have gained runs.",
    ),
]
RetryFailed = Annotated[
    bool, typer.Option("--retry-failed", help="With --resume: try failed runs again.")
]
Jobs = Annotated[
    int,
    typer.Option(
        "--jobs",
        min=1,
        help="Trainings at a time on one machine; its processors are divided among them. "
        "Measurements follow after all trainings, one at a time.",
    ),
]
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Run on a Ray cluster: its address, or auto for the one that runs here, else a new "
        "one on this machine. All machines need the study folder under one path.",
        show_default=False,
    ),
]
EarlyStop = Annotated[
    Literal["asha"] | None,
    typer.Option(
        "--early-stop",
        help="asha: stop a run during its fine-tuning unless it is among the best of those of "
        "equal size settings. Default: as in the study file.",
        show_default=False,
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Validate every run, open the data and build the model, list the runs, and stop. No "
        "file is written.",
    ),
]
Sort = Annotated[
    str | None,
    typer.Option(
        "--sort",
        metavar="COLUMN",
        help="Order by a column, the best value first; -COLUMN: the worst first.",
        show_default=False,
    ),
]
Where = Annotated[
    str | None,
    typer.Option(
        "--where",
        metavar="CONDITION",
        help='Show only runs that meet a condition, e.g. "params < 1e6 and masks.sharing = '
        "'full'\". Comparisons, in (...), is null, and, or, not, parentheses.",
        show_default=False,
    ),
]
Columns = Annotated[
    str | None,
    typer.Option(
        "--columns",
        metavar="NAMES",
        help="Comma-separated columns to show. Default: the axes and the main figures; all of them "
        "in csv, json and parquet.",
        show_default=False,
    ),
]
Means = Annotated[
    bool,
    typer.Option("--means", help="One row for each setting: means and deviations over the seeds."),
]
FormatOption = Annotated[Format, typer.Option("--format", help="How the rows are written.")]
OutFile = Annotated[
    Path | None,
    typer.Option(
        "--out",
        help="Write csv, json or parquet to this file instead of standard output. An existing one "
        "is replaced if it has rows of this study.",
        show_default=False,
    ),
]
Latex = Annotated[
    bool,
    typer.Option(
        "--latex",
        help="Also write latex/: a two-column article with the tables and figures filled in, and "
        "its PDF where a TeX is installed.",
    ),
]


@app.command("run")
def run(
    study: StudyName,
    sets: Sets = None,
    out: Out = None,
    resume: Resume = False,
    retry_failed: RetryFailed = False,
    jobs: Jobs = 1,
    ray: Ray = None,
    early_stop: EarlyStop = None,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """Run a study; the word run may be left out.

    Each run is an ordinary run folder. Baselines and masks that several runs have in common are
    computed once. Failed runs are rows of the table with their reason. At the end the report is
    written; the exit code is 1 if a run failed.

    [bold]Examples[/bold]

      vitrim study structured --dry-run

      vitrim study my_study.toml --out studies/mine --jobs 2

      vitrim study my_study.toml --out studies/mine --resume

      vitrim study tokens --set data.name=fashion-mnist --set data.limit=10000

    Args:
        study: The file.
        sets: Values of all runs, in place of those of the file.
        out: The study folder.
        resume: Continue the study in it.
        retry_failed: Try failed runs again.
        jobs: Trainings at a time on one machine.
        ray: Address of a Ray cluster.
        early_stop: Stop runs that others surpass.
        dry_run: Validate and list the runs only.
        quiet: Print errors only.
    """
    from ..pipeline.studies.study_file import load_study

    loaded = load_study(study, sets or ())
    if retry_failed and not resume:
        raise InputError("--retry-failed needs --resume")
    if ray is not None:
        from ..pipeline.studies.ray_workers import require_ray

        require_ray()
    import_torch_with_sleeping_threads()
    from ..pipeline.studies.engine import StudyOptions, run_study, validated_runs

    if dry_run:
        for one in validated_runs(loaded, quiet=quiet):
            show(f"{one.id}  {one.title}")
        return
    folder = out if out is not None else Path("runs", "studies", loaded.path.stem)
    options = StudyOptions(resume, retry_failed, jobs, ray, quiet, early_stop)
    table = run_study(loaded, folder, options)
    from ..pipeline.studies.report import write_report

    for path in write_report(folder):
        echo(str(path))
    failed = sum(state == "failed" for state in table.states().values())
    if failed:
        echo(f"{failed} runs failed: vitrim study show {folder} --where \"state = 'failed'\"")
        raise typer.Exit(1)


@app.command("show")
def show_rows(
    folder: Folder,
    sort: Sort = None,
    where: Where = None,
    columns: Columns = None,
    means: Means = False,
    format_: FormatOption = "table",
    out: OutFile = None,
) -> None:
    """Print the rows of a study, or write them to a file.

    The study may be running. docs/studies.md describes the columns.

    [bold]Examples[/bold]

      vitrim study show studies/mine --sort top1 --where 'params < 1e6'

      vitrim study show studies/mine --means --sort top1

      vitrim study show studies/mine --format parquet --out rows.parquet

    Args:
        folder: The study folder.
        sort: A column; the best value is first.
        where: A condition that the shown runs meet.
        columns: The columns to show.
        means: One row for each setting.
        format_: How the rows are written.
        out: A file instead of standard output.
    """
    from ..pipeline.studies.condition import require_column
    from ..pipeline.studies.exports import as_csv, as_json, as_parquet, mean_rows, rows_kind
    from ..pipeline.studies.summary import summarise
    from ..pipeline.studies.table import StudyTable

    if format_ == "parquet" and out is None:
        raise InputError("--format parquet: name the file with --out rows.parquet")
    if format_ == "table" and out is not None:
        raise InputError(f"--out {out}: a table is only shown; write --format csv, json or parquet")
    table = StudyTable(folder)
    summary = summarise(table)
    rows, known = table.rows(where, sort), list(summary.columns)
    if means:
        rows, known = mean_rows(summary, rows, sort)
    names = [column.name for column in known]
    chosen = names
    if columns is not None:
        wanted = [name.strip() for name in columns.split(",") if name.strip()]
        chosen = [require_column(name, names, "--columns") for name in wanted]
    elif format_ == "table":
        chosen = _shown(names, summary.axes, summary.latencies, means=means)
    if format_ == "table":
        show(_text_table(rows, chosen, summary.axes))
        return
    if format_ == "parquet":
        content: str | bytes = as_parquet(rows, chosen)
    else:
        content = (as_csv if format_ == "csv" else as_json)(rows, chosen)
    if out is None:
        sys.stdout.write(str(content))
    else:
        require_separate(out, {"the study's table": table.path})
        replace_file(out, content, rows_kind(format_, summary))


@app.command("report")
def report(folder: Folder, latex: Latex = False) -> None:
    """Write study.html and study.md of a study, which may be running.

    [bold]Example[/bold]

      vitrim study report studies/mine --latex

    Args:
        folder: The study folder.
        latex: Also write an article.
    """
    from ..pipeline.studies.report import write_report

    for line in write_report(folder, latex=latex):
        echo(str(line))


def _shown(names: list[str], axes: list[str], latencies: list[str], *, means: bool) -> list[str]:
    figures = [*SHOWN, *latencies]
    if means:
        return [*axes, "runs", *(n for f in figures for n in (f, f"{f}_std") if n in names)]
    return ["id", *axes, "seed", "state", *(name for name in figures if name in names)]


def _text_table(rows: list[dict[str, Any]], columns: list[str], axes: list[str]) -> Table:
    from ..pipeline.studies.summary import short_names

    table = Table(show_edge=False, pad_edge=False)
    titles = short_names([name for name in columns if name in axes])
    for name in columns:
        text = name in axes or name in ("id", "state", "reason")
        title = titles.get(name, name)
        table.add_column(title, justify="left" if text else "right", no_wrap=name != "reason")
    for row in rows:
        table.add_row(*(_cell(name, row[name]) for name in columns))
    return table


def _cell(name: str, value: Any) -> str:
    from ..pipeline.studies.expansion import cell_text

    if value is None:
        return ""
    if "top1" in name:
        return f"{100 * value:.2f} %"
    if name.removesuffix("_std").removesuffix("_dense") in ("params", "macs"):
        return unit_count(value)
    if name.removesuffix("_std").endswith(("_ms", "_s")):
        return f"{value:.3f}"
    return cell_text(value)
