"""What our kernels cover; the rest goes through TVM's ONNX front end."""

from __future__ import annotations

from ...compress.network.architecture import Architecture, BranchSpec, ConstantSpec

POOLS = ("token", "distilled", "mean", "mean_all", "attention")


def reason_against(architecture: Architecture) -> str | None:
    """What no kernel of ours computes, with its place, or None."""
    if architecture.stem.before:
        return "convolutions before the patches (stem.before)"
    if architecture.patch_norm is not None and architecture.stem_writes is not None:
        return "a norm over each patch of a part of the stream (patch_norm with stem_writes)"
    if architecture.stem_norm is not None and architecture.stem_writes is not None:
        return "a norm of a part of the stream (stem_norm with stem_writes)"
    if architecture.pool.kind not in POOLS or architecture.pool.refine is not None:
        return f"pooling '{architecture.pool.kind}'" + (
            " with refine" if architecture.pool.refine else ""
        )
    if (
        architecture.pool.kind == "distilled"
        and architecture.head is not None
        and architecture.head.act != "identity"
    ):
        return f"the mean of two classifiers behind '{architecture.head.act}'"
    return next(
        (
            f"{branch.name}: {reason}"
            for branch in architecture.branches
            if (reason := _branch(branch)) is not None
        ),
        None,
    )


def _branch(branch: BranchSpec) -> str | None:
    if branch.post_norm is not None and branch.writes is not None:
        return (
            "a norm after a sub-layer that writes to a part of the stream (post_norm with writes)"
        )
    if branch.post_norm is not None and isinstance(branch.core, ConstantSpec):
        return "a norm after a constant (post_norm)"
    return None
