"""Measure on a device over ssh."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...core.errors import InputError
from ..local.measure import Measurable
from ..results.measurement import Measurement
from .measure import measure_on


def measure_over_ssh(
    url: str, artifacts: Mapping[str, Measurable], threads: int = 1, **options: Any
) -> dict[str, Measurement]:
    """Measure artifacts, interleaved, on the device at ssh://user@host[:port], and return {name:
    Measurement}; options as of `measure_on`.

    Errors: InputError, one line; LinkLost when the device does not answer: the run goes on there,
    and the same call again brings its result.
    """
    if not url.startswith("ssh://"):
        raise InputError(f"{url!r}: not an address; write ssh://user@host or ssh://user@host:port")
    return measure_on(url, artifacts, threads, **options)
