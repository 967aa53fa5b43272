"""The fastest of several graphs on this machine.

Their runs are interleaved, so that other load slows all of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from ..sessions import config_for
from .model_proto import open_graph

LIMIT_S = 4.0
LEAST_ROUNDS = 7


def fastest(
    models: Mapping[str, onnx.ModelProto],
    images: NDArray[Any],
    *,
    threads: int = 1,
    limit_s: float = LIMIT_S,
) -> list[tuple[str, float]]:
    """Measure graphs in rounds, in which each runs once.

    Args:
        models: Graphs by name.
        images: One batch of inputs.
        threads: Threads within an operator.
        limit_s: Start no round after this time in seconds, but run at least seven.

    Returns:
        (name, median latency in seconds) of each graph, fastest first.
    """
    sessions = {
        name: open_graph(model, threads=threads, config=config_for(threads))
        for name, model in models.items()
    }
    feed = np.ascontiguousarray(images, dtype=np.float32)
    samples: dict[str, list[float]] = {name: [] for name in sessions}
    names = list(sessions)
    feeds = {name: {session.get_inputs()[0].name: feed} for name, session in sessions.items()}
    for name in names:
        for _ in range(3):
            sessions[name].run(None, feeds[name])
    start = time.perf_counter()
    rounds = 0
    while rounds < LEAST_ROUNDS or time.perf_counter() - start < limit_s:
        # The order rotates, so that no graph always starts a round.
        for name in names[rounds % len(names) :] + names[: rounds % len(names)]:
            session = sessions[name]
            session.run(None, feeds[name])
            before = time.perf_counter()
            session.run(None, feeds[name])
            samples[name].append(time.perf_counter() - before)
        rounds += 1
    return sorted(
        ((name, statistics.median(values)) for name, values in samples.items()),
        key=lambda row: row[1],
    )
