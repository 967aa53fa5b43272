"""The jobs of an artifact with buckets: one for each, and one that counts the images of all.

Every bucket is timed in a process of its own, in which each image keeps the same number of patches.
Images of a data set get their own bucket, in one pass by the first of these processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...export.artifact import Artifact
from ..results.buckets import bucket_name
from ..results.measurement import Bucket
from .artifact_facts import ArtifactFacts, artifact_facts
from .options import MeasureOptions

Json = dict[str, Any]


def measured_names(
    artifacts: Mapping[str, Artifact | Path | str], bucket: int | None
) -> dict[str, tuple[str, ...]]:
    """Return the names of the measurements of each artifact: several where it has buckets.

    Args:
        artifacts: {name: an `Artifact`, its folder, or an .onnx file}.
        bucket: `MeasureOptions.bucket`.

    Raises:
        InputError: An artifact is invalid.
    """
    if bucket is not None:
        return {name: (name,) for name in artifacts}
    return {
        name: tuple(bucket_name(name, patches) for patches in artifact_facts(artifact).buckets)
        or (name,)
        for name, artifact in artifacts.items()
    }


def bucket_jobs(
    name: str,
    facts: ArtifactFacts,
    options: MeasureOptions,
    job: Callable[[str, ArtifactFacts, MeasureOptions], Json],
) -> dict[str, Json]:
    """Return the jobs of an artifact by the names of their measurements.

    Args:
        name: Name of the artifact.
        facts: Its facts.
        options: What is measured.
        job: Returns the job of an artifact, in the bucket of the options.
    """
    if not facts.buckets or options.bucket is not None:
        return {name: job(name, facts, options)}
    jobs = {
        bucket_name(name, patches): job(name, facts, replace(options, bucket=patches))
        for patches in facts.buckets
    }
    own = {"buckets": list(facts.buckets), "scored_by": next(iter(jobs))}
    return {title: {**each, **own} for title, each in jobs.items()}


def own_score(run: Json, job: Json) -> tuple[int, int] | None:
    """(correct, total) over the data set, or over those of its images that get the job's bucket."""
    score = run.get("score")
    if score is None:
        return None
    if "buckets" not in job:
        return score["correct"], score["total"]
    own = job["inputs"]["bucket"]
    counted = {patches: (correct, total) for patches, correct, total in score["buckets"]}
    return counted[own]


def measured_bucket(run: Json, job: Json, facts: ArtifactFacts) -> Bucket | None:
    """Return the bucket that a job measured, and the share of images that get it."""
    patches = (job.get("inputs") or {}).get("bucket")
    if patches is None:
        return None
    if "buckets" not in job:
        return Bucket(patches=patches, counts=facts.buckets)
    if (counted := own_score(run, job)) is not None:
        total = run["score"]["total"]
        return Bucket(
            patches=patches,
            counts=facts.buckets,
            share=counted[1] / total,
            images=total,
            source="data set",
        )
    if facts.bucket_shares is None:
        return Bucket(patches=patches, counts=facts.buckets)
    return Bucket(
        patches=patches,
        counts=facts.buckets,
        share=facts.bucket_shares[facts.buckets.index(patches)],
        images=facts.bucket_images,
        source="calibration",
    )
