"""A kernel's work over threads: each has one share of it, and one thread alone has no parallel loop
around it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.tirx.script import builder as T


def over_threads(share: Callable[[Any, int], None], threads: int) -> None:
    """Write `share(part, parts)` for every part, in a parallel loop where there are several."""
    if threads == 1:
        share(0, 1)
    else:
        with T.parallel(0, threads) as part:
            share(part, threads)
