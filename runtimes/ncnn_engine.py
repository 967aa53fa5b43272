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
        # pnnx renames both, to out0, out1, ...; the manifest has the names that the other runtimes
        # use.
        names = [str(entry["name"]) for entry in self.outputs]
        if len(names) > len(outputs):
            raise EngineError(f"{path}: has {len(outputs)} outputs, {len(names)} were requested")
        self.output_name = names[0] if names else self.output_name
        self.net, self.inner_input = net, inputs[0]
        if names:
            self.inner_outputs = [f"out{number}" for number in range(len(names))]
        else:
            self.inner_outputs = outputs[:1]

    def infer(self, images: Any) -> Any:
        """Run the model; see `Engine.infer`."""
        found = self._run(images)[0]
        return found.reshape(self.outputs[0]["shape"] if self.outputs else (1, -1))

    def infer_outputs(self, images: Any) -> Json:
        """Run the model; see `Engine.infer_outputs`."""
        if not self.outputs:
            return super().infer_outputs(images)
        return {
            entry["name"]: found.reshape(entry["shape"])
            for entry, found in zip(self.outputs, self._run(images))
        }

    def _run(self, images: Any) -> list[Any]:
        extractor = self.net.create_extractor()
        extractor.input(self.inner_input, self.module.Mat(images[0]))
        outputs = []
        for name in self.inner_outputs:
            status, found = extractor.extract(name)
            if status != 0:
                raise EngineError(
                    f"ncnn ended with status {status}; its layers do not accept this input"
                )
            outputs.append(self.numpy.array(found))
        return outputs


ENGINE = NcnnEngine
