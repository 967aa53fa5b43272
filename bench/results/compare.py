"""Comparison of two measurements: time ratio, confidence interval, significance test, exit code."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...core.errors import InputError
from .measurement import NOT_LATENCY, Measurement
from .statistics import (
    FEWEST_TURNS,
    Interval,
    rank_sum_p,
    ratio_interval,
    signed_rank_p,
    turn_medians,
)

LEVEL = 0.99
# The samples of a measurement at the default settings: 20 rounds of at least 5.
DEFAULT_ROUNDS = 20
DEFAULT_SAMPLES = 100


@dataclass(frozen=True)
class Comparison:
    """The latency of a candidate over that of a baseline.

    Attributes:
        baseline: Name of the baseline.
        candidate: Name of the candidate.
        ratio: Time of the candidate over the baseline's; above 1 the candidate is slower.
        p: Two-sided p value of the rank test.
        paired: Whether rounds of one session were paired.
        verdict: "slower", "faster" or "no difference".
        notes: What else differs between the two measurements.
    """

    baseline: str
    candidate: str
    ratio: Interval
    p: float
    paired: bool
    verdict: str
    notes: tuple[str, ...] = ()

    def exit_code(self, fail_if_slower: float | None = None) -> int:
        """Return 1 if the candidate is significantly slower, by more than `fail_if_slower`.

        The limit is a share (0.05 is 5 %); without one the code is 0.
        """
        if fail_if_slower is None:
            return 0
        return int(self.verdict == "slower" and self.ratio.estimate > 1 + fail_if_slower)

    def __str__(self) -> str:
        level, low, high = 100 * self.ratio.level, self.ratio.low, self.ratio.high
        how = "paired rounds" if self.paired else "separate runs"
        text = {
            "slower": "is slower than",
            "faster": "is faster than",
            "no difference": "shows no difference to",
        }[self.verdict]
        return (
            f"{self.candidate} {text} {self.baseline}: time ratio {self.ratio.estimate:.3f} "
            f"({level:.0f} % interval {low:.3f} to {high:.3f}, p = {self.p:.2g}, {how})"
        )


def compare(baseline: Measurement, candidate: Measurement) -> Comparison:
    """Compare two measurements.

    Those of one session are compared round by round, which cancels the machine's drift.

    Args:
        baseline: The measurement to compare with.
        candidate: The measurement that may be slower or faster.

    Returns:
        The ratio with its interval, the verdict, and notes on what else differs between the two:
        device, threads, batch, provider or runtime version.

    Raises:
        InputError: A processor was emulated; its times are not a device's latency.
    """
    for measured in (baseline, candidate):
        if measured.emulated:
            raise InputError(
                f"{measured.name}: emulated by {measured.environment.emulator}, {NOT_LATENCY}: "
                "there is nothing to compare it with; measure both on the device itself "
                "(--on ssh://user@host)"
            )
    paired = (
        baseline.session == candidate.session
        and len(baseline.samples_per_turn) == len(candidate.samples_per_turn) >= FEWEST_TURNS
    )
    notes = tuple(
        f"{label} differs: {before} and {after}; the ratio includes its effect"
        for label, before, after in (
            ("device", baseline.environment.cpu_model, candidate.environment.cpu_model),
            ("threads", baseline.threads, candidate.threads),
            ("batch", baseline.batch, candidate.batch),
            ("provider", baseline.provider, candidate.provider),
            ("runtime version", baseline.runtime_version, candidate.runtime_version),
        )
        if before != after
    )
    return compare_samples(
        baseline.latency_s,
        candidate.latency_s,
        baseline.samples_per_turn or None,
        candidate.samples_per_turn or None,
        paired=paired,
        names=(baseline.name, candidate.name),
        notes=notes,
    )


def compare_samples(
    baseline_s: tuple[float, ...] | list[float],
    candidate_s: tuple[float, ...] | list[float],
    baseline_turns: tuple[int, ...] | list[int] | None = None,
    candidate_turns: tuple[int, ...] | list[int] | None = None,
    *,
    paired: bool = False,
    names: tuple[str, str] = ("baseline", "candidate"),
    notes: tuple[str, ...] = (),
) -> Comparison:
    """Compare raw latency samples.

    The verdict is a difference only where the 99 % bootstrap interval excludes 1 *and* the rank
    test (Wilcoxon's on the medians of the rounds if paired, else Mann-Whitney's) gives p < 0.01: an
    interval from few rounds is a little too narrow, and samples of one turn are not independent.

    Args:
        baseline_s: Samples of the baseline in seconds.
        candidate_s: Samples of the candidate in seconds.
        baseline_turns: How many of the samples each turn of the baseline took.
        candidate_turns: The same of the candidate.
        paired: Whether turn i of both belongs to the same round.
        names: Names of baseline and candidate.
        notes: Notes of the comparison.
    """
    ratio = ratio_interval(
        candidate_s, baseline_s, candidate_turns, baseline_turns, paired=paired, level=LEVEL
    )
    if paired and baseline_turns and candidate_turns:
        logs = np.log(turn_medians(candidate_s, candidate_turns)) - np.log(
            turn_medians(baseline_s, baseline_turns)
        )
        p = signed_rank_p(logs.tolist())
    else:
        p = rank_sum_p(candidate_s, baseline_s)
    verdict = "no difference"
    if p < 1 - LEVEL and ratio.low > 1:
        verdict = "slower"
    elif p < 1 - LEVEL and ratio.high < 1:
        verdict = "faster"
    return Comparison(names[0], names[1], ratio, p, paired, verdict, notes)


def parse_limit(text: str) -> float:
    """Parse a share such as "5%", "5 %" or "0.05"; raises InputError for anything else."""
    bare = text.strip()
    try:
        share = float(bare.removesuffix("%")) / (100 if bare.endswith("%") else 1)
    except ValueError:
        raise InputError(f"--fail-if-slower {text!r}: not a share; write 5% or 0.05") from None
    if not 0 <= share < 100 or (share >= 1 and not bare.endswith("%")):
        raise InputError(f"--fail-if-slower {text!r}: outside of 0 to 1; write 5% or 0.05")
    return share
