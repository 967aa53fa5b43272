"""The model for converters that read a torch module: as a `CompactModel`, without the work that its
head never reads.
"""

from __future__ import annotations

from ...compress.network.modules.model import CompactModel, build
from ...core.errors import UnsupportedModel
from .runtime import Source


def for_inference(source: Source, runtime: str) -> CompactModel:
    """A copy whose last block asks only for the tokens that the head reads: exact, as in the graph
    forms. Errors: UnsupportedModel.
    """
    compact = source.compact
    if compact is None:
        raise UnsupportedModel(
            f"runtime {runtime!r} converts what vitrim can lift, and {type(source.model).__name__} is not; export for onnxruntime"
        )
    if not compact.architecture.pooled_prefix or compact.architecture.last_queries:
        return compact
    return build(
        compact.architecture.model_copy(update={"last_queries": True}), compact.state_dict()
    ).eval()
