"""ncnn: `model.ncnn.param` with `model.ncnn.bin` beside it, on the processor."""

from __future__ import annotations

from typing import Any

from .engine import Engine, EngineError, Json, Requirement, missing

REQUIREMENT = Requirement("ncnn", "ncnn")


class NcnnEngine(Engine):
    """A network with batch 1.

    The session's `storage` is fp32 or fp16: the format of weights and activations in memory.
    """

    runtime = "ncnn"

    def __init__(self, job: Json) -> None:
        super().__init__(job)
        try:
            import ncnn
            import numpy
        except ImportError as error:
            raise missing(self.runtime, error, REQUIREMENT) from None
        self.module, self.numpy = ncnn, numpy
        self.version = str(ncnn.__version__)

    def load(self) -> None:
        """Open the model; see `Engine.load`."""
        path = self.require_file()
        self.set_input()
        if self.input_shape[0] != 1:
            raise EngineError(
                f"ncnn runs one image at a time, and batch {self.input_shape[0]} was requested; "
                "export with batch 1"
            )
        if not path.endswith(".param"):
            raise EngineError(f"{path}: ncnn opens a .param file with its .bin beside it")
        half = (self.job.get("session") or {}).get("storage") == "fp16"
        net = self.module.Net()
        option = net.opt
        option.num_threads = int(self.job.get("threads", 1))
        option.use_vulkan_compute = False
        # By default ncnn stores fp16 wherever the processor supports it, for fp32 models too.
        option.use_fp16_packed = option.use_fp16_storage = option.use_fp16_arithmetic = half
        option.use_bf16_storage = False
        if net.load_param(path) != 0 or net.load_model(path[: -len(".param")] + ".bin") != 0:
            raise EngineError(
                f"{path}: ncnn {self.version} cannot load it; "
                "it has a layer that this build lacks, or the .bin is missing"
            )
        inputs, outputs = list(net.input_names()), list(net.output_names())
        if len(inputs) != 1 or not outputs:
            raise EngineError(
                f"{path}: has {len(inputs)} inputs and {len(outputs)} outputs; "
                "an image classifier with one of each is measured"
            )
        # pnnx renames both; the manifest has the names that the other runtimes use.
        self.net, self.inner_input, self.inner_output = net, inputs[0], outputs[0]

    def infer(self, images: Any) -> Any:
        """Run the model; see `Engine.infer`."""
        extractor = self.net.create_extractor()
        extractor.input(self.inner_input, self.module.Mat(images[0]))
        status, found = extractor.extract(self.inner_output)
        if status != 0:
            raise EngineError(
                f"ncnn ended with status {status}; its layers do not accept this input"
            )
        return self.numpy.array(found).reshape(1, -1)


ENGINE = NcnnEngine
