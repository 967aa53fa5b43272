"""LiteRT (formerly TensorFlow Lite): `.tflite` files, on its XNNPACK delegate."""

from __future__ import annotations

from typing import Any

from .engine import Engine, EngineError, Json, Requirement, missing

REQUIREMENT = Requirement("ai_edge_litert", "ai-edge-litert")


class LiteRtEngine(Engine):
    """An interpreter, which applies the XNNPACK delegate without being configured."""

    runtime = "litert"

    def __init__(self, job: Json) -> None:
        super().__init__(job)
        try:
            from ai_edge_litert.interpreter import Interpreter
        except ImportError as error:
            raise missing(self.runtime, error, REQUIREMENT) from None
        from importlib import metadata

        self.interpreter_class = Interpreter
        self.version = metadata.version("ai-edge-litert")

    def load(self) -> None:
        """Open the model; see `Engine.load`."""
        path = self.require_file()
        try:
            threads = int(self.job.get("threads", 1))
            self.interpreter = self.interpreter_class(path, num_threads=threads)
            self.interpreter.allocate_tensors()
        except Exception as error:
            raise self.cannot_load(error) from None
        inputs = self.interpreter.get_input_details()
        outputs = self.interpreter.get_output_details()
        if len(inputs) != 1 or not outputs:
            raise EngineError(
                f"the model has {len(inputs)} inputs and {len(outputs)} outputs; "
                "an image classifier with one of each is measured"
            )
        self.set_input([int(size) for size in inputs[0]["shape"]], inputs[0]["dtype"].__name__)
        self.input_index = inputs[0]["index"]
        names = [str(entry["name"]) for entry in self.outputs]
        if len(names) > len(outputs):
            raise EngineError(
                f"the model has {len(outputs)} outputs, {len(names)} were requested; export again"
            )
        self.output_name = names[0] if names else self.output_name
        self.output_indices = [outputs[0]["index"]]
        if names:
            self.output_indices = self._numbered(len(names))

    def infer(self, images: Any) -> Any:
        """Run the model; see `Engine.infer`."""
        return self._run(images)[0]

    def infer_outputs(self, images: Any) -> Json:
        """Run the model; see `Engine.infer_outputs`."""
        if not self.outputs:
            return super().infer_outputs(images)
        names = [str(entry["name"]) for entry in self.outputs]
        return dict(zip(names, self._run(images)))

    def _run(self, images: Any) -> list[Any]:
        self.interpreter.set_tensor(self.input_index, images)
        self.interpreter.invoke()
        return [self.interpreter.get_tensor(index) for index in self.output_indices]

    def _numbered(self, count: int) -> list[int]:
        """The indices of output_0, output_1, ..., as the converter names a module's outputs."""
        details = self.interpreter.get_signature_runner().get_output_details()
        names = [f"output_{number}" for number in range(count)]
        for name in names:
            if name not in details:
                raise EngineError(
                    f"the model has no {name}; it has {', '.join(details)}; export again"
                )
        return [int(details[name]["index"]) for name in names]


ENGINE = LiteRtEngine
