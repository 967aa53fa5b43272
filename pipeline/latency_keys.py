"""Keys of `[masks]` for a budget in milliseconds, and the budgets beside it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from .recipe_sections import Section


def positive(description: str) -> Any:
    """An optional number above 0."""
    return Field(None, gt=0.0, description=description)


def share(description: str) -> Any:
    """An optional number between 0 and 1, both excluded."""
    return Field(None, gt=0.0, lt=1.0, description=description)


class LatencyKeys(Section):
    """A latency that the compact model has to reach, and how that is checked."""

    latency_ms: float | None = positive(
        "budget: milliseconds of an inference by `cost_table`; tokens, widths and "
        "depth are chosen together",
    )
    latency: float | None = share(
        "budget: share of the dense model's latency by `cost_table`, e.g. 0.4",
    )
    cost_table: str | None = Field(
        None,
        min_length=1,
        description="with a latency: file of `vitrim bench --cost-table`, for an artifact that the "
        "run exports (runtime, precision, target, threads, batch); absent: one that ships "
        "for `export.target`, else the operator costs of estimates, and the budget is an estimate",
    )
    target_runtime: str | None = Field(
        None,
        min_length=1,
        description="with a latency: the runtime that it is of; absent: that of `cost_table`, or "
        "the first of `export.runtimes`",
    )
    latency_rounds: int = Field(
        3,
        ge=0,
        le=10,
        description="with a latency: so often the cut is exported and measured here, and the "
        "budget corrected; 0: the table's prediction is not checked",
    )
    candidates: int = Field(
        0,
        ge=0,
        description="closed-form with a latency: number of varied solutions that are cut and "
        "compared on held-out images, e.g. 24; 0: the one of least predicted loss is cut",
    )
    file_mb: float | None = positive(
        "budget of closed-form, or beside a latency: computed size of the file in "
        "megabytes, with weights of `file_precision`",
    )
    peak_memory_mb: float | None = positive(
        "beside a latency: largest memory of weights and activations in megabytes, with weights of "
        "`file_precision`, and activations of the precision and the batch of `cost_table`",
    )
    energy_mj: float | None = positive(
        "beside a latency: millijoules of an inference, at the power that the networks "
        "of `cost_table` were measured with",
    )
    file_precision: Literal["fp32", "fp16", "int8"] | None = Field(
        None,
        description="precision of the weights in `file_mb` and `peak_memory_mb`; absent: that of "
        "`cost_table`, and fp32 without a latency",
    )

    @property
    def has_latency(self) -> bool:
        """Whether the budget is a latency by a cost table."""
        return self.latency_ms is not None or self.latency is not None

    def check_latency(self, method: str, start: str, sharing: str) -> None:
        """Validate the keys together.

        Args:
            method: `masks.method`.
            start: `masks.start`.
            sharing: `masks.sharing`.

        Raises:
            ValueError: A key has no effect, or excludes another one.
        """
        for key, given in (
            ("cost_table", self.cost_table is not None),
            ("target_runtime", self.target_runtime is not None),
            ("candidates", self.candidates > 0),
            ("peak_memory_mb", self.peak_memory_mb is not None),
            ("energy_mj", self.energy_mj is not None),
        ):
            if given and not self.has_latency:
                raise ValueError(f"{key} needs a budget of milliseconds, e.g. `latency = 0.4`")
        if not self.has_latency:
            if self.file_mb is not None and method != "closed-form":
                raise ValueError(
                    'file_mb alone needs method = "closed-form"; masks are learned for `params`, '
                    "`macs`, or `latency_ms`"
                )
            return
        if method not in ("learned", "closed-form"):
            raise ValueError(
                f'method = "{method}" takes no latency; write method = "learned" or "closed-form", '
                "or `macs`"
            )
        if method == "closed-form":
            return
        for key, given, remedy in (
            ("candidates", self.candidates > 0, 'write method = "closed-form"'),
            ('start = "one-shot"', start == "one-shot", "leave it out"),
            ('sharing = "unshared"', sharing == "unshared", 'use "residual"'),
        ):
            if given:
                raise ValueError(
                    f"{key} and a latency of learned masks exclude each other; {remedy}"
                )
        for key in ("file_mb", "peak_memory_mb"):
            if getattr(self, key) is not None and sharing == "full":
                raise ValueError(f'{key} needs sharing = "residual"')
