"""Is a GPU here that can be measured? One line says what is missing."""

from __future__ import annotations

PROVIDERS = ("CUDAExecutionProvider", "TensorrtExecutionProvider")


def why_no_gpu() -> str | None:
    """None where onnxruntime reaches an NVIDIA GPU; else one line: what is missing, and the way
    out.
    """
    from ...runtimes.device_memory import device_memory_used_bytes

    if device_memory_used_bytes() is None:
        return "no GPU is measured here: the NVIDIA driver's management library finds none (libnvidia-ml.so.1); run this on a machine with a GPU and its driver"
    try:
        import onnxruntime
    except ImportError:
        return "no GPU is measured here: onnxruntime is missing; pip install onnxruntime-gpu"
    if PROVIDERS[0] not in onnxruntime.get_available_providers():
        return f"no GPU is measured here: this onnxruntime {onnxruntime.__version__} has no {PROVIDERS[0]}; pip install onnxruntime-gpu in its place"
    return None


def gpu_providers() -> list[str]:
    """The GPU providers of this onnxruntime, CUDA first."""
    import onnxruntime

    available = onnxruntime.get_available_providers()
    return [provider for provider in PROVIDERS if provider in available]
