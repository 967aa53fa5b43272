"""How much of an NVIDIA GPU's memory is in use, by the driver's own count; None where there is no
such GPU.
"""

from __future__ import annotations

import ctypes


class _MemoryInfo(ctypes.Structure):
    _fields_ = [
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    ]


def device_memory_used_bytes(index: int = 0) -> int | None:
    """Bytes in use on a GPU, of all programs together: the difference of two readings is what was
    taken between them.
    """
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    device, info = ctypes.c_void_p(), _MemoryInfo()
    if (
        library.nvmlInit_v2() != 0
        or library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)) != 0
    ):
        return None
    if library.nvmlDeviceGetMemoryInfo(device, ctypes.byref(info)) != 0:
        return None
    return int(info.used)
