"""The study file: a base recipe, the axes over its keys, and the seeds."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator

from ...core.errors import InputError
from ..masks_section import CHOOSING
from ..recipe import (
    RECIPES,
    Recipe,
    load_recipe,
    parse_value,
    replaced_sizes,
    set_sizes,
    toml_value,
)
from ..recipe_keys import first_error
from ..recipe_sections import Section

STUDIES = RECIPES / "studies"
# In a study folder: the copy of the study file, and that of its base recipe, under its own name.
STUDY_FILE, BASE_RECIPES = "study.toml", "base-recipe"
Values = dict[str, Any]


class GridSection(Section):
    """Runs that vary some keys of the recipe: `[axes]` x `[[zip]]` x `[[points]]`."""

    set_: dict[str, Any] = Field(
        default_factory=dict, alias="set", description="values of all runs, by recipe key"
    )
    axes: dict[str, Any] = Field(
        default_factory=dict,
        description="a list of values for each key; every combination is a run",
    )
    zip_: list[dict[str, Any]] = Field(
        default_factory=list,
        alias="zip",
        description="lists of equal length, whose values go together: the first with the first",
    )
    points: list[dict[str, Any]] = Field(
        default_factory=list, description="single combinations of values, beside or without axes"
    )
    exclude: list[dict[str, Any]] = Field(
        default_factory=list, description="values; a run that has all values of one entry is none"
    )


class TokenFiguresSection(Section):
    """Measurements of the dense network, block by block: Figures 3, 6 and 7 of Tang et al. 2022."""

    methods: tuple[str, ...] = Field(
        ("patch-slimming", "column-attention", "random"),
        strict=False,
        min_length=1,
        max_length=5,
        description="scores that choose the patches of a block, as in `masks.tokens`; the first "
        "one is that of all blocks",
    )
    share: float = Field(
        0.3,
        gt=0.0,
        le=1.0,
        description="share of the patches that one block alone computes, by block",
    )
    block: int | None = Field(
        None,
        ge=0,
        description="block, counted from 0, in which the scores are compared; absent: the one in "
        "the middle",
    )
    shares: tuple[float, ...] = Field(
        (0.9, 0.7, 0.5, 0.3, 0.1),
        strict=False,
        min_length=1,
        description="shares of the patches that it computes",
    )
    images: int = Field(1000, gt=0, description="validation images that are classified, at most")
    scoring_images: int = Field(
        256, gt=1, description="training images that patches are scored on, at most"
    )

    @field_validator("methods")
    @classmethod
    def _known_methods(cls, methods: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [name for name in methods if name not in CHOOSING]
        if unknown:
            raise ValueError(f"no score is called {unknown[0]}; choose of {', '.join(CHOOSING)}")
        if len(set(methods)) != len(methods):
            raise ValueError("a score is listed twice")
        return methods

    @field_validator("shares")
    @classmethod
    def _valid_shares(cls, shares: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(shares)) != len(shares) or not all(0.0 < share <= 1.0 for share in shares):
            raise ValueError("shares are different numbers above 0, at most 1")
        return shares


class StudySection(GridSection):
    """A study: a base recipe, what varies, and the seeds.

    `[set]`, `[axes]`, `[[zip]]`, `[[points]]` and `[[exclude]]` describe its runs; each `[[grid]]`
    describes further ones.
    """

    schema_: Literal["vitrim.study/1"] = Field(
        "vitrim.study/1", alias="schema", description="version of the format"
    )
    name: str = Field("", description="title of the report; absent: the file's name")
    about: str = Field("", description="what the study is about, one or two sentences")
    source: str = Field("", description="the publication whose protocol it follows")
    bibtex: str = Field("", description="BibTeX entries of that publication, for the LaTeX report")
    overrides: dict[str, Any] = Field(
        default_factory=dict,
        description="values of all runs, by recipe key, in place of those of `[set]` and of grids; "
        "`vitrim study --set` writes them",
    )
    recipe: str = Field(
        min_length=1,
        description="a recipe file, relative to the study file, or the name of one in the package",
    )
    seeds: tuple[int, ...] | None = Field(
        None, strict=False, min_length=1, description="values of train.seed; absent: the recipe's"
    )
    until: Literal["finetune", "report"] = Field(
        "report",
        description="the last step of each run; finetune: no artifacts and no measurements, so "
        "that validation accuracies are compared",
    )
    repetitions: int = Field(
        1, gt=0, description="runs with equal settings: they share trainings and are measured anew"
    )
    beside: tuple[str, ...] = Field(
        (),
        strict=False,
        description="names of dense timm models that are exported unchanged and timed behind the "
        'runs, e.g. ["mobilevitv2_050"]',
    )
    published_top1: dict[str, Annotated[float, Field(ge=0.0, le=1.0)]] = Field(
        default_factory=dict,
        description="published accuracies of models of `beside`, 0 to 1, for the report, which "
        "marks them as published",
    )
    token_figures: TokenFiguresSection | None = Field(
        None,
        description="measure the dense network, block by block, behind the runs; an empty table "
        "has all defaults",
    )
    early_stop: Literal["asha"] | None = Field(
        None,
        description="asha: a run stops during its fine-tuning unless it is among the best of those "
        "of equal size settings; absent: every run is completed",
    )
    early_stop_factor: int = Field(
        3, ge=2, description="asha: one of this many runs continues at each comparison"
    )
    early_stop_epochs: int = Field(
        1,
        gt=0,
        description="asha: epochs before the first comparison; each later one is after "
        "`early_stop_factor` times as many",
    )
    grid: list[dict[str, Any]] = Field(
        default_factory=list,
        description="further grids, with the keys set, axes, zip, points, "
        "exclude; `[set]` of the file applies to them too",
    )

    @field_validator("published_top1")
    @classmethod
    def _of_models(cls, stated: dict[str, float], info: ValidationInfo) -> dict[str, float]:
        for name in stated:
            if name not in info.data.get("beside", ()):
                raise ValueError(f"{name!r} is not a model of `beside`; add it there")
        return stated

    @field_validator("seeds")
    @classmethod
    def _valid_seeds(cls, seeds: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if seeds is not None and (len(set(seeds)) != len(seeds) or min(seeds) < 0):
            raise ValueError("seeds are different whole numbers from 0")
        return seeds


@dataclass(frozen=True)
class Grid:
    """One grid with flat keys.

    Attributes:
        where: The file and the table, for error lines.
        fixed: Values of all its runs.
        factors: What is combined; each factor is a list of alternatives.
        exclude: Combinations that are left out.
    """

    where: str
    fixed: Values
    factors: tuple[tuple[Values, ...], ...]
    exclude: tuple[Values, ...]

    def varied(self) -> Iterator[str]:
        """The keys that the factors set."""
        for factor in self.factors:
            for alternative in factor:
                yield from alternative


@dataclass(frozen=True)
class Study:
    """A validated study file.

    Attributes:
        path: The file.
        text: Its contents.
        section: Its tables.
        base: The base recipe.
        grids: What varies.
    """

    path: Path
    text: str
    section: StudySection
    base: Recipe
    grids: tuple[Grid, ...]

    @property
    def name(self) -> str:
        """The title."""
        return self.section.name or self.path.stem

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of the trainings."""
        return self.section.seeds or (self.base.train.seed,)


def study_names() -> list[str]:
    """Names of the studies in the package."""
    return sorted(path.stem for path in STUDIES.glob("*.toml"))


def load_study(source: str | Path, sets: Sequence[str] = ()) -> Study:
    """Read a study file.

    Args:
        source: A TOML file, or the name of a study in the package.
        sets: `section.key=value` strings with values of all runs. The text of the study has them as
            its key `overrides`, so that it describes the same runs without them.

    Returns:
        The study; its runs are not validated yet (`expansion.expand`).

    Raises:
        InputError: The file or its recipe cannot be read, or a key or value is invalid. The
            message names the file, the key and what to write instead.
    """
    path = _find(source)
    text, tables = _read(path)
    if sets:
        if "overrides" in tables:
            raise InputError(
                f"{path}: has `overrides`, which --set would replace; change them in the file"
            )
        form = "section.key=value, e.g. --set finetune.epochs=2"
        tables["overrides"] = dict(parse_value(item, "--set", form) for item in sets)
        # In front of the tables of the file, and of its own keys.
        text = f"overrides = {toml_value(tables['overrides'])}\n{text}"
    try:
        section = StudySection.model_validate(tables)
    except ValidationError as error:
        raise InputError(f"{path}: {first_error(error, StudySection)}") from None
    try:
        base = load_recipe(_base_recipe(path, section.recipe))
    except InputError as error:
        raise InputError(f"{path}: recipe: {error}") from None
    grids = tuple(_grids(path, section))
    return Study(path, text, section, base, grids)


def base_copy(folder: Path, recipe: str) -> Path:
    """Where a study folder has the copy of its base recipe; `recipe` is what its file names."""
    return folder / BASE_RECIPES / f"{Path(recipe).stem}.toml"


def _base_recipe(path: Path, recipe: str) -> Path | str:
    """The recipe that a study file names: the copy in a study folder, one beside it, or any."""
    copy, local = base_copy(path.parent, recipe), path.parent / recipe
    if path.name == STUDY_FILE and copy.is_file():
        return copy
    return local if local.is_file() else recipe


def _find(source: str | Path) -> Path:
    path = Path(source)
    if path.is_file():
        return path
    packaged = STUDIES / f"{source}.toml"
    if path.name == str(source) and packaged.is_file():
        return packaged
    what = "this is a folder; a study is a TOML file" if path.is_dir() else "no such study"
    raise InputError(f"{path}: {what}; name a TOML file, or one of {', '.join(study_names())}")


def _read(path: Path) -> tuple[str, dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
        return text, tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: not valid TOML: {error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a text file; a study is TOML in UTF-8") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def _grids(path: Path, section: StudySection) -> Iterator[Grid]:
    shared, overrides = flat_values(section.set_), flat_values(section.overrides)
    own = (section.axes, section.zip_, section.points)
    if any(own) or not section.grid:
        yield _grid(str(path), section, shared, overrides)
    for number, tables in enumerate(section.grid, 1):
        where = f"{path}: [[grid]] {number}"
        try:
            inner = GridSection.model_validate(tables)
        except ValidationError as error:
            raise InputError(f"{where}: {first_error(error, GridSection)}") from None
        yield _grid(where, inner, shared, overrides)


def _grid(where: str, section: GridSection, shared: Values, overrides: Values) -> Grid:
    factors = [
        tuple({key: value} for value in values)
        for key, values in _lists(section.axes, f"{where}: [axes]").items()
    ]
    factors += [_zipped(table, f"{where}: [[zip]]") for table in section.zip_]
    if section.points:
        factors.append(tuple(map(flat_values, section.points)))
    grid = Grid(
        where,
        _merged(_merged(shared, flat_values(section.set_)), overrides),
        tuple(factors),
        tuple(map(flat_values, section.exclude)),
    )
    _require_consistent(grid)
    varied = sorted(set(grid.varied()) & set(overrides))
    if varied:
        raise InputError(
            f"{where}: `{varied[0]}` varies, so that one value of --set or `overrides` cannot "
            "replace it; change the axis in the file"
        )
    return grid


def _require_consistent(grid: Grid) -> None:
    keys = [key for factor in grid.factors for key in {key for each in factor for key in each}]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise InputError(f"{grid.where}: `{twice[0]}` varies in two places; keep one of them")
    for key in ("name", "schema", "train.seed"):
        if key in keys or key in grid.fixed:
            instead = "write `seeds`" if key == "train.seed" else "leave it out"
            raise InputError(f"{grid.where}: `{key}` is set by the study; {instead}")
    known = {*keys, *grid.fixed}
    for entry in grid.exclude:
        unknown = sorted(set(entry) - known)
        if unknown or not entry:
            name = f"`{unknown[0]}`, which no axis has" if unknown else "nothing"
            keys_text = ", ".join(sorted(known))
            raise InputError(f"{grid.where}: [[exclude]] names {name}; write values of {keys_text}")


def _lists(tables: Mapping[str, Any], where: str) -> dict[str, list[Any]]:
    """The lists of `[axes]` by dotted key."""
    found: dict[str, list[Any]] = {}
    for key, value in tables.items():
        if isinstance(value, dict):
            inner = _lists(value, where).items()
            found |= {f"{key}.{name}": values for name, values in inner}
        elif not isinstance(value, list) or not value:
            raise InputError(
                f"{where} {key} = {value!r}: write a list of values, e.g. {key} = [0.3, 0.5]; "
                "a single value belongs in [set]"
            )
        elif any(value.count(each) > 1 for each in value):
            raise InputError(f"{where} {key}: a value is listed twice")
        else:
            found[key] = value
    return found


def _zipped(table: Mapping[str, Any], where: str) -> tuple[Values, ...]:
    lists = _lists(table, where)
    lengths = {key: len(values) for key, values in lists.items()}
    if len(set(lengths.values())) != 1:
        counts = ", ".join(f"{key} has {length}" for key, length in lengths.items())
        raise InputError(f"{where}: its lists need one length, but {counts or 'there are none'}")
    (length,) = set(lengths.values())
    return tuple({key: values[place] for key, values in lists.items()} for place in range(length))


def flat_values(tables: Mapping[str, Any], prefix: str = "") -> Values:
    """Values by dotted key; `"a.b" = 1` and `[a]` with `b = 1` are the same."""
    found: Values = {}
    for key, value in tables.items():
        if isinstance(value, dict):
            found |= flat_values(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _merged(first: Values, second: Values) -> Values:
    """Both; a key that sets the size in the second replaces the one in the first."""
    found = replaced_sizes(_of_masks(first), _of_masks(second))
    replaced = {f"masks.{key}" for key in found}
    return {**{key: value for key, value in first.items() if key not in replaced}, **second}


def _of_masks(values: Values) -> set[str]:
    """The keys of `[masks]` among dotted ones, without the section."""
    return {key.removeprefix("masks.") for key in values if key.startswith("masks.")}


def combined(fixed: Values, alternatives: tuple[Values, ...], where: str) -> Values:
    """The values of one run: those of the grid, and one alternative of each factor.

    Raises:
        InputError: Two factors set the size.
    """
    own: Values = {}
    for alternative in alternatives:
        own |= alternative
    sizes = set_sizes(_of_masks(own))
    if len(sizes) > 1:
        names = " and ".join(f"`masks.{key}`" for key in sizes)
        raise InputError(
            f"{where}: {names} both set the size of one run; write them in separate grids or points"
        )
    return _merged(fixed, own)
