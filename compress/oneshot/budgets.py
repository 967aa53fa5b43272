"""What a cut may cost: multiply-adds, parameters, bytes of a file, or a table of measured costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import torch

from ...core.errors import InputError
from ..network.architecture import Architecture, AttentionSpec, BranchSpec, FfnSpec
from ..network.count import branch_macs, branch_tokens, count_macs, count_params
from ..network.modules.branch import Branch
from ..network.modules.model import CompactModel
from .allocation import Cost, macs_cost, params_cost

Kind = Literal["macs", "params", "file", "cost"]
Precision = Literal["fp32", "fp16", "int8"]
SHARES = ("macs", "params")
# Names, shapes and graph around the weights, as files of ONNX Runtime have them.
FILE_BYTES, SUB_LAYER_BYTES = 4096, 1024
# The parts of a cost table: seconds per unit of each, see `table_cost`.
PARTS = (
    *("block", "projections", "attention products", "output", "ffn"),
    *("norms", "softmax", "activation", "weights"),
)


@dataclass(frozen=True)
class Budget:
    """How much a network may cost after the cut.

    Attributes:
        kind: "macs" or "params" for a share of the dense network, "file" for bytes, "cost" for the
            unit of `cost`.
        amount: The share, the bytes, or the cost of all sub-layers.
        cost: The cost of a sub-layer.
        precision: Of the weights in a file.
    """

    kind: Kind
    amount: float
    cost: Cost
    precision: Precision = "fp32"

    @property
    def custom(self) -> bool:
        """Whether only sub-layers have a cost."""
        return self.cost not in (macs_cost, params_cost) and self.kind != "file"

    def network(self, architecture: Architecture) -> float:
        """The cost of a whole network; of its sub-layers, for a cost of the caller's own."""
        if self.custom:
            return sum(
                self.cost(branch, architecture.embed, tokens, queries)
                for branch, tokens, queries in branch_tokens(architecture)
            )
        if self.kind == "file":
            return file_bytes(architecture, self.precision)
        return count_params(architecture) if self.kind == "params" else count_macs(architecture)

    def limit(self, dense: float) -> float:
        """The largest cost, for a dense network that costs `dense`."""
        return self.amount * dense if self.kind in SHARES else self.amount


def read_budget(
    given: Mapping[str, float | None],
    kind: Kind | None,
    cost: Cost | Mapping[str, float] | None,
    precision: Precision,
) -> Budget:
    """Validate a budget.

    Args:
        given: The values of `macs`, `params` and `budget`; exactly one is not None.
        kind: The kind of `budget`.
        cost: A cost of the caller's own, or the seconds of the parts of a cost table.
        precision: Of the weights in a file.

    Raises:
        InputError: None or several are given, or one is out of range.
    """
    named = {name: value for name, value in given.items() if value is not None}
    if len(named) != 1 or ("budget" in named) != (kind is not None):
        raise InputError(
            "trim: give one budget, macs or params, as the share to keep, such as 0.7; "
            "or budget and its kind (macs, params, file, cost)"
        )
    [(name, amount)] = named.items()
    if kind is None:
        kind = "params" if name == "params" else "macs"
    if kind not in get_args(Kind):
        raise InputError(f"trim: kind = {kind!r}: choose {', '.join(get_args(Kind))}")
    if kind in SHARES and not 0 < amount < 1:
        raise InputError(f"trim: {kind} = {amount}: give the share to keep, between 0 and 1")
    if kind == "file" and amount <= 1:
        raise InputError(f"trim: file = {amount}: give the size of the file in bytes")
    if amount <= 0:
        raise InputError(f"trim: cost = {amount}: give a number above 0")
    if precision not in get_args(Precision):
        raise InputError(f"trim: precision = {precision!r}: choose fp32, fp16 or int8")
    if isinstance(cost, Mapping):
        cost = table_cost(cost)
    if kind == "cost" and cost is None:
        raise InputError("trim: kind = 'cost' needs options.cost: a function or a cost table")
    if kind == "file":
        return Budget(kind, amount, bytes_cost(precision), precision)
    return Budget(kind, amount, cost or (macs_cost if kind == "macs" else params_cost))


def file_bytes(architecture: Architecture, precision: Precision) -> int:
    """The computed size of a file with the weights of a network.

    fp32: four bytes a parameter; fp16: two; int8: one a number of the matrices of the sub-layers
    and five an output of each (its scale and zero point), four a number elsewhere. Plus a fixed
    size for the file and for each sub-layer.
    """
    with torch.device("meta"):
        model = CompactModel(architecture)
    total = float(FILE_BYTES)
    for name, parameter in model.named_parameters():
        inside = name.startswith("steps.")
        total += _bytes(parameter, precision if inside or precision == "fp16" else "fp32")
    return round(total + SUB_LAYER_BYTES * len(architecture.branches))


def bytes_cost(precision: Precision) -> Cost:
    """The cost of a sub-layer in bytes of a file."""

    def cost(branch: BranchSpec, embed: int, tokens: int, queries: int) -> float:
        del tokens, queries
        return SUB_LAYER_BYTES + _branch_bytes(branch, embed, precision)

    return cost


@lru_cache(maxsize=65536)
def _branch_bytes(branch: BranchSpec, embed: int, precision: Precision) -> float:
    with torch.device("meta"):
        return sum(_bytes(each, precision) for each in Branch(branch, embed).parameters())


def _bytes(parameter: torch.Tensor, precision: Precision) -> float:
    if precision == "int8":
        matrix = parameter.ndim == 2
        return parameter.numel() + 5 * len(parameter) if matrix else 4 * parameter.numel()
    return parameter.numel() * (2 if precision == "fp16" else 4)


def table_cost(seconds: Mapping[str, float]) -> Cost:
    """The latency of a sub-layer in milliseconds, by a fitted cost table.

    Args:
        seconds: The `costs_s` of a cost table of `vitrim bench --cost-table`: seconds per unit of
            each part of a block. A sub-layer has half of the fixed cost of its block.

    Raises:
        InputError: A part is missing, or negative.
    """
    for part in PARTS:
        if not seconds.get(part, -1.0) >= 0:
            raise InputError(
                f"cost table: {part!r} needs a number of seconds, 0 or more; give the costs_s of a "
                "table that `vitrim bench --cost-table` measured"
            )

    def cost(branch: BranchSpec, embed: int, tokens: int, queries: int) -> float:
        units = _parts(branch, embed, tokens, queries)
        return 1e3 * sum(seconds[part] * count for part, count in units.items())

    return cost


def _parts(branch: BranchSpec, embed: int, tokens: int, queries: int) -> dict[str, float]:
    core = branch.core
    if isinstance(core, FfnSpec):
        macs = branch_macs(branch, embed, tokens, queries)
        return {
            "block": 0.5,
            "ffn": macs,
            "norms": queries * embed,
            "activation": queries * core.hidden,
            "weights": macs / queries,
        }
    if not isinstance(core, AttentionSpec):
        return {}
    keys, values = core.kv_heads * core.parts * core.qk, core.kv_heads * core.v
    queried, read = core.heads * core.parts * core.qk, core.heads * core.v
    return {
        "block": 0.5,
        "projections": embed * (queries * queried + tokens * (keys + values)),
        "attention products": tokens * queries * (queried + read),
        "output": queries * read * embed,
        "norms": tokens * embed,
        "softmax": tokens * queries * core.heads * core.parts,
        "weights": embed * (queried + keys + values + read),
    }
