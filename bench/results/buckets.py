"""The buckets of an artifact side by side: the bound of its latency, and the mean over images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .measurement import Bucket, Measurement

Key = tuple[object, ...]


@dataclass(frozen=True)
class BucketTable:
    """All buckets of one artifact, measured interleaved.

    Attributes:
        name: Name of the artifact.
        measurements: One of each bucket, by increasing number of patches.
    """

    name: str
    measurements: tuple[Measurement, ...]

    @property
    def shares(self) -> tuple[float, ...] | None:
        """The share of images that get each bucket; None where it is unknown."""
        found = [each.bucket.share for each in self.measurements if each.bucket is not None]
        known = [share for share in found if share is not None]
        return tuple(known) if len(known) == len(self.measurements) else None

    @property
    def images(self) -> str:
        """The images that the shares rest on, in words; empty where they are unknown."""
        bucket = self.measurements[0].bucket
        if bucket is None or bucket.source is None:
            return ""
        count = "" if bucket.images is None else f"{bucket.images:,} "
        return f"{count}images of the {bucket.source}"

    @property
    def slowest(self) -> Measurement:
        """The bucket with the largest p50, which bounds the latency of any image."""
        return max(self.measurements, key=lambda each: each.summary().p50_s)

    @property
    def guarantee_s(self) -> float:
        """The p50 of the slowest bucket, in seconds."""
        return self.slowest.summary().p50_s

    @property
    def bound(self) -> Measurement:
        """What stands for the artifact beside others: the slowest bucket, with all warnings.

        Its top-1 is that of all images, each in its own bucket.
        """
        slowest = self.slowest
        bucket = slowest.bucket
        assert bucket is not None
        correct, total = self.counted or (None, None)
        top1 = correct / total if correct is not None and total else None
        warnings = dict.fromkeys(line for each in self.measurements for line in each.warnings)
        return slowest.model_copy(
            update={
                "name": self.name,
                "bucket": Bucket(patches=bucket.patches, counts=bucket.counts),
                "top1": top1,
                "correct": None if top1 is None else correct,
                "total": None if top1 is None else total,
                "warnings": tuple(warnings),
            }
        )

    @property
    def mean_s(self) -> float | None:
        """The p50 of each bucket, in seconds, in the mean over the images."""
        if self.shares is None:
            return None
        times = (each.summary().p50_s for each in self.measurements)
        return sum(share * time for share, time in zip(self.shares, times, strict=True))

    @property
    def mean_patches(self) -> float | None:
        """Number of patches that an image keeps, in the mean over the images."""
        if self.shares is None:
            return None
        counts = (each.bucket.patches for each in self.measurements if each.bucket is not None)
        return sum(share * count for share, count in zip(self.shares, counts, strict=True))

    @property
    def counted(self) -> tuple[int, int] | None:
        """(correct, total) over all images; None where no data set was scored."""
        totals = [each.total for each in self.measurements if each.total is not None]
        correct = [each.correct for each in self.measurements if each.correct is not None]
        return (sum(correct), sum(totals)) if totals else None


def bucket_name(name: str, patches: int) -> str:
    """Return the name of the measurement of one bucket of an artifact."""
    return f"{name}-{patches}-patches"


def bucket_pattern(name: str) -> str:
    """Return the pattern (`glob`) of the names of all buckets that an artifact may have."""
    return f"{name}-[0-9]*-patches"


def bucket_tables(measurements: Iterable[Measurement]) -> tuple[BucketTable, ...]:
    """Group the measurements of buckets; a group without one of its buckets is left out.

    Args:
        measurements: Any measurements.

    Returns:
        One table for each artifact, session and setting.
    """
    groups: dict[Key, dict[int, Measurement]] = {}
    for each in measurements:
        if each.bucket is not None:
            setting = (each.artifact_sha256, each.session, each.device, each.threads)
            groups.setdefault(setting, {}).setdefault(each.bucket.patches, each)
    found = []
    for group in groups.values():
        first = next(iter(group.values()))
        assert first.bucket is not None
        if set(group) == set(first.bucket.counts):
            ending = bucket_name("", first.bucket.patches)
            rows = tuple(group[patches] for patches in first.bucket.counts)
            found.append(BucketTable(first.name.removesuffix(ending), rows))
    return tuple(found)
