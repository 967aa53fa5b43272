"""Which of timm's plain Vision Transformers the ONNX graph forms compute exactly, dense and cut.

`python -m benchmarks.coverage.graph_forms` builds every name small (`small_models`), cuts it by
random masks, writes the result in every graph form, and compares ONNX Runtime's outputs with
torch's. `--tokens` cuts by token masks: of patches, of patches and widths, and of patches and
learned tokens that the head does not read. It also counts the nodes that move tokens by index
behind the stem, of which there must be none. A name is *exact* if every form of every mask differs
by less than 2e-5 of the largest value, *refused* if the error names the part without a rule,
*wrong* otherwise. Writes `results/graph_forms.json`, or `results/graph_forms_tokens.json`, and
resumes there.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import torch
from vitrim import StructuredMask, UnsupportedModel, compact, lift
from vitrim.compress.masks.token_sets import random_token_sets
from vitrim.compress.network.architecture import Architecture
from vitrim.compress.network.architecture_checks import pinned_tokens
from vitrim.compress.network.modules.model import CompactModel
from vitrim.export.forms import FORMS, Form, write_network
from vitrim.export.parity import model_outputs, relative_error

from ..results_file import RESULTS
from .result_rows import Row, coverage_rows, parsed
from .small_models import small

TOLERANCE = 2e-5
# The form that pnnx converts to ncnn, and one that fills up tiles.
MORE_FORMS = (
    Form(rows="batch", norm="layer", stream="dense", operators="pnnx"),
    Form(rows="batch", attention="split", tile=4),
)
WIDTHS = {"embed": 0.6, "head": 0.7, "qk": 0.5, "v": 0.5, "ffn": 0.5}
TOKENS, LEARNED = 0.4, 0.3
MASKS: dict[bool, dict[str, dict[str, Any]]] = {
    False: {
        "residual": {"keep_ratio": 0.5},
        "unshared": {"keep_ratio": 0.5, "sharing": "unshared"},
    },
    True: {
        "tokens": {"keep_ratio": {"token": TOKENS}},
        "tokens and widths": {"keep_ratio": {"token": TOKENS, **WIDTHS}},
    },
}


def main() -> None:
    """Print a line a name and the sums, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", action="store_true", help="token masks instead of width masks")
    parser.add_argument("--json", type=Path, help="the file to write")
    arguments = parsed(parser)
    tokens = arguments.tokens
    file = "graph_forms_tokens.json" if tokens else "graph_forms.json"
    coverage_rows(
        arguments.names,
        partial(examine, tokens=tokens),
        arguments.json or RESULTS / file,
        settings(tokens=tokens),
        again=arguments.again,
        until=arguments.until,
    )


def settings(*, tokens: bool) -> dict[str, Any]:
    """What the rows depend on."""
    forms = [form.name for form in (*FORMS, *MORE_FORMS)]
    return {"masks": MASKS[tokens], "learned": LEARNED if tokens else None, "forms": forms}


def masks(architecture: Architecture, *, tokens: bool) -> Iterator[tuple[str, StructuredMask]]:
    """The random masks of a network, by name."""
    for seed, (label, arguments) in enumerate(MASKS[tokens].items()):
        yield label, StructuredMask.random(architecture, seed=seed, **arguments)
    if tokens and architecture.prefix > pinned_tokens(architecture):
        generator = torch.Generator().manual_seed(2)
        sets = random_token_sets(architecture, TOKENS, generator, learned_ratio=LEARNED)
        yield "learned tokens", StructuredMask({"token": sets})


def examine(name: str, *, tokens: bool = False) -> Row:
    """Examine one name with width masks, or with token masks."""
    row = Row(name)
    try:
        lifted = lift(small(name))
        for label, mask in masks(lifted.architecture, tokens=tokens):
            _compare(compact(lifted, mask).eval(), row, label, tokens=tokens)
        if row.error > TOLERANCE or row.moves:
            row.result, row.reason = "wrong", f"{row.moves} moves by index behind the stem"
    except UnsupportedModel as error:
        row.result, row.reason = "refused", str(error)
    except Exception as error:  # any failure is a finding
        row.result, row.reason = "wrong", f"{type(error).__name__}: {error}"
    return row


def _compare(model: CompactModel, row: Row, label: str, *, tokens: bool) -> None:
    images = torch.randn(2, *model.architecture.image, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(images).numpy()
    for form in (*FORMS, *MORE_FORMS):
        graph = write_network(model, form)
        found = model_outputs(graph, images.numpy())
        row.add_error(label, float(relative_error(expected, found).max()))
        row.moves += moves(graph) if tokens else 0
        row.graphs += 1


def moves(graph: onnx.ModelProto) -> int:
    """Nodes behind the stem that move tokens by index."""
    computed, count = {"images"}, 0
    for node in graph.graph.node:
        if computed & set(node.input):
            computed |= set(node.output)
            by_index = node.op_type.startswith(("Gather", "Scatter"))
            count += by_index and not (node.name.startswith("stem.") or _spares_tokens(node))
    return count


def _spares_tokens(node: onnx.NodeProto) -> bool:
    """Whether channels are moved, or the keys and values that heads share in unequal groups."""
    axis = next((entry.i for entry in node.attribute if entry.name == "axis"), 0)
    return axis == -1 or node.name.endswith((".k.each", ".v.each"))


if __name__ == "__main__":
    main()
