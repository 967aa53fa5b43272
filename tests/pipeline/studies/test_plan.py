"""The jobs of a study: which steps are shared, and what waits for what."""

from __future__ import annotations

from pathlib import Path

import pytest
from study_sample import write_study
from vitrim.pipeline.studies.expansion import StudyRun, expand
from vitrim.pipeline.studies.plan import Job, plan_jobs
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
