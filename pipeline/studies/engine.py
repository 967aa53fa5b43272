"""Running a study: its folder, its jobs, and the rows of its table."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.markup import escape

from ...core.console import status, unit_count
from ...core.errors import InputError
from ...core.staging import only_writer
from ...core.storage import disk_errors, replace_file, require_output_folder, require_separate
from ..bench_device import require_device
from ..run import Step, prepare
from .beside import measure_beside, require_models
from .early_stop import EarlyStop
from .expansion import StudyRun, expand
from .figures import read_figures, stopped_figures
from .jobs import Outcome
from .local_workers import Event, LocalWorkers, Started
from .plan import MEASURED, Job, plan_jobs
from .study_file import STUDY_FILE, Study, base_copy
from .table import RUNS, TABLE_FILE, StudyTable
from .token_figures import measure_token_figures, require_token_figures

ENDED = ("done", "failed", "stopped")


@dataclass(frozen=True)
class StudyOptions:
    """How a study runs.

    Attributes:
        resume: Continue the study in the folder; finished runs are kept.
        retry_failed: With `resume`: try failed runs again.
        jobs: Trainings at a time on one machine.
        ray: Address of a Ray cluster, `auto` for the one that runs here or a new one on this
            machine; None: processes of this machine.
        quiet: Print errors only.
        early_stop: `asha`: stop runs that others surpass, as the study's key of that name.
    """

    resume: bool = False
    retry_failed: bool = False
    jobs: int = 1
    ray: str | None = None
    quiet: bool = False
    early_stop: str | None = None


def validated_runs(study: Study, *, quiet: bool = False) -> list[StudyRun]:
    """Expand a study and try what its runs share: data, model and export.

    Args:
        study: The study.
        quiet: Show no progress.

    Returns:
        The runs.

    Raises:
        InputError: A key or a value of a run is invalid, or its data or model cannot be opened.
    """
    runs = expand(study)
    require_models(study.section.beside)
    status(f"{escape(study.name)}: {len(runs)} runs; trying data and models", quiet=quiet)
    tried = set[str]()
    for run in runs:
        plain = run.recipe.plain()
        mark = json.dumps([plain[name] for name in ("data", "model", "export")], sort_keys=True)
        mark += str(run.recipe.baseline.epochs > 0)
        if mark not in tried:
            tried.add(mark)
            try:
                dense = prepare(run.recipe, quiet=quiet).dense
                if study.section.token_figures is not None:
                    require_token_figures(study.section.token_figures, run, dense.architecture)
            except InputError as error:
                raise InputError(f"{study.path}: {run.title}: {error}") from None
    return runs


def run_study(study: Study, folder: Path, options: StudyOptions | None = None) -> StudyTable:
    """Run a study, or what is left of it.

    Args:
        study: The study.
        folder: The study folder; it is created.
        options: How it runs.

    Returns:
        The table; failed runs are rows with their reason.

    Raises:
        InputError: The study is invalid, or the folder contains something else. No run has
            started then.
    """
    options = options or StudyOptions()
    _require_folder(study, folder, resume=options.resume)
    runs = validated_runs(study, quiet=options.quiet)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with only_writer(folder):
        table = _open_table(study, folder, runs)
        states = table.states()
        kept = {"done", "stopped", *(() if options.retry_failed else ("failed",))}
        todo = {run.id for run in runs if states[run.id] not in kept}
        table.restart(todo)
        until = study.section.until
        jobs = plan_jobs(runs, split=options.jobs > 1 or options.ray is not None, until=until)
        _require_devices(study, [run for run in runs if run.id in todo], until)
        rule = _early_stop(study, options)
        jobs = [replace(job, early_stop=rule) for job in jobs if job.run.id in todo]
        status(_beginning(runs, todo, folder), quiet=options.quiet)
        with contextlib.closing(_events(jobs, folder, options)) as events:
            _follow(events, table, folder, until, quiet=options.quiet)
        if until == MEASURED:
            # With the values of [set] and --set; an axis over [bench] times them as its first run.
            names, bench = study.section.beside, runs[0].recipe.bench
            measure_beside(names, table, folder, bench, quiet=options.quiet)
        if study.section.token_figures is not None:
            measure_token_figures(
                study.section.token_figures, runs, table, folder, quiet=options.quiet
            )
    return table


def _require_devices(study: Study, runs: Sequence[StudyRun], until: Step) -> None:
    """Check that each device that measures runs responds, before the first one starts."""
    devices = {run.recipe.bench.model_dump_json(): run for run in runs if run.recipe.bench.on}
    for run in devices.values():
        try:
            require_device(run.recipe, until)
        except InputError as error:
            raise InputError(f"{study.path}: {run.title}: {error}") from None


def _early_stop(study: Study, options: StudyOptions) -> EarlyStop | None:
    section = study.section
    if (options.early_stop or section.early_stop) is None:
        return None
    return EarlyStop(section.early_stop_factor, section.early_stop_epochs)


def _require_folder(study: Study, folder: Path, *, resume: bool) -> None:
    """Validate that the study may write to the folder.

    Raises:
        InputError: It contains another study, or files of others.
    """
    inputs = {"the study": study.path, **study.base.inputs()}
    if not any((folder / name).exists() for name in (TABLE_FILE, STUDY_FILE)):
        require_output_folder(folder, inputs=inputs)
        return
    if not resume:
        raise InputError(
            f"{folder}: contains a study; --resume continues it, --out names another folder"
        )
    own = _is_own(study, folder)
    require_separate(folder, {**inputs, "the study": None if own else study.path})


def _is_own(study: Study, folder: Path) -> bool:
    """Whether the study file is the copy in the folder."""
    return study.path.resolve() == (folder / STUDY_FILE).resolve()


def _open_table(study: Study, folder: Path, runs: Sequence[StudyRun]) -> StudyTable:
    section = study.section
    facts = {
        "name": study.name,
        "about": section.about,
        "source": section.source,
        "bibtex": section.bibtex,
        "recipe": section.recipe,
        # With the values of [set], which alone may be invalid.
        "base": runs[0].recipe.toml(),
        "toml": study.text,
        "repetitions": str(section.repetitions),
    }
    ids = {run.id for run in runs}
    if (folder / TABLE_FILE).is_file() and (folder / TABLE_FILE).stat().st_size:
        known = StudyTable(folder)
        if _is_own(study, folder) and not section.name:
            # The copy of the file is not named as the file was.
            facts["name"] = known.facts().get("name", study.name)
        others = [run_id for run_id in known.states() if run_id not in ids]
        if others:
            raise InputError(
                f"{folder}: has {len(others)} runs that {study.path} does not describe (the first "
                f"is {others[0]}), since it or its recipe has changed; name another folder with "
                "--out, or restore the file: it may gain runs, but lose none"
            )
    table = StudyTable.create(folder, facts)
    # The recipe first: a study file without it may describe nothing.
    replace_file(base_copy(folder, section.recipe), study.base.toml())
    replace_file(folder / STUDY_FILE, study.text)
    table.add_runs(runs)
    return table


def _beginning(runs: Sequence[StudyRun], todo: set[str], folder: Path) -> str:
    left = f"{len(todo)} of {len(runs)} runs are left" if len(todo) < len(runs) else "starting"
    return f"{left}; logs are in {escape(str(folder))}/logs"


def _events(
    jobs: Sequence[Job], folder: Path, options: StudyOptions
) -> Generator[Event, None, None]:
    if options.ray is not None:
        from .ray_workers import run_on_ray

        yield from run_on_ray(jobs, folder.resolve(), options.ray, options.jobs)
    else:
        yield from LocalWorkers(folder, options.jobs).run(jobs)


def _follow(
    events: Iterable[Event], table: StudyTable, folder: Path, until: Step, *, quiet: bool
) -> None:
    """Write each event to the table, and print one line for each run that ends."""
    states = table.states()
    count, ended = len(states), sum(state in ENDED for state in states.values())
    trained: dict[str, StudyRun] = {}
    for event in events:
        if isinstance(event, Started):
            trained[event.job.run.id] = event.job.run
            table.change(event.job.run.id, "running")
            continue
        run = trained[event.run]
        line = _record(event, table, folder, until)
        if line is not None:
            ended += 1
            status(f"{ended}/{count}  {escape(f'{run.id}  {run.title}')}: {line}", quiet=quiet)


def _record(event: Outcome, table: StudyTable, folder: Path, until: Step) -> str | None:
    """Write the end of a job to the table; the line about its run, if that has ended."""
    reason = event.reason
    if reason is None and not event.job.endswith(f"/{until}"):
        table.change(event.run, "trained")
        return None
    if reason is None:
        try:
            figures, columns = read_figures(folder / RUNS / event.run)
        except InputError as error:
            reason = str(error)
        else:
            table.change(event.run, "done", figures=figures, columns=columns)
            top1, params = figures.get("top1", figures["val_top1"]), figures.get("params")
            accuracy = f"{100 * float(top1):.2f} %" if top1 is not None else "no accuracy"
            return f"{accuracy}, {unit_count(float(params or 0))} parameters"
    if event.stopped:
        with contextlib.suppress(InputError):
            table.change(event.run, "stopped", reason, stopped_figures(folder / RUNS / event.run))
            return str(reason)
    table.change(event.run, "failed", reason)
    return f"[red]failed[/red]: {escape(reason)}"
