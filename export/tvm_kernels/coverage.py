"""Which networks our kernels cover; the others use TVM's ONNX front end.

Not covered are

1. a norm of the patches or of the stem's output, if the stem writes only a part of the stream;
2. pooling of other kinds than POOLS, and pooling that refines tokens;
3. the mean of two classifiers with an activation;
4. a norm after a sub-layer that writes only a part of the stream, or after a constant.
"""

from __future__ import annotations

from ...compress.network.architecture import Architecture, BranchSpec, ConstantSpec

POOLS = ("token", "distilled", "dense", "mean", "mean_all", "attention")
# In the order of `uncovered_part`, for the documentation.
UNCOVERED_PARTS = (
    "norms over a part of the stream before or after a sub-layer",
    f"pooling other than {', '.join(POOLS)}",
    "the mean of two classifiers with an activation",
)


def uncovered_part(architecture: Architecture) -> str | None:
    """Find what no kernel computes.

    Args:
        architecture: The network.

    Returns:
        A description of the first such part, with its place; None for a network that is covered.
    """
    if architecture.patch_norm is not None and architecture.stem_writes is not None:
        return "a norm over each patch of a part of the stream (patch_norm with stem_writes)"
    if architecture.stem_norm is not None and architecture.stem_writes is not None:
        return "a norm of a part of the stream (stem_norm with stem_writes)"
    pool, head = architecture.pool, architecture.head
    if pool.kind not in POOLS or pool.refine is not None:
        return f"pooling '{pool.kind}'" + (" with refine" if pool.refine else "")
    if pool.kind == "distilled" and head is not None and head.act != "identity":
        return f"the mean of two classifiers with the activation '{head.act}'"
    for branch in architecture.branches:
        if (reason := _uncovered_branch(branch)) is not None:
            return f"{branch.name}: {reason}"
    return None


def _uncovered_branch(branch: BranchSpec) -> str | None:
    if branch.post_norm is None:
        return None
    if branch.writes is not None:
        return (
            "a norm after a sub-layer that writes to a part of the stream (post_norm with writes)"
        )
    if isinstance(branch.core, ConstantSpec):
        return "a norm after a constant (post_norm)"
    return None
