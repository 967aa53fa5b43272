"""Measurements of the dense network of a study, block by block: Figures 3, 6 and 7 of Tang 2022.

They are made once, behind the runs, on the baseline of the first finished run, and kept in
token-figures.json, whose key has the weights, the images and the settings.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, ValidationError
from rich.markup import escape

from ...core.console import status
from ...core.errors import InputError
from ...core.storage import replace_file, sha256_file
from ...core.written_kinds import FileKind, json_kind, json_object
from ..recipe_sections import Section
from .expansion import StudyRun
from .study_file import TokenFiguresSection
from .table import RUNS, StudyTable

if TYPE_CHECKING:
    from ...compress.network.architecture import Architecture

FIGURES_FILE, DATA_FILE = "token-figures.json", "token-figures.csv"
SCHEMA: Literal["vitrim.token-figures/1"] = "vitrim.token-figures/1"
_HEADS = ("figure", "block", "method", "share", "tokens", "value")
KIND = json_kind("figures of a study's dense network", SCHEMA)
DATA = FileKind(
    "figures of a study's dense network",
    lambda path: path.read_text(encoding="utf-8").startswith(",".join(_HEADS)),
)


class BlockAccuracy(Section):
    """The accuracy where one block computes some of its patches."""

    block: str
    method: str
    share: float
    tokens: int
    accuracy: float


class TokenFigures(Section):
    """The contents of token-figures.json; what is absent is still to be measured."""

    schema_: Literal["vitrim.token-figures/1"] = Field(SCHEMA, alias="schema")
    key: str
    run: str
    model: str
    data: str
    images: int
    scoring_images: int
    accuracy: float
    similarity: dict[str, float | None] | None = None
    blocks: tuple[BlockAccuracy, ...] | None = Field(None, strict=False)
    scores: tuple[BlockAccuracy, ...] | None = Field(None, strict=False)

    @property
    def whole(self) -> bool:
        """Whether everything is measured."""
        return None not in (self.similarity, self.blocks, self.scores)


def read_token_figures(folder: Path) -> TokenFigures | None:
    """What a study has measured of its dense network; None where that is nothing.

    Args:
        folder: The study folder.
    """
    try:
        return TokenFigures.model_validate(json_object(folder / FIGURES_FILE))
    except ValidationError:
        return None


def require_token_figures(section: TokenFiguresSection, run: StudyRun, dense: Architecture) -> None:
    """Check that the dense network of a run can be measured, before any run starts.

    Raises:
        InputError: It has no such block, or its training images cannot be read singly.
    """
    from ...compress.tokens.block_studies import attention_blocks

    blocks = list(attention_blocks(dense))
    if not blocks:
        raise InputError(f"[token_figures]: {run.recipe.model.name} has no attention; remove it")
    if section.block is not None and section.block >= len(blocks):
        raise InputError(
            f"[token_figures]: `block` = {section.block}: {run.recipe.model.name} has "
            f"{len(blocks)} blocks with attention; give a number from 0 to {len(blocks) - 1}"
        )
    if run.recipe.data.streaming:
        raise InputError(
            "[token_figures]: reads single training images, which a stream does not have; leave "
            "data.streaming out, or remove the table"
        )


def measure_token_figures(
    section: TokenFiguresSection,
    runs: Sequence[StudyRun],
    table: StudyTable,
    folder: Path,
    *,
    quiet: bool = False,
) -> None:
    """Measure the dense network of the first finished run, unless it has been.

    A part that is complete is saved, and not measured again after an interruption.

    Args:
        section: The settings.
        runs: The runs of the study.
        table: Their states.
        folder: The study folder, which receives token-figures.json and token-figures.csv.
        quiet: Print nothing.
    """
    states = table.states()
    run = next((run for run in runs if states[run.id] == "done"), None)
    if run is None:
        return
    key, found = _key(section, run, folder), read_token_figures(folder)
    if found is not None and found.key == key and found.whole:
        return
    known = found if found is not None and found.key == key else None
    status(f"measuring the blocks of the dense network of run {run.id}", quiet=quiet)
    try:
        _Measuring(section, run, folder, quiet=quiet).complete(key, known)
    except Exception as error:
        # The report of the runs is written all the same.
        from .jobs import unexpected

        reason = str(error) if isinstance(error, InputError) else unexpected(error)
        status(f"[red]no figures of single blocks[/red]: {escape(reason)}", quiet=quiet)


def _key(section: TokenFiguresSection, run: StudyRun, folder: Path) -> str:
    """A hash of what the figures depend on."""
    # Here, since a report reads this module without torch.
    from ...compress.network.files import ARCHITECTURE, WEIGHTS
    from ..training_steps import BASELINE

    baseline = folder / RUNS / run.id / BASELINE
    parts = {
        "files": {name: sha256_file(baseline / name) for name in (WEIGHTS, ARCHITECTURE)},
        "data": run.recipe.plain()["data"],
        "seed": run.seed,
        "settings": section.model_dump(mode="json"),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class _Measuring:
    """The dense network of a run with its images."""

    def __init__(
        self, section: TokenFiguresSection, run: StudyRun, folder: Path, *, quiet: bool
    ) -> None:
        import torch

        from ...compress.data.splits import stratified_indices
        from ...compress.network.files import load
        from ...compress.network.modules.model import with_all_queries
        from ..run import prepare
        from ..training_steps import BASELINE

        self.section, self.run, self.folder, self.quiet = section, run, folder, quiet
        data = prepare(run.recipe, quiet=quiet).data
        self.data_name = data.name
        shown, scored = (
            stratified_indices(split.targets, min(count, len(split)), run.seed)[0]
            for split, count in (
                (data.val, section.images),
                (data.train, section.scoring_images),
            )
        )
        self.images, self.scoring = data.val.floats(shown), data.train.floats(scored)
        self.labels = torch.from_numpy(data.val.targets[shown])
        self.model = with_all_queries(load(folder / RUNS / run.id / BASELINE))

    def complete(self, key: str, known: TokenFigures | None) -> None:
        """Measure what is missing, and save after each part."""
        from ...compress.tokens.block_studies import attention_blocks, patch_similarity
        from ...compress.train.precision import arithmetic

        section = self.section
        blocks = list(attention_blocks(self.model.architecture))
        block = blocks[len(blocks) // 2 if section.block is None else section.block]
        with arithmetic("highest", self.run.recipe.train.threads, self.model):
            record = known or self._begun(key)
            if record.similarity is None:
                found = patch_similarity(self.model, self.images)
                similarity = {name: _known(value) for name, value in found.items()}
                record = self._saved(record, {"similarity": similarity})
            if record.blocks is None:
                rows = self._accuracies(blocks, section.methods[:1], (section.share,))
                record = self._saved(record, {"blocks": rows})
            if record.scores is None:
                rows = self._accuracies([block], section.methods, section.shares)
                record = self._saved(record, {"scores": rows})

    def _begun(self, key: str) -> TokenFigures:
        import torch

        with torch.no_grad():
            found = [self.model(part).argmax(dim=-1) for part in self.images.split(64)]
        return TokenFigures(
            key=key,
            run=self.run.id,
            model=self.run.recipe.model.name,
            data=self.data_name,
            images=len(self.images),
            scoring_images=len(self.scoring),
            accuracy=float((torch.cat(found) == self.labels).double().mean()),
        )

    def _accuracies(
        self, blocks: Sequence[str], methods: Sequence[str], shares: Sequence[float]
    ) -> list[dict[str, object]]:
        from ...compress.tokens.block_studies import single_block_accuracy
        from ..trim_step import StageBars

        with StageBars(quiet=self.quiet) as bars:
            rows = single_block_accuracy(
                self.model,
                self.images,
                self.labels,
                scoring=self.scoring,
                blocks=blocks,
                methods=methods,  # type: ignore[arg-type]
                shares=shares,
                seed=self.run.seed,
                progress=bars,
            )
        return [asdict(row) for row in rows]

    def _saved(self, record: TokenFigures, more: Mapping[str, object]) -> TokenFigures:
        """The record with a further part, saved as JSON and as CSV."""
        values = {**record.model_dump(mode="json", by_alias=True), **more}
        record = TokenFigures.model_validate(values)
        text = json.dumps(record.model_dump(mode="json", by_alias=True), indent=1) + "\n"
        replace_file(self.folder / FIGURES_FILE, text, KIND)
        replace_file(self.folder / DATA_FILE, as_csv(record), DATA)
        return record


def as_csv(record: TokenFigures) -> str:
    """All values, a line each, with the numbers of the figures in the source."""
    lines: list[tuple[object, ...]] = [
        (3, block, "", "", "", value) for block, value in (record.similarity or {}).items()
    ]
    for figure, rows in ((6, record.blocks), (7, record.scores)):
        lines += [
            (figure, row.block, row.method, row.share, row.tokens, row.accuracy)
            for row in rows or ()
        ]
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([_HEADS, *lines])
    return file.getvalue()


def _known(value: float) -> float | None:
    """None for nan, which JSON does not have: a block after which one patch is left."""
    return value if value == value else None
