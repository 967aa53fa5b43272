"""ExecuTorch: `model.pte`."""

from __future__ import annotations

from .conversion import ConvertedApart

RUNTIME = ConvertedApart(
    "executorch",
    extra="executorch",
    module="executorch",
    converter="convert_executorch.py",
    main="model.pte",
)
