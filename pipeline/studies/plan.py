"""Which steps of the runs are equal, and the order of the work: each of them is computed once."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..recipe import Recipe
from ..run import Step, recipe_fingerprints
from ..source_model import weights_digest
from .early_stop import EarlyStop
from .expansion import FREE, StudyRun

# The steps that runs share. Artifacts and measurements are made for each run.
SHARED: tuple[Step, ...] = ("baseline", "masks", "finetune")
MEASURED: Step = "report"
# With a latency, its files are measured, too.
MASKS: Step = "masks"


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
        return self.until == MEASURED or (self.until == MASKS and measures_masks(self.run.recipe))

    @property
    def alone(self) -> bool:
        """Whether it measures on this machine, and not on the device of `bench.on`."""
        return self.measures and self.run.recipe.bench.on is None


def plan_jobs(runs: Sequence[StudyRun], *, split: bool, until: Step = MEASURED) -> list[Job]:
    """The jobs of all runs, each after those that it needs.

    The first run with some settings of a step computes it (its *owner*), and the others take it
    from the owner's folder.

    Args:
        runs: All runs of the study, in order.
        split: End a job after each step that other runs wait for, so that they run at the same
            time, and measure in jobs of their own, also what masks of a latency measure. Otherwise
            each run is one job.
        until: The last step of each run: `finetune` or `report`.

    Returns:
        The jobs in an order in which they can be done one after the other.

    Raises:
        InputError: A checkpoint or a target cannot be read.
    """
    digests: dict[str | None, str] = {}
    plans = [_Plan.of(run, digests) for run in runs]
    owners: dict[str, str] = {}
    for plan in plans:
        for step in SHARED:
            owners.setdefault(plan.keys[step], plan.run.id)
    users: dict[str, set[str]] = {}
    for plan in plans:
        for step, following in itertools.pairwise(SHARED):
            users.setdefault(plan.keys[step], set()).add(plan.keys[following])
    jobs: list[Job] = []
    for plan in plans:
        jobs += _jobs_of(plan, owners, users if split else None, until)
    return jobs


def next_wave(pending: Sequence[Job]) -> list[Job]:
    """The jobs that a cluster gets together, of those that have not ended.

    Args:
        pending: Each after those that it needs.

    Returns:
        All trainings that need no measurement; without one, the measurements of masks that other
        trainings wait for; without those, the others. Measurements run one at a time.
    """
    held: set[str] = set()
    for job in pending:
        if job.measures or held.intersection(job.needs):
            held.add(job.name)
    trainings = [job for job in pending if job.name not in held]
    if trainings:
        return trainings
    ready = [job for job in pending if not held.intersection(job.needs)]
    return [job for job in ready if job.until != MEASURED] or ready


def measures_masks(recipe: Recipe) -> bool:
    """Whether the step `masks` exports files and measures them, where their device is this one."""
    return recipe.masks.has_latency and recipe.masks.latency_rounds > 0


@dataclass(frozen=True)
class _Plan:
    """A run with its steps.

    Attributes:
        run: The run.
        marks: Step -> hash (`recipe_fingerprints`).
        keys: Step -> a text that is equal for runs which share it.
    """

    run: StudyRun
    marks: dict[str, str]
    keys: dict[str, str]

    @classmethod
    def of(cls, run: StudyRun, digests: dict[str | None, str]) -> _Plan:
        marks = _marks(run.recipe, digests)
        # What does not count for a run that continues does for runs that are compared by it.
        free = {key: value for key, value in run.values.items() if key in FREE}
        beside = json.dumps(free, sort_keys=True) if free else ""
        return cls(run, marks, {step: f"{mark}{beside}" for step, mark in marks.items()})


def _marks(recipe: Recipe, digests: dict[str | None, str]) -> dict[str, str]:
    checkpoint = recipe.model.checkpoint
    if checkpoint not in digests:
        digests[checkpoint] = weights_digest(recipe.model)
    return recipe_fingerprints(recipe, weights=digests[checkpoint])


def _jobs_of(
    plan: _Plan, owners: dict[str, str], users: dict[str, set[str]] | None, until: Step
) -> Iterator[Job]:
    """The jobs of one run.

    Args:
        plan: The run.
        owners: The run that computes a step, by the key of the step.
        users: The keys of the following steps, by the key of one. None: one job.
        until: The last step.
    """
    run, keys = plan.run, plan.keys
    own = [step for step in SHARED if owners[keys[step]] == run.id]
    # A run that owns a step owns all later ones, since hashes include the step before.
    taken = [step for step in SHARED if step not in own]
    source, needs = None, tuple[str, ...]()
    if taken:
        source = Source(owners[keys[taken[-1]]], {step: plan.marks[step] for step in taken})
        needs = (f"{source.run}/{until if users is None else taken[-1]}",)
    if users is None:
        yield Job(run, until, source, needs)
        return
    # Masks that are measured are a job of their own, which runs alone.
    alone = ("baseline", MASKS) if MASKS in own and measures_masks(run.recipe) else ()
    for step in own:
        waiting = len(users.get(keys[step], ())) > 1
        if waiting or step in alone or step == SHARED[-1]:
            yield Job(run, step, source, needs)
            source, needs = None, (f"{run.id}/{step}",)
    if until != SHARED[-1] or not own:
        yield Job(run, until, source, needs)
