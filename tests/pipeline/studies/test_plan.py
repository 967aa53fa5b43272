"""The jobs of a study: which steps are shared, and what waits for what."""

from __future__ import annotations

from pathlib import Path

import pytest
from study_sample import write_study
from vitrim.pipeline.studies.expansion import StudyRun, expand
from vitrim.pipeline.studies.local_workers import LocalWorkers
from vitrim.pipeline.studies.plan import Job, next_wave, plan_jobs
from vitrim.pipeline.studies.study_file import load_study

TEXT = """
seeds = [7, 13]
[axes]
"masks.params" = [0.6, 0.5]
"finetune.lr" = [1e-3, 1e-4]
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[StudyRun]:
    return expand(load_study(write_study(tmp_path_factory.mktemp("plan"), TEXT)))


def steps_of(jobs: list[Job], run: StudyRun) -> list[str]:
    return [job.until for job in jobs if job.run.id == run.id]


def test_every_job_comes_after_those_that_it_needs(runs: list[StudyRun]) -> None:
    for split in (False, True):
        jobs = plan_jobs(runs, split=split)
        names = [job.name for job in jobs]
        assert len(set(names)) == len(names)
        for place, job in enumerate(jobs):
            assert set(job.needs) <= set(names[:place])


def test_a_step_is_computed_by_the_first_run_that_has_it(runs: list[StudyRun]) -> None:
    jobs = {job.run.id: job for job in plan_jobs(runs, split=False)}
    assert len(jobs) == len(runs)
    first, same_masks, same_baseline, both, other_seed, *_ = (jobs[run.id] for run in runs)
    assert first.source is None
    assert same_masks.source is not None
    assert same_masks.source.run == first.run.id
    assert list(same_masks.source.marks) == ["baseline", "masks"]
    assert same_baseline.source is not None
    assert list(same_baseline.source.marks) == ["baseline"]
    assert both.source is not None
    assert both.source.run == same_baseline.run.id
    assert other_seed.source is None
    assert same_masks.needs == (first.name,)


def test_split_jobs_end_where_other_runs_wait(runs: list[StudyRun]) -> None:
    jobs = plan_jobs(runs, split=True)
    assert steps_of(jobs, runs[0]) == ["baseline", "masks", "finetune", "report"]
    assert steps_of(jobs, runs[1]) == ["finetune", "report"]
    assert steps_of(jobs, runs[2]) == ["masks", "finetune", "report"]
    assert [job.measures for job in jobs if job.until == "report"] == [True] * len(runs)
    by_name = {job.name: job for job in jobs}
    waiting = by_name[f"{runs[3].id}/finetune"]
    assert waiting.needs == (f"{runs[2].id}/masks",)
    assert by_name[f"{runs[3].id}/report"].needs == (f"{runs[3].id}/finetune",)


def test_without_measurements_the_last_job_is_the_fine_tuning(runs: list[StudyRun]) -> None:
    for split in (False, True):
        jobs = plan_jobs(runs, split=split, until="finetune")
        assert {job.until for job in jobs} <= {"baseline", "masks", "finetune"}
        assert not any(job.measures for job in jobs)
        assert sum(job.until == "finetune" for job in jobs) == len(runs)


def test_repetitions_take_all_trainings(tmp_path: Path) -> None:
    runs = expand(load_study(write_study(tmp_path, "repetitions = 2\n")))
    one, other = plan_jobs(runs, split=False)
    assert one.source is None
    assert other.source is not None
    assert list(other.source.marks) == ["baseline", "masks", "finetune"]
    jobs = plan_jobs(runs, split=True)
    assert [job.until for job in jobs] == ["finetune", "report", "report"]


# Two runs with the same masks and one with others, and one whose masks measure nothing.
LATENCY = """
[set]
"masks.method" = "closed-form"
[[grid]]
set = { "masks.latency" = 0.6 }
axes = { "finetune.lr" = [1e-3, 1e-4] }
[[grid]]
set = { "masks.latency" = 0.5 }
[[grid]]
set = { "masks.latency" = 0.5, "masks.latency_rounds" = 0 }
"""


def _order(jobs: list[Job], workers: LocalWorkers) -> list[list[str]]:
    """The jobs that begin together, where each ends when no other one can begin."""
    pending, found = list(jobs), []
    while pending:
        began = []
        while (job := workers._next(pending)) is not None:
            pending.remove(job)
            began.append(job)
            workers.workers.append(_Busy(job))  # type: ignore[arg-type]
        found.append([job.name for job in began])
        workers.workers.clear()
    return found


class _Busy:
    """A worker with a job, without a process."""

    def __init__(self, job: Job) -> None:
        self.job, self.process = job, self
        self.pid = None


def test_masks_that_are_measured_are_jobs_that_run_alone(tmp_path: Path) -> None:
    runs = expand(load_study(write_study(tmp_path, LATENCY)))
    assert len(runs) == 4
    jobs = plan_jobs(runs, split=True)
    measured = [job for job in jobs if job.measures and job.until != "report"]
    assert [job.name for job in measured] == [f"{runs[place].id}/masks" for place in (0, 2)]
    assert steps_of(jobs, runs[3]) == ["finetune", "report"]
    # On this machine nothing else runs meanwhile, and on a cluster they are no part of a wave of
    # trainings; trainings that wait for them follow, and measurements of artifacts are last.
    order = _order(jobs, LocalWorkers(tmp_path, 2))
    waves, pending = [], list(jobs)
    while wave := next_wave(pending):
        alone = wave[0].measures
        assert all(job.measures == alone for job in wave)
        waves += [[job.name] for job in wave] if alone else [[job.name for job in wave]]
        pending = [job for job in pending if job not in wave]
    by_name = {job.name: job for job in jobs}
    for parts in (order, waves):
        names = [name for part in parts for name in part]
        assert sorted(names) == sorted(by_name)
        for part in parts:
            assert len(part) == 1 or not any(by_name[name].measures for name in part)
            # Ray itself lets a training wait for another one of its wave.
            there = {*names[: names.index(part[0])], *(part if parts is waves else ())}
            assert all(there.issuperset(by_name[name].needs) for name in part)
        assert all(name.endswith("/report") for name in names[-4:])
        # Masks follow one another, so that what waits for them is trained at the same time.
        places = [names.index(job.name) for job in measured]
        assert places[1] == places[0] + 1


def test_runs_that_differ_in_a_free_key_share_nothing(tmp_path: Path) -> None:
    text = '[axes]\n"train.precision" = ["fp32", "bf16"]\n"finetune.lr" = [1e-3, 1e-4]\n'
    jobs = plan_jobs(expand(load_study(write_study(tmp_path, text))), split=False)
    first, same, other, both = jobs
    assert first.source is None
    assert same.source is not None
    assert same.source.run == first.run.id
    assert other.source is None
    assert both.source is not None
    assert both.source.run == other.run.id


def test_a_device_measures_beside_trainings_one_job_at_a_time(tmp_path: Path) -> None:
    text = 'seeds = [1, 2, 3]\n[set]\n"bench.on" = "ssh://board"\n'
    jobs = plan_jobs(expand(load_study(write_study(tmp_path, text))), split=True)
    assert not any(job.alone for job in jobs)
    by_name = {job.name: job for job in jobs}
    order = _order(jobs, LocalWorkers(tmp_path, 2))
    together = [sorted(by_name[name].until for name in part) for part in order]
    assert together == [["finetune"] * 2, ["finetune", "report"], ["report"], ["report"]]
