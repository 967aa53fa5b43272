"""LiteRT: `model.tflite`."""

from __future__ import annotations

from .conversion import ConvertedApart

RUNTIME = ConvertedApart(
    "litert",
    extra="litert",
    module="litert_torch",
    converter="convert_litert.py",
    main="model.tflite",
)
