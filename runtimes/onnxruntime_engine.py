"""ONNX Runtime: `.onnx` and `.ort` files."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from typing import Any

from .engine import Engine, EngineError, Json, Requirement, missing, one_line

REQUIREMENT = Requirement("onnxruntime", "onnxruntime")
CPU_PROVIDER = "CPUExecutionProvider"
NUMPY_TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64", "tensor(uint8)": "uint8"}


class OnnxRuntimeEngine(Engine):
    """A session. Of the job it also reads providers, arena, spinning, and session (config entries)."""

    runtime = "onnxruntime"

    def __init__(self, job: Json) -> None:
        super().__init__(job)
        try:
            import onnxruntime  # type: ignore[import-untyped, unused-ignore]
        except ImportError as error:
            raise missing(self.runtime, error, REQUIREMENT) from None
        self.module = onnxruntime
        self.version = onnxruntime.__version__

    def load(self) -> None:
        options = self._options()
        asked = list(self.job.get("providers") or [CPU_PROVIDER])
        if asked != [CPU_PROVIDER]:
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        self.session = self._open(options)
        inputs = self.session.get_inputs()
        if len(inputs) != 1:
            raise EngineError(
                f"the model has {len(inputs)} inputs ({', '.join(i.name for i in inputs)}); an image classifier with one is measured"
            )
        found = inputs[0]
        if found.type not in NUMPY_TYPES:
            raise EngineError(f"input {found.name!r} is a {found.type}; it can be one of {', '.join(NUMPY_TYPES)}")
        self.take_input(found.shape, NUMPY_TYPES[found.type], found.name)
        outputs = [output.name for output in self.session.get_outputs()]
        self.output_name = self.job.get("output") or ("logits" if "logits" in outputs else outputs[0])
        if self.output_name not in outputs:
            raise EngineError(f"the model has no output {self.output_name!r}; it has {', '.join(outputs)}")
        self.provider_nodes = nodes_by_provider(self.session) if asked != [CPU_PROVIDER] else None
        nodes = self.provider_nodes
        self.provider = max(nodes, key=nodes.__getitem__) if nodes else self.session.get_providers()[0]

    def infer(self, images: Any) -> Any:
        return self.session.run([self.output_name], {self.input_name: images})[0]

    def profile(self, images: Any, count: int) -> list[Json]:
        # A second session: the profiler cannot be switched on later, and would cost the timed one time.
        folder = tempfile.mkdtemp(prefix="vitrim-profile-")
        try:
            options = self._options()
            options.enable_profiling = True
            options.profile_file_prefix = os.path.join(folder, "trace")
            session = self._open(options)
            for _ in range(count + 2):
                session.run([self.output_name], {self.input_name: images})
            with open(session.end_profiling()) as stream:
                return operator_rows(json.load(stream), count)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _options(self) -> Any:
        job = self.job
        options = self.module.SessionOptions()
        options.intra_op_num_threads = int(job.get("threads", 1))
        options.inter_op_num_threads = 1
        options.enable_cpu_mem_arena = bool(job.get("arena", True))
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if job.get("spinning") else "0")
        if job.get("spinning"):
            # Threads may wait busily inside a call, but not after it: a neighbour that is measured in turn would pay for that.
            options.add_session_config_entry("session.force_spinning_stop", "1")
        for key, value in (job.get("session") or {}).items():
            options.add_session_config_entry(key, value)
        return options

    def _open(self, options: Any) -> Any:
        providers = list(self.job.get("providers") or [CPU_PROVIDER])
        available = self.module.get_available_providers()
        for provider in providers:
            if provider not in available:
                raise EngineError(
                    f"this onnxruntime {self.version} has no {provider} (it has {', '.join(available)}); "
                    "install the onnxruntime build for that device, or ask for a provider that is there"
                )
        path = self.require_file()
        try:
            return self.module.InferenceSession(path, options, providers=providers)
        except Exception as error:
            raise EngineError(f"{os.path.basename(path)}: onnxruntime {self.version} cannot load it: {one_line(error)}") from None


ENGINE = OnnxRuntimeEngine


def nodes_by_provider(session: Any) -> dict[str, int] | None:
    """How many nodes each execution provider really took; None where this onnxruntime does not tell."""
    try:
        counts: dict[str, int] = {}
        for subgraph in session.get_provider_graph_assignment_info():
            counts[subgraph.ep_name] = counts.get(subgraph.ep_name, 0) + len(subgraph.get_nodes())
        return counts or None
    except Exception:
        return None


def operator_rows(trace: list[Json], count: int) -> list[Json]:
    """Rows (node, operator, provider, calls, seconds an inference) from a trace, its first two runs left out as warm-up."""
    found: dict[str, list[Json]] = {}
    for event in trace:
        if event.get("cat") == "Node" and event.get("name", "").endswith("_kernel_time"):
            found.setdefault(event["name"][: -len("_kernel_time")], []).append(event)
    rows = []
    for node, events in found.items():
        kept = events[-count:]
        args = kept[0].get("args", {})
        rows.append(
            {
                "node": node,
                "operator": args.get("op_name", "?"),
                "provider": args.get("provider", "?"),
                "output_shapes": [list(shape) for entry in args.get("output_type_shape", []) for shape in entry.values()],
                "calls": len(kept),
                "seconds": sum(event["dur"] for event in kept) * 1e-6 / count,
            }
        )
    return sorted(rows, key=lambda row: -float(row["seconds"]))
