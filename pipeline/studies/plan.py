"""Which steps of the runs are equal, and the order of the work: each of them is computed once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..recipe import Recipe
from ..run import Step, recipe_fingerprints
from ..source_model import weights_digest
from .early_stop import EarlyStop
from .expansion import StudyRun

# The steps that runs share. Artifacts and measurements are made for each run.
SHARED: tuple[Step, ...] = ("baseline", "masks", "finetune")
MEASURED: Step = "report"


@dataclass(frozen=True)
class Source:
    """Steps that another run has computed.

    Attributes:
        run: Its id.
        marks: Step -> hash (`recipe_fingerprints`).
    """

    run: str
    marks: dict[str, str]


@dataclass(frozen=True)
class Job:
    """A part of one run.

    Attributes:
        run: The run.
        until: The last step.
        source: The steps to take from another run before.
        needs: Names of the jobs that must have ended.
        early_stop: When it ends because other runs are better; None: never.
    """

    run: StudyRun
    until: Step
    source: Source | None = None
    needs: tuple[str, ...] = ()
    early_stop: EarlyStop | None = None

    @property
    def name(self) -> str:
        """Unique in a study."""
        return f"{self.run.id}/{self.until}"

    @property
    def measures(self) -> bool:
        """Whether it measures latencies, which needs a machine without other work."""
        return self.until == MEASURED


def plan_jobs(runs: Sequence[StudyRun], *, split: bool, until: Step = MEASURED) -> list[Job]:
    """The jobs of all runs, each after those that it needs.

    The first run with some settings of a step computes it (its *owner*), and the others take it
    from the owner's folder.

    Args:
        runs: All runs of the study, in order.
        split: End a job after each step that other runs wait for, so that they run at the same
            time, and measure in jobs of their own. Otherwise each run is one job.
        until: The last step of each run: `finetune` or `report`.

    Returns:
        The jobs in an order in which they can be done one after the other.

    Raises:
        InputError: A checkpoint or a target cannot be read.
    """
    digests: dict[str | None, str] = {}
    marks = {run.id: _marks(run.recipe, digests) for run in runs}
    owners: dict[str, str] = {}
    for run in runs:
        for step in SHARED:
            owners.setdefault(marks[run.id][step], run.id)
    users: dict[str, set[str]] = {}
    for run in runs:
        for step, following in itertools.pairwise(SHARED):
            users.setdefault(marks[run.id][step], set()).add(marks[run.id][following])
    jobs: list[Job] = []
    for run in runs:
        jobs += _jobs_of(run, marks[run.id], owners, users if split else None, until)
    return jobs


def _marks(recipe: Recipe, digests: dict[str | None, str]) -> dict[str, str]:
    checkpoint = recipe.model.checkpoint
    if checkpoint not in digests:
        digests[checkpoint] = weights_digest(recipe.model)
    return recipe_fingerprints(recipe, weights=digests[checkpoint])


def _jobs_of(
    run: StudyRun,
    marks: dict[str, str],
    owners: dict[str, str],
    users: dict[str, set[str]] | None,
    until: Step,
) -> Iterator[Job]:
    """The jobs of one run; `users` are the hashes of the following steps, by the hash of one."""
    own = [step for step in SHARED if owners[marks[step]] == run.id]
    # A run that owns a step owns all later ones, since hashes include the step before.
    taken = [step for step in SHARED if step not in own]
    source, needs = None, tuple[str, ...]()
    if taken:
        source = Source(owners[marks[taken[-1]]], {step: marks[step] for step in taken})
        needs = (f"{source.run}/{until if users is None else taken[-1]}",)
    if users is None:
        yield Job(run, until, source, needs)
        return
    for step in own:
        waiting = len(users.get(marks[step], ())) > 1
        if waiting or step == SHARED[-1]:
            yield Job(run, step, source, needs)
            source, needs = None, (f"{run.id}/{step}",)
    if until != SHARED[-1] or not own:
        yield Job(run, until, source, needs)
