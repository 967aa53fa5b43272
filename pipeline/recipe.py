"""A recipe: all settings of one run, as a TOML file that is validated before any work starts."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import math
import os
import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator
from rich.markup import escape

from ..core.console import status
from ..core.errors import InputError
from ..targets.catalog import EARLIER_NAMES
from .bucket_keys import BUCKET_KEYS
from .masks_section import MasksSection
from .recipe_keys import first_error
from .recipe_sections import (
    BaselineSection,
    BenchSection,
    DataSection,
    DistillSection,
    ExportSection,
    FinetuneSection,
    ModelSection,
    ReportSection,
    Section,
)
from .train_section import FREE_KEYS, TrainSection

RECIPES = Path(__file__).parents[1] / "recipes"
QUICKSTART = RECIPES / "quickstart.toml"
# Exactly one of these keys of [masks] is given; a file size may stand beside a latency.
SIZE_KEYS = ("params", "macs", "lambda", "file_mb", "latency_ms", "latency", "weight_sparsity")
_LATENCIES = {"latency_ms", "latency"}


class Recipe(Section):
    """One run of the chain, from data to report."""

    schema_: Literal["vitrim.recipe/1"] = Field(
        "vitrim.recipe/1",
        alias="schema",
        description="version of the format; in a run folder written before there was one, the "
        "target x86-64 is x86-64-v4-vnni, and x86-64-avx2 is x86-64-v3",
    )
    name: str = Field("", description="name of the run folder; absent: the recipe file's name")
    data: DataSection = Field(default_factory=DataSection)
    model: ModelSection = Field(default_factory=ModelSection)
    baseline: BaselineSection = Field(default_factory=BaselineSection)
    masks: MasksSection
    finetune: FinetuneSection = Field(default_factory=FinetuneSection)
    distill: DistillSection = Field(default_factory=DistillSection)
    train: TrainSection = Field(default_factory=TrainSection)
    export: ExportSection = Field(default_factory=ExportSection)
    bench: BenchSection = Field(default_factory=BenchSection)
    report: ReportSection = Field(default_factory=ReportSection)

    @field_validator("name")
    @classmethod
    def _valid_folder_name(cls, name: str) -> str:
        if name in (".", "..") or any(sign in name for sign in "/\\\0\n"):
            raise ValueError("it names a folder: it must hold no slash and not be a dot")
        return name

    @field_validator("model")
    @classmethod
    def _no_none(cls, model: ModelSection) -> ModelSection:
        for key, value in model.overrides.items():
            if value is None:
                raise ValueError(f"overrides.{key}: TOML has no None; leave {key} out")
        return model

    def plain(self) -> dict[str, Any]:
        """The recipe as tables for TOML: keys as in the file, absent values left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)

    def identity(self) -> dict[str, Any]:
        """The recipe as tables that are equal to those of earlier versions where runs are.

        `masks.file_precision` was "fp32" where nothing else was given; without a cost table it
        still is, and without a size it makes no difference.
        """
        plain, masks = self.plain(), self.masks
        sizes = masks.file_mb is not None or masks.peak_memory_mb is not None
        if not (masks.has_latency and sizes):
            plain["masks"].setdefault("file_precision", "fp32")
        return plain

    def inputs(self) -> dict[str, Path | None]:
        """The files and folders that a run reads, by what they are; None where there is none."""
        # It imports torch, which takes seconds.
        from ..compress.data.named_datasets import path_of

        checkpoint = None if self.model.checkpoint == "embedded" else self.model.checkpoint
        files = [name for name in (self.export.target, *self.report.estimate_for) if "/" in name]
        return {
            "the data set": path_of(self.data.name),
            "the checkpoint": None if checkpoint is None else Path(checkpoint),
            "the cost table": None
            if self.masks.cost_table is None
            else Path(self.masks.cost_table),
            "the runtime": None
            if self.bench.runtime_library is None
            else Path(self.bench.runtime_library),
            **{f"the target {name}": Path(name) for name in files},
        }

    def fingerprint(self, *sections: str, previous: str = "") -> str:
        """SHA-256 of the named sections and of the step before.

        A step is repeated only when something that it depends on changed.
        """
        plain = self.identity()
        for key in FREE_KEYS:
            plain["train"].pop(key, None)
        for key in BUCKET_KEYS:
            # They are calibrated behind the trainings.
            plain["masks"].pop(key, None)
        parts = {"previous": previous, **{section: plain[section] for section in sections}}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def toml(self) -> str:
        """The recipe as TOML with every default written out; reading it gives an equal recipe."""
        return _toml(self.plain())


def load_recipe(source: str | Path | None = None, sets: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        source: A TOML file, or the name of a recipe in the package. Default: the quickstart.
        sets: `section.key=value` strings that replace single values. The value is TOML; a bare word
            is a string.

    Returns:
        The validated recipe, named after its file where it has no name.

    Raises:
        InputError: The file cannot be read, or a key or value is invalid. The message names the
            file, the key and what to write instead.
    """
    path = _find(source)
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: not valid TOML: {error}") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not a text file ({error.reason} at byte {error.start}); "
            "a recipe is TOML in UTF-8"
        ) from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    _keep_target(tables, path)
    # The file is validated before any --set, so that an error names where it is.
    recipe = _with_sets(parse_recipe(tables, where=str(path)), sets)
    name = os.fsencode(path.stem).decode("utf-8", "replace")
    return recipe if recipe.name else recipe.model_copy(update={"name": name})


def _keep_target(tables: dict[str, Any], path: Path) -> None:
    """Give the target in the recipe of an earlier version's run its present name.

    Other recipes are written by hand, and name targets as they are now.
    """
    section = tables.get("export")
    written = "schema" not in tables and path.with_name("steps.json").is_file()
    if not written or not isinstance(section, dict):
        return
    earlier = section.get("target")
    if isinstance(earlier, str) and earlier in EARLIER_NAMES:
        section["target"] = EARLIER_NAMES[earlier]
        status(escape(f"{path}: target {earlier} is named {section['target']} now"))


def parse_recipe(tables: Mapping[str, Any], where: str) -> Recipe:
    """Validate the tables of a recipe; `where` names their file in the error line."""
    try:
        return Recipe.model_validate(tables)
    except ValidationError as error:
        raise InputError(f"{where}: {first_error(error, Recipe)}") from None


def recipe_names() -> list[str]:
    """Names of the recipes in the package."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def parse_value(item: str, option: str, form: str = "KEY=VALUE") -> tuple[str, Any]:
    """Split `key=value` of a command-line option.

    The value is TOML, or a literal of Python (`False`, `None`, `(24, 40)`); any other text is a
    string.

    Raises:
        InputError: The item has another form; the message names the option.
    """
    key, equals, text = item.partition("=")
    key = key.strip()
    if not equals or not key or not all(key.split(".")):
        raise InputError(f"{option} {item}: write {option} {form}")
    try:
        return key, tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return key, _literal(text.strip())


def _literal(text: str) -> Any:
    """The value of a Python literal, with lists in place of tuples; other texts unchanged."""
    try:
        return _lists(ast.literal_eval(text))
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text


def _lists(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_lists(item) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _lists(item) for key, item in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"no value of a recipe: {value!r}")


def _find(source: str | Path | None) -> Path:
    if source is None:
        return QUICKSTART
    path = Path(source)
    if path.is_file():
        return path
    packaged = RECIPES / f"{source}.toml"
    if path.name == str(source) and packaged.is_file():
        return packaged
    if path.is_dir():
        raise InputError(f"{path}: this is a folder; a recipe is a TOML file")
    raise InputError(
        f"{path}: no such recipe; name a TOML file, or one of {', '.join(recipe_names())}"
    )


def _with_sets(recipe: Recipe, sets: Sequence[str]) -> Recipe:
    """The recipe with changed keys, which are validated together: some need each other."""
    tables = _set_tables(recipe, sets)
    where = " ".join(f"--set {item}" for item in sets)
    try:
        Recipe.model_validate(tables)
    except ValidationError:
        for item in sets:
            # Name the key without which the others are valid.
            others = [other for other in sets if other is not item]
            with contextlib.suppress(ValidationError):
                Recipe.model_validate(_set_tables(recipe, others))
                where = f"--set {item}"
                break
    return parse_recipe(tables, where=where)


def _set_tables(recipe: Recipe, sets: Sequence[str]) -> dict[str, Any]:
    tables = recipe.plain()
    for item in sets:
        _set_key(tables, item)
    return tables


def _set_key(tables: dict[str, Any], item: str) -> None:
    key, value = parse_value(item, "--set", "section.key=value, e.g. --set masks.params=0.3")
    _set_value(tables, key, value, f"--set {item}")


def _set_value(tables: dict[str, Any], key: str, value: Any, where: str) -> None:
    *sections, last = key.split(".")
    if sections == ["masks"]:
        masks = tables.setdefault("masks", {})
        for other in replaced_sizes(masks, {last}):
            del masks[other]
    table = tables
    for section in sections:
        inner = table.setdefault(section, {})
        if not isinstance(inner, dict):
            raise InputError(
                f"{where}: `{section}` is a value, not a table; write section.key=value"
            )
        table = inner
    table[last] = value


def replaced_sizes(present: Iterable[str], new: Collection[str]) -> set[str]:
    """The keys of the size that new ones of `[masks]` replace.

    A file size stays beside a latency, whichever of them comes first.

    Args:
        present: Keys of `[masks]`.
        new: Keys that are set.
    """
    found = set(present).intersection(SIZE_KEYS)
    sizes = set(new).intersection(SIZE_KEYS)
    if not sizes or (sizes == {"file_mb"} and found & _LATENCIES):
        return set()
    return found - sizes - ({"file_mb"} if sizes & _LATENCIES else set())


def set_sizes(keys: Iterable[str]) -> list[str]:
    """Those of some keys of `[masks]` that set the size: more than one exclude each other."""
    found = set(keys).intersection(SIZE_KEYS)
    return sorted(found - {"file_mb"} if found & _LATENCIES else found)


def with_values(recipe: Recipe, values: Mapping[str, Any], where: str) -> Recipe:
    """The recipe with other values, which are validated together.

    Args:
        recipe: The recipe to change.
        values: New values by dotted key, e.g. `{"masks.params": 0.3}`. A key that sets the size of
            the compact model replaces the one in the recipe.
        where: Begins the error line.

    Returns:
        The changed recipe.

    Raises:
        InputError: A key or a value is invalid; the message names the key and what to write.
    """
    tables = recipe.plain()
    for key, value in values.items():
        _set_value(tables, key, value, where)
    return parse_recipe(tables, where=where)


def _toml(tables: Mapping[str, Any], prefix: str = "") -> str:
    lines = [
        f"{_key(key)} = {toml_value(value)}"
        for key, value in tables.items()
        if not isinstance(value, dict)
    ]
    text = "".join(f"{line}\n" for line in lines)
    for key, value in tables.items():
        if isinstance(value, dict):
            path = f"{prefix}{_key(key)}"
            text += f"\n[{path}]\n" + _toml(value, prefix=f"{path}.")
    return text


def _key(key: str) -> str:
    bare = key and all(sign.isascii() and (sign.isalnum() or sign in "-_") for sign in key)
    return key if bare else toml_value(key)


def toml_value(value: Any) -> str:
    """A value of plain data as TOML, in one line.

    Raises:
        InputError: TOML has no such value.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value)
    if isinstance(value, str):
        # JSON's escapes are those of TOML, except for DEL: JSON keeps it, TOML forbids it.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return f"[{', '.join(toml_value(item) for item in value)}]"
    if isinstance(value, dict):
        items = ", ".join(f"{_key(key)} = {toml_value(item)}" for key, item in value.items())
        return f"{{ {items} }}"
    raise InputError(f"a value of type {type(value).__name__} cannot be written as TOML: {value!r}")
