"""The measured error of the features when patches leave at one depth, for the choice of counts.

Patches that leave at a step are missing in all later ones, so the error of a whole schedule is
estimated by paying for each patch once, where it leaves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor

from ..masks.groups import token_sites
from ..network.modules.branch import Branch
from ..network.modules.model import CompactModel
from ..oneshot.sensitivity import features
from .attention_scores import top_tokens
from .counts import STEM, attention_steps, whole_counts
from .streaming import DenseStreams, Progress, position_tables, run_step, silent

# So many images are enough for a curve; the shares of the patches at which errors are measured.
ERROR_IMAGES = 32
SHARES = (0.0, 0.1, 0.25, 0.4, 0.6, 0.8)
# Share of the largest error that is added for the first patch, falling to 0 for all.
TILT = 1e-3


def leaving_errors(
    model: CompactModel,
    scores: Mapping[int, Tensor],
    images: Tensor,
    progress: Progress = silent,
) -> dict[int, list[float]]:
    """The error of the features when only the patches of highest score stay after a step.

    Args:
        model: A working copy.
        scores: By step with attention, the score of each token after it, (tokens,); with those of
            `STEM`, what is lost where patches never enter is measured, too.
        images: (images, channels, height, width); the first 32 are used.
        progress: Called with "errors", the networks done, and the networks in all.

    Returns:
        By step of `scores`, the relative squared error for each number of tokens from 0, prefix
        tokens included; it does not rise with the number. Errors between measured numbers are
        interpolated.

    Raises:
        InputError: The images do not fit the model.
    """
    architecture = model.architecture
    mixing, sizes = attention_steps(architecture), list(token_sites(architecture).values())
    whole = whole_counts(architecture)
    streams = DenseStreams(model, images[:ERROR_IMAGES], mixing)
    found: dict[int, list[float]] = {}
    steps = [STEM, *mixing] if STEM in scores else mixing
    for done, step in enumerate(steps):
        # A patch that never enters is missing for the first attention.
        site = mixing[0] if step == STEM else step + 1
        size, prefix = sizes[site], architecture.prefix
        found[step] = [0.0] * (size + 1)
        # Nothing is chosen where only prefix tokens are read.
        if whole[site] > prefix:
            fewer = {prefix + max(1, round(share * (size - prefix))) for share in SHARES}
            counts = sorted({*fewer, size})
            among = torch.ones(size, dtype=torch.bool)
            score = scores[step][:size]
            sets = [top_tokens(architecture, score, among, count) for count in counts[:-1]]
            measured = [*_errors(model, streams, step, sets), 0.0]
            # Noise may make an error rise with the number of patches. Where that leaves a plateau,
            # a slight slope prefers more patches.
            falling = np.maximum.accumulate(measured[::-1])[::-1]
            slope = TILT * falling[0] * (size - np.array(counts)) / size
            found[step] = np.interp(range(size + 1), counts, falling + slope).tolist()
        progress("errors", done + 1, len(steps))
    return found


def _errors(
    model: CompactModel, streams: DenseStreams, step: int, sets: list[Tensor]
) -> list[float]:
    """The relative squared error of the features for each set of tokens after a step."""
    totals, size = [0.0] * len(sets), 0.0
    first = attention_steps(model.architecture)[0]
    with torch.no_grad():
        for batch in range(len(streams)):
            if step == STEM:
                after, start = streams.before(first, batch), first
            else:
                after, start = run_step(model, step, streams.before(step, batch)), step + 1
            wanted = _features(model, start, after, torch.ones(after.shape[1], dtype=torch.bool))
            size += float(wanted.double().square().sum())
            for place, keep in enumerate(sets):
                found = _features(model, start, after, keep)
                totals[place] += float((found - wanted).double().square().sum())
    return [total / max(size, math.ulp(0.0)) for total in totals]


def _features(model: CompactModel, start: int, x: Tensor, keep: Tensor) -> Tensor:
    """The pooled features where the stream `x` before a step carries only some tokens."""
    architecture = model.architecture
    sizes, last = list(token_sites(architecture).values()), attention_steps(architecture)[-1]
    tokens = torch.nonzero(keep).flatten()
    x = x[:, tokens]
    with position_tables(model, tokens):
        for number in range(start, len(model.steps)):
            count = int((tokens < sizes[number + 1]).sum())
            if number >= last and architecture.pooled_prefix:
                count = architecture.pooled_prefix
            branches = cast("Sequence[Branch]", model.steps[number])
            x = model.run_step(branches, x, count)
    return features(model, x)
