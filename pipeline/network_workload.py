"""A network's operators, from its architecture alone: what an estimate of its latency counts."""

from __future__ import annotations

from collections.abc import Iterator

from ..bench.estimate.workload import Operator, Workload, attention, pointwise, projection
from ..compress.network.architecture import Architecture, AttentionSpec, FfnSpec


def network_workload(architecture: Architecture, name: str = "network") -> Workload:
    """One inference of one image, as vitrim's graphs compute it: the last block's queries only for
    the tokens that the head reads.

    Gates, rope and position biases are left out: they are small beside the products, which are all
    counted.
    """
    return Workload(name, tuple(_operators(architecture.model_copy(update={"last_queries": True}))))


def _operators(architecture: Architecture) -> Iterator[Operator]:
    from ..compress.network.count import branch_tokens

    stem, channels = architecture.stem, architecture.image[0]
    sizes = stem.sizes(*architecture.image[1:])
    for number, (conv, (down, across)) in enumerate(zip(stem.before, sizes, strict=False)):
        yield projection(
            f"stem.{number}",
            down * across,
            channels * conv.kernel[0] * conv.kernel[1],
            conv.channels,
        )
        channels = conv.channels
    down, across = sizes[-1]
    yield projection(
        "stem",
        down * across,
        channels * stem.patch[0] * stem.patch[1],
        architecture.read_width(architecture.stem_writes),
    )
    for branch, seen, asked in branch_tokens(architecture):
        read, written = (
            architecture.read_width(branch.reads),
            architecture.read_width(branch.writes),
        )
        core, at = branch.core, branch.name
        yield pointwise(f"{at}.norm", "norm", seen * read)
        if isinstance(core, AttentionSpec):
            qk, values = core.parts * core.qk, core.heads * core.v
            yield projection(f"{at}.q", asked, read, core.heads * qk)
            yield projection(f"{at}.k", seen, read, core.kv_heads * qk)
            yield projection(f"{at}.v", seen, read, core.kv_heads * core.v)
            yield attention(at, core.heads, asked, seen, qk, core.v)
            yield projection(f"{at}.out", asked, values, written)
        elif isinstance(core, FfnSpec):
            yield projection(f"{at}.fc1", asked, read, core.hidden * (2 if core.gated else 1))
            yield pointwise(f"{at}.act", "activation", asked * core.hidden)
            yield projection(f"{at}.out", asked, core.hidden, written)
        yield pointwise(f"{at}.add", "add", asked * written)
    yield pointwise(
        "norm",
        "norm",
        architecture.pooled_prefix * architecture.embed or architecture.tokens * architecture.embed,
    )
    if architecture.head is not None:
        yield projection("head", 1, architecture.head_width, architecture.classes)
