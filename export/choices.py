"""Which tokens a network with selections chooses: in torch, and in what was exported from it.

An exported network may choose other tokens where scores are nearly equal. Its outputs are then
compared with those of the torch model for the same choices, and on how many images the choices
are equal is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from ..compress.network.architecture import SelectSpec
from ..compress.network.modules.select import Choices, Select
from .graphs.model_proto import INDICES, open_graph
from .manifest import Batch, ChoiceParity
from .parity import model_outputs, session_values, side_by_side

Array = NDArray[Any]
# One array (images, kept) for each selection whose choice depends on the image.
Chosen = tuple[Array, ...]


@dataclass(frozen=True)
class SelectionReference:
    """The choices of a torch model for the images of a probe.

    Attributes:
        model: The module that contains the selections.
        outputs: Runs it: images -> outputs, one row an image.
        images: float32 (count, channels, height, width).
        selects: The selections whose choice depends on the image.
        chosen: What they choose.
    """

    model: nn.Module
    outputs: Callable[[Array], Array]
    images: Array
    selects: tuple[SelectSpec, ...]
    chosen: Chosen

    @classmethod
    def of(
        cls, model: nn.Module, outputs: Callable[[Array], Array], images: Array
    ) -> SelectionReference | None:
        """Run the model, if it has selections that depend on the image.

        Args:
            model: The torch module.
            outputs: Runs it: images -> outputs, one row an image.
            images: float32 (count, channels, height, width).
        """
        modules = _selections(model)
        if not modules:
            return None
        with _recording(modules) as found:
            outputs(images)
        selects = tuple(module.spec for module in modules)
        return cls(model, outputs, images, selects, tuple(map(np.concatenate, found)))

    @property
    def values(self) -> tuple[str, ...]:
        """The names of the choices in a graph."""
        return tuple(f"{select.name}{INDICES}" for select in self.selects)

    def compare(self, chosen: Chosen) -> tuple[ChoiceParity, ...]:
        """Compare choices for the first images, as many as there are."""
        figures = []
        for select, wanted, found in zip(self.selects, self.chosen, chosen, strict=True):
            wanted = wanted[: len(found)]
            common = [len(np.intersect1d(a, b)) for a, b in zip(wanted, found, strict=True)]
            figures.append(
                ChoiceParity(
                    selection=select.name,
                    kept=select.patches,
                    equal=float((wanted == found).all(axis=1).mean()),
                    overlap=float(np.mean(common)) / select.patches,
                )
            )
        return tuple(figures)

    def outputs_for(self, chosen: Chosen, outputs: Array) -> Array:
        """The model's outputs if it chooses the given tokens.

        Args:
            chosen: For the first images, as many as there are.
            outputs: Those for its own choices.
        """
        other = np.zeros(len(chosen[0]), bool)
        for wanted, found in zip(self.chosen, chosen, strict=True):
            other |= (wanted[: len(found)] != found).any(axis=1)
        if not other.any():
            return outputs[: len(other)]
        result = outputs[: len(other)].copy()
        with _prescribing(_selections(self.model), [rows[other] for rows in chosen]):
            result[other] = self.outputs(self.images[: len(other)][other])
        return result


def outputs_and_choices(
    graph: onnx.ModelProto, names: Sequence[str], images: Array, *, batch: Batch = 1
) -> tuple[Array, Chosen | None]:
    """Run a graph on all images.

    Args:
        graph: The graph.
        names: The names of the choices; empty for a network without selections.
        images: float32 (count, channels, height, width).
        batch: The graph's batch size; an incomplete last batch is padded.

    Returns:
        The outputs, as of `model_outputs`, and the choices; None where the graph does not hold all
        of them.
    """
    opened = _with_choices(graph, names) if names else None
    if opened is None:
        return model_outputs(graph, images, batch=batch), None
    values = session_values(open_graph(opened), images, batch=batch)
    own = len(values) - len(names)
    return side_by_side(values[:own]), tuple(values[own:])


def _with_choices(graph: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto | None:
    """Return a copy with further outputs for the choices; None if it does not hold all of them."""
    made = {output for node in graph.graph.node for output in node.output}
    if not set(names) <= made:
        return None
    opened = onnx.ModelProto()
    opened.CopyFrom(graph)
    opened.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, None) for name in names
    )
    return opened


def named_choices(graph: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """Return torch's own graph with the names of its choices; unchanged where it has others.

    Args:
        graph: A graph in which each choice is sorted by a TopK of the smallest.
        names: The names, in order.
    """
    sorts = [
        node
        for node in graph.graph.node
        if node.op_type == "TopK"
        and any(entry.name == "largest" and entry.i == 0 for entry in node.attribute)
    ]
    if len(sorts) != len(names):
        return graph
    named = onnx.ModelProto()
    named.CopyFrom(graph)
    new = {sort.output[0]: name for sort, name in zip(sorts, names, strict=True)}
    for node in named.graph.node:
        for values in (node.input, node.output):
            for number, value in enumerate(values):
                values[number] = new.get(value, value)
    return named


def _selections(model: nn.Module) -> list[Select]:
    return [
        module
        for module in model.modules()
        if isinstance(module, Select) and module.spec.scorer != "random"
    ]


class _recording:
    """Records the choices of modules: one list of arrays for each."""

    def __init__(self, modules: Sequence[Select]) -> None:
        self.modules = modules

    def __enter__(self) -> list[list[Array]]:
        self.found: list[list[Array]] = [[] for _ in self.modules]
        self.hooks = []
        for module, rows in zip(self.modules, self.found, strict=True):

            def before(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
                x, scored, _, positions = inputs
                return x, scored, Choices(), positions

            def after(
                module: nn.Module, inputs: tuple[Any, ...], output: Any, rows: Any = rows
            ) -> None:
                rows.append(inputs[2].found[0].cpu().numpy())

            self.hooks += [
                module.register_forward_pre_hook(before),
                module.register_forward_hook(after),
            ]
        return self.found

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()


class _prescribing:
    """Prescribes the choices of modules, for images in the order in which they are run."""

    def __init__(self, modules: Sequence[Select], chosen: Sequence[Array]) -> None:
        self.modules, self.chosen = modules, chosen

    def __enter__(self) -> None:
        self.hooks = []
        for module, rows in zip(self.modules, self.chosen, strict=True):
            done = [0]

            def before(
                module: nn.Module,
                inputs: tuple[Any, ...],
                rows: Array = rows,
                done: list[int] = done,
            ) -> tuple[Any, ...]:
                x, scored, _, positions = inputs
                first, done[0] = done[0], done[0] + len(x)
                chosen = torch.from_numpy(rows[first : done[0]])
                return x, scored, Choices(given=[chosen]), positions

            self.hooks.append(module.register_forward_pre_hook(before))

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()
