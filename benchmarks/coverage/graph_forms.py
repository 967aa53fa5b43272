"""Which of timm's plain Vision Transformers the ONNX graph forms compute exactly, dense and cut.

`python -m benchmarks.coverage.graph_forms` builds every name small (`small_models`), cuts it by
random masks, writes the result in every graph form, and compares ONNX Runtime's outputs with
torch's. `--tokens` cuts by token masks, alone and together with widths, and also counts the
nodes that move tokens by index behind the stem, of which there must be none. A name is *exact* if
every form of every mask differs by less than 2e-5 of the largest value, *refused* if the error
names the part without a rule, *wrong* otherwise. Writes `results/graph_forms.json`, or
`results/graph_forms_tokens.json`.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from vitrim import StructuredMask, UnsupportedModel, compact, lift
from vitrim.compress.network.modules.model import CompactModel
from vitrim.export.forms import FORMS, Form, write_network
from vitrim.export.parity import model_outputs, relative_error

from ..results_file import RESULTS, save_result
from .small_models import names, small

TOLERANCE = 2e-5
# The form that pnnx converts to ncnn, and one that fills up tiles.
MORE_FORMS = (
    Form(rows="batch", norm="layer", stream="dense", operators="pnnx"),
    Form(rows="batch", attention="split", tile=4),
)
WIDTHS = {"embed": 0.6, "head": 0.7, "qk": 0.5, "v": 0.5, "ffn": 0.5}
MASKS: dict[bool, tuple[dict[str, Any], ...]] = {
    False: ({"keep_ratio": 0.5}, {"keep_ratio": 0.5, "sharing": "unshared"}),
    True: ({"keep_ratio": {"token": 0.4}}, {"keep_ratio": {"token": 0.4, **WIDTHS}}),
}


@dataclass
class Row:
    """One name."""

    name: str
    result: str = "exact"
    reason: str = ""
    error: float = 0.0
    graphs: int = 0
    moves: int = 0
    seconds: float = 0.0


def main() -> None:
    """Print a line a name and the sums, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="names to examine (default: all)")
    parser.add_argument(
        "--tokens",
        action="store_true",
        help="random token masks, alone and with widths, instead of width masks",
    )
    parser.add_argument("--json", type=Path, help="the file to write")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    file = "graph_forms_tokens.json" if arguments.tokens else "graph_forms.json"
    rows: list[Row] = []
    for name in arguments.names or names():
        row = examine(name, tokens=arguments.tokens)
        rows.append(row)
        content = {"schema": "vitrim.graph_forms/1", "rows": [asdict(row) for row in rows]}
        save_result(arguments.json or RESULTS / file, content)
        print(
            f"{row.name:52s} {row.result:8s} {row.error:.1e} ({row.graphs} graphs, "
            f"{row.seconds:.1f} s) {row.reason[:100]}",
            flush=True,
        )
    print(dict(Counter(row.result for row in rows)), "of", len(rows))


def examine(name: str, *, tokens: bool = False) -> Row:
    """Examine one name with width masks, or with token masks."""
    start, row = time.perf_counter(), Row(name)
    try:
        lifted = lift(small(name))
        for seed, settings in enumerate(MASKS[tokens]):
            mask = StructuredMask.random(lifted, seed=seed, **settings)
            _compare(compact(lifted, mask).eval(), row, tokens=tokens)
        if row.error > TOLERANCE or row.moves:
            row.result, row.reason = "wrong", f"{row.moves} moves by index behind the stem"
    except UnsupportedModel as error:
        row.result, row.reason = "refused", str(error)
    except Exception as error:  # any failure is a finding
        row.result, row.reason = "wrong", f"{type(error).__name__}: {error}"
    row.seconds = time.perf_counter() - start
    return row


def _compare(model: CompactModel, row: Row, *, tokens: bool) -> None:
    images = torch.randn(2, *model.architecture.image, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(images).numpy()
    for form in (*FORMS, *MORE_FORMS):
        graph = write_network(model, form)
        error = float(relative_error(expected, model_outputs(graph, images.numpy())).max())
        row.error = max(row.error, error if error == error else float("inf"))
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
