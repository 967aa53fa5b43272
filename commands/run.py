"""`vitrim run`, and its first links alone: `vitrim train` and `vitrim compress`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..pipeline.recipe import Recipe, load_recipe

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
    typer.Option("--resume", help="Continue the run in the folder: steps that are whole are kept."),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Delete the run in the folder and start anew.")
]
Seed = Annotated[
    int | None,
    typer.Option(
        "--seed",
        min=0,
        help="Seed of weights, order and augmentation (train.seed).",
        show_default=False,
    ),
]
NoDistill = Annotated[
    bool,
    typer.Option(
        "--no-distill", help="Learn from the labels alone, without the dense model as a teacher."
    ),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print errors and the final table only.")
]


def run(
    recipe: RecipeName = None,
    sets: Sets = None,
    out: Out = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    seed: Seed = None,
    no_distill: NoDistill = False,
    quiet: Quiet = False,
    keys: Annotated[
        bool,
        typer.Option(
            "--keys", help="Print every key of a recipe with its default and meaning, and stop."
        ),
    ] = False,
) -> None:
    """The whole chain: train or read the baseline, learn masks, cut, fine-tune, export, measure,
    report.

    [bold]Examples[/bold]

      vitrim run
      vitrim run fashion_mnist --set masks.params=0.1 --seed 13
      vitrim run my.toml --out runs/trial --resume
    """
    if keys:
        _print_keys()
        return
    _chain(_recipe(recipe, sets, seed, no_distill), "report", out, resume, overwrite, quiet)


def train(
    recipe: RecipeName = None,
    sets: Sets = None,
    out: Out = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    seed: Seed = None,
    quiet: Quiet = False,
) -> None:
    """Only the dense baseline: train it, or read its checkpoint, and save it in the run folder.

    [bold]Example[/bold]

      vitrim train fashion_mnist --set baseline.epochs=20 --out runs/fashion
    """
    _chain(_recipe(recipe, sets, seed, False), "baseline", out, resume, overwrite, quiet)


def compress(
    recipe: RecipeName = None,
    sets: Sets = None,
    out: Out = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    seed: Seed = None,
    no_distill: NoDistill = False,
    quiet: Quiet = False,
) -> None:
    """The baseline and its masks: what may go is learned and saved as mask.safetensors, and cut/
    holds the smaller model.

    `vitrim run ... --resume` goes on from there.

    [bold]Example[/bold]

      vitrim compress my.toml --set masks.macs=0.5
    """
    _chain(_recipe(recipe, sets, seed, no_distill), "masks", out, resume, overwrite, quiet)


def _recipe(name: str | None, sets: list[str] | None, seed: int | None, no_distill: bool) -> Recipe:
    changes = list(sets or [])
    if seed is not None:
        changes.append(f"train.seed={seed}")
    if no_distill:
        changes.append("distill.enabled=false")
    return load_recipe(name, changes)


def _chain(
    recipe: Recipe, until: str, out: Path | None, resume: bool, overwrite: bool, quiet: bool
) -> None:
    # torch takes seconds to import, so it waits until there is work for it.
    from ..pipeline.run import run as run_chain

    run_chain(
        recipe,
        out if out is not None else Path("runs") / recipe.name,
        until=until,  # type: ignore[arg-type]
        resume=resume,
        overwrite=overwrite,
        quiet=quiet,
    )


def _print_keys() -> None:
    from rich.markup import escape

    from ..core.console import show
    from ..pipeline.recipe_keys import key_reference

    for table in key_reference(Recipe):
        meaning = escape(table.meaning)
        head = f"[bold]{escape(f'[{table.name}]')}[/bold]  {meaning}"
        show(f"\n{head}" if table.name else f"[bold]{meaning}[/bold]")
        for key in table.keys:
            show(f"  [cyan]{key.name} = {escape(key.default)}[/cyan]  {escape(key.meaning)}")
