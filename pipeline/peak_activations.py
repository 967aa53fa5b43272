"""How much memory a network's activations need at once, from its architecture alone: what a small
device must hold beside the weights.
"""

from __future__ import annotations

from ..compress.network.architecture import Architecture, AttentionSpec, BranchSpec, FfnSpec

BYTES = {"fp32": 4, "fp16": 2, "int8": 1}


def peak_activation_bytes(architecture: Architecture, precision: str = "fp32") -> int:
    """Bytes of the tensors that live together at the worst moment, batch 1, for a runtime that
    frees each tensor after its last use.

    A lower bound: it counts the residual stream and the inputs and outputs of one operator at a
    time; a runtime that fuses less, or keeps working space, needs more.
    """
    channels, height, width = architecture.image
    stream = architecture.tokens * architecture.embed
    moments = [channels * height * width + stream]
    moments += [stream + _branch(branch, architecture) for branch in architecture.branches]
    return max(moments) * BYTES[precision]


def _branch(branch: BranchSpec, architecture: Architecture) -> int:
    tokens, core = architecture.tokens, branch.core
    read = tokens * architecture.read_width(branch.reads)
    written = tokens * architecture.read_width(branch.writes)
    if isinstance(core, AttentionSpec):
        qk, v = tokens * core.heads * core.qk, tokens * core.heads * core.v
        scores = core.heads * tokens * tokens
        # Projecting; scores of queries and keys; softmax in place, then weighted values; the output
        # projection.
        return max(read + 2 * qk + v, 2 * qk + v + scores, scores + 2 * v, v + written)
    if isinstance(core, FfnSpec):
        hidden = tokens * core.hidden * (2 if core.gated else 1)
        return max(read + hidden, hidden + written)
    return 0
