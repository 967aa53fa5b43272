"""TVM with a schedule of our own for Vision Transformers: kernels in TIR, put together in Relax,
parametrised by a target's profile.
"""

from __future__ import annotations
