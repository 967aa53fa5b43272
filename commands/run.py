"""`vitrim run`, and its first steps alone: `vitrim train` and `vitrim compress`."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from ..core.console import show
from ..pipeline.recipe import Recipe, load_recipe
from ..pipeline.recipe_keys import key_reference
from .launch import INTERRUPTED, launch
from .option_groups import with_option_groups

if TYPE_CHECKING:
    from ..pipeline.run import Step

RESUMABLE = ("run", "train", "compress")

RecipeName = Annotated[
    str | None,
    typer.Argument(
        help="A recipe (TOML), or the name of one in the package. Default: quickstart.",
        show_default=False,
    ),
]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Replace one value of the recipe, e.g. --set masks.params=0.1. May be repeated.",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", help="Run folder. Default: runs/NAME of the recipe.", show_default=False),
]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Continue the run in the folder; complete steps are kept."),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Delete the run in the folder and start again.")
]
Seed = Annotated[
    int | None,
    typer.Option(
        "--seed",
        min=0,
        help="Seed of weights, batch order and augmentation (train.seed).",
        show_default=False,
    ),
]
NoDistill = Annotated[
    bool,
    typer.Option(
        "--no-distill", help="Train on the labels alone, without the dense model as the teacher."
    ),
]
NewHead = Annotated[
    bool,
    typer.Option(
        "--new-head",
        help="Start a new classifier on the checkpoint, for another set of classes "
        "(model.new_head); baseline.epochs trains it.",
    ),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print errors and the final table only.")
]
Keys = Annotated[
    bool,
    typer.Option(
        "--keys", help="Print every key of a recipe with its default and meaning, and stop."
    ),
]
ProcessCount = Annotated[
    int,
    typer.Option(
        "--processes",
        min=1,
        help="Train in this many processes of this machine, one for each GPU, which share each "
        "batch (by accelerate). On several machines: accelerate launch -m vitrim run RECIPE.",
    ),
]
JsonLines = Annotated[
    bool,
    typer.Option(
        "--json-progress",
        help="Write each epoch as one JSON line to standard output, in place of the final table.",
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Build the model, open the data, try the budget and time a few steps; print the "
        "estimated steps, hours and memory, and stop. No file is written.",
    ),
]


@dataclass(frozen=True)
class RunOptions:
    """The recipe of a run and its folder."""

    recipe: RecipeName = None
    sets: Sets = None
    out: Out = None
    resume: Resume = False
    overwrite: Overwrite = False
    seed: Seed = None
    new_head: NewHead = False
    processes: ProcessCount = 1
    json_progress: JsonLines = False
    quiet: Quiet = False


@with_option_groups
def run(
    *,
    options: RunOptions,
    no_distill: NoDistill = False,
    dry_run: DryRun = False,
    keys: Keys = False,
) -> None:
    """Run the whole chain: baseline, masks, cut, fine-tuning, export, measurement, report.

    [bold]Examples[/bold]

      vitrim run
      vitrim run fashion_mnist --set masks.params=0.1 --seed 13
      vitrim run my.toml --dry-run
      vitrim run my.toml --out runs/trial --resume
      vitrim run my.toml --processes 2 --set train.precision=bf16

    Args:
        options: The recipe and its folder.
        no_distill: Train on the labels alone.
        dry_run: Print estimates in place of the run.
        keys: Print the keys of a recipe in place of the run.
    """
    if keys:
        _show_keys()
    elif dry_run:
        _estimate(options, no_distill=no_distill)
    else:
        _run_chain("run", options, "report", no_distill=no_distill)


@with_option_groups
def train(*, options: RunOptions) -> None:
    """Train the dense baseline, or read its checkpoint, and save it in the run folder.

    [bold]Example[/bold]

      vitrim train fashion_mnist --set baseline.epochs=20 --out runs/fashion
    """
    _run_chain("train", options, "baseline")


@with_option_groups
def compress(*, options: RunOptions, no_distill: NoDistill = False) -> None:
    """Train the baseline and its masks, and save mask.safetensors and the cut model in cut/.

    `vitrim run ... --resume` continues from there.

    [bold]Example[/bold]

      vitrim compress my.toml --set masks.macs=0.5
    """
    _run_chain("compress", options, "masks", no_distill=no_distill)


def _recipe(options: RunOptions, *, no_distill: bool) -> tuple[Recipe, list[str]]:
    """The recipe with the changes of the options, and these changes."""
    changes = list(options.sets or [])
    if options.seed is not None:
        changes.append(f"train.seed={options.seed}")
    if options.new_head:
        changes.append("model.new_head=true")
    if no_distill:
        changes.append("distill.enabled=false")
    return load_recipe(options.recipe, changes), changes


def _run_chain(command: str, options: RunOptions, until: Step, *, no_distill: bool = False) -> None:
    recipe, changes = _recipe(options, no_distill=no_distill)
    # torch takes seconds to import, so errors in the recipe are reported before it.
    import_torch_with_sleeping_threads()
    if options.processes > 1:
        _launch(command, options, recipe, changes)
        return
    from ..pipeline.run import run as run_chain

    run_chain(
        recipe,
        options.out if options.out is not None else Path("runs", os.fsdecode(recipe.name.encode())),
        until=until,
        resume=options.resume,
        overwrite=options.overwrite,
        quiet=options.quiet,
        recipe_file=None if options.recipe is None else Path(options.recipe),
        json_progress=options.json_progress,
    )


def _launch(command: str, options: RunOptions, recipe: Recipe, changes: list[str]) -> None:
    """Run the command in several processes, and exit as they do."""
    from ..compress.train.processes import require_shares
    from ..pipeline.training_host import placement_of, require_devices

    require_devices(placement_of(recipe.train)[0], options.processes)
    require_shares(recipe.train.batch_size, recipe.train.batch_size, options.processes)
    arguments = [command, *([] if options.recipe is None else [options.recipe])]
    arguments += [word for change in changes for word in ("--set", change)]
    arguments += [] if options.out is None else ["--out", str(options.out)]
    for name in ("resume", "overwrite", "json_progress", "quiet"):
        arguments += [f"--{name.replace('_', '-')}"] if getattr(options, name) else []
    code = launch(options.processes, arguments)
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    if code:
        raise typer.Exit(code)


def _estimate(options: RunOptions, *, no_distill: bool) -> None:
    recipe, _ = _recipe(options, no_distill=no_distill)
    import_torch_with_sleeping_threads()
    from ..pipeline.dry_run import dry_run, lines

    estimate = dry_run(recipe, processes=options.processes, quiet=options.quiet)
    if options.json_progress:
        show(json.dumps(dataclasses.asdict(estimate)))
        return
    for line in lines(estimate):
        show(line)


def import_torch_with_sleeping_threads() -> None:
    """Import torch so that its idle threads sleep; OMP_WAIT_POLICY in the environment wins.

    OpenMP's threads wait busily for each other by default. On a machine that does other work too,
    each then waits for one that does not run: two threads trained a fifth as many images per
    second as with sleeping threads, and a third of what one thread does
    (`python -m benchmarks.accuracy.quickstart`).
    """
    variable = "OMP_WAIT_POLICY"
    if "torch" in sys.modules or variable in os.environ:
        return
    os.environ[variable] = "passive"
    try:
        import torch  # noqa: F401 - the policy is read when its OpenMP library is loaded
    finally:
        # Runners of artifacts start with the user's own environment.
        del os.environ[variable]


def _show_keys() -> None:
    for table in key_reference(Recipe):
        meaning = escape(table.meaning)
        head = f"[bold]{escape(f'[{table.name}]')}[/bold]  {meaning}"
        show(f"\n{head}" if table.name else f"[bold]{meaning}[/bold]", markup=True)
        for key in table.keys:
            line = f"  [cyan]{key.name} = {escape(key.default)}[/cyan]  {escape(key.meaning)}"
            show(line, markup=True)
