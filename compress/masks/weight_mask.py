"""`WeightMask`: which single weights of a network are kept; the others are zero and stay zero."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...core.errors import InputError
from ..lift import lift
from ..network.files import MAX_PARAMETERS, WEIGHT_MASK, mask_metadata, require_header
from ..network.modules.model import CompactModel
from .mask_files import require_mask_file, write_masks
from .weight_choice import Granularity, Ranking, WeightOptions, WeightScope, kept_weights

SCHEMA: Literal["vitrim.weight-mask/1"] = "vitrim.weight-mask/1"


class _Header(BaseModel):
    """The metadata of the file; every key is validated."""

    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=True)

    schema_: Literal["vitrim.weight-mask/1"] = Field(alias="schema")
    model: str = Field(pattern=r"^[0-9a-f]{64}$")
    shapes: dict[str, Annotated[list[Annotated[int, Field(gt=0)]], Field(min_length=1)]]
    note: dict[str, str]


@dataclass(frozen=True)
class WeightMask:
    """Booleans, True = keep, over single weights of a network.

    Attributes:
        kept: `kept[parameter]`, a boolean tensor of the shape of the parameter. A parameter without
            an entry is kept whole.
        model: `network_fingerprint` of the network that it is for.
        note: How the mask was made, as text by key; saved with it, and otherwise unused.

    Raises:
        InputError: An entry is not boolean or empty, or the fingerprint is none.
    """

    kept: Mapping[str, Tensor]
    model: str
    note: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.model) != 64 or set(self.model) - set("0123456789abcdef"):
            raise InputError(f"weight mask: {self.model[:80]!r} is no fingerprint of a network")
        for name, keep in self.kept.items():
            if keep.dtype != torch.bool:
                raise InputError(f"weight mask {name} is {keep.dtype}, not boolean")
            if not keep.ndim or not keep.numel():
                raise InputError(f"weight mask {name} has shape {tuple(keep.shape)}")

    @property
    def total(self) -> int:
        """The number of weights that the entries cover."""
        return sum(keep.numel() for keep in self.kept.values())

    @property
    def zeros(self) -> int:
        """The number of weights that are not kept."""
        return self.total - sum(int(keep.sum()) for keep in self.kept.values())

    @property
    def sparsity(self) -> float:
        """The share of the covered weights that are not kept, 0 to 1."""
        return self.zeros / self.total if self.kept else 0.0

    @classmethod
    def from_magnitude(
        cls,
        model: nn.Module,
        sparsity: float = 0.9,
        *,
        granularity: Granularity = "weight",
        ranking: Ranking = "global",
        scope: WeightScope = "all",
        within: WeightMask | None = None,
        seed: int = 0,
    ) -> WeightMask:
        """Keep the weights of the largest magnitude in the matrices of the sub-layers.

        Args:
            model: A supported Vision Transformer, or a `CompactModel`. It is not changed.
            sparsity: The share of the weights in `scope` that become zero, between 0 and 1
                (default 0.9).
            granularity: Single weights ("weight"), or whole rows ("row") or columns ("column") of
                matrices, by their mean square; as many as fit into `sparsity`.
            ranking: Against each other over all matrices ("global"), or the same share in each of
                them ("layerwise"). "random": each matrix has the share of "global", of weights
                drawn at random. "shuffled": these shares also change places among matrices of
                equal size.
            scope: The matrices of attentions ("attention"), of FFNs ("ffn"), or both ("all").
            within: A mask whose zeros stay zero, for iterative pruning (default: none).
            seed: For "random" and "shuffled".

        Returns:
            A mask that fits what `vitrim.lift` makes of the model.

        Raises:
            InputError: An option is out of range, or `within` has more zeros already.
            UnsupportedModel: A module has no rule; the message names its path.

        References:
            Kolev et al., "Evaluating Neural Network Pruning Techniques on Vision Transformers".
            Frankle et al. 2021, "Pruning Neural Networks at Initialization: Why Are We Missing the
            Mark?" (masks shuffled within layers).
        """
        options = WeightOptions(sparsity, granularity, ranking, scope, seed)
        network = lift(model)
        if within is not None:
            within.check(network)
        return next_mask(network, options, within)

    def check(self, network: nn.Module) -> None:
        """Validate the mask against a network.

        Raises:
            InputError: It is the mask of another network; the message names the first difference.
        """
        shapes = {name: tuple(weight.shape) for name, weight in network.named_parameters()}
        for name, keep in self.kept.items():
            if name not in shapes:
                raise InputError(f"weight mask {name}: the network has no such parameter")
            if tuple(keep.shape) != shapes[name]:
                raise InputError(
                    f"weight mask {name} has shape {list(keep.shape)}, the network has "
                    f"{list(shapes[name])}"
                )
        if self.model != network_fingerprint(network):
            raise InputError(
                "weight mask: made for a network with other parameters; make one of this network "
                "with WeightMask.from_magnitude"
            )

    def apply(self, network: nn.Module) -> None:
        """Set the weights of a network that are not kept to zero, in place."""
        weights = dict(network.named_parameters())
        with torch.no_grad():
            for name, keep in self.kept.items():
                weights[name].masked_fill_(~keep.to(weights[name].device), 0.0)

    def zeroed(self, model: nn.Module) -> CompactModel:
        """A copy of a model in which the weights that are not kept are zero.

        Args:
            model: A supported Vision Transformer, or a `CompactModel`.

        Returns:
            The network, in the mode of `model`. Shapes: (batch, channels, height, width) ->
            (batch, classes).

        Raises:
            InputError: The mask is of another network.
        """
        network = copy.deepcopy(lift(model))
        self.check(network)
        self.apply(network)
        network.train(model.training)
        return network

    def save(self, path: Path | str) -> None:
        """Write a safetensors file: one bit a weight. Equal masks result in equal files.

        Args:
            path: The file to write or to replace.

        Raises:
            InputError: The file cannot be written, or exists and is no mask of weights.
        """
        bits = {name: _packed(keep) for name, keep in self.kept.items()}
        header = {
            "schema": SCHEMA,
            "model": self.model,
            "shapes": {name: list(keep.shape) for name, keep in self.kept.items()},
            "note": dict(self.note),
        }
        write_masks(path, bits, header, WEIGHT_MASK)

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read a file that `save` wrote.

        Args:
            path: The file, which may be untrusted.

        Returns:
            The mask; whether it fits a network is validated by `check`.

        Raises:
            InputError: There is no such file, or it is not a valid mask; the message names the
                file and the entry.
        """
        path = require_mask_file(path, "weight mask")
        require_header(path)
        try:
            with safe_open(path, framework="pt") as file:
                header = _header(path, file.metadata())
                kept = {
                    name: _read(path, file, name, shape)
                    for name, shape in _listed(path, header, file.keys()).items()
                }
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"{path}: not a whole weight mask ({str(error)[:200]})") from error
        return cls(kept, header.model, header.note)


def next_mask(
    network: CompactModel, options: WeightOptions, within: WeightMask | None = None
) -> WeightMask:
    """The mask of a network's present weights, as `WeightMask.from_magnitude` chooses it.

    Args:
        network: The network.
        options: How weights are chosen.
        within: The mask before, whose zeros stay zero.

    Returns:
        The mask, for this very network.
    """
    before = None if within is None else within.kept
    kept = kept_weights(network.architecture, parameters(network), options, before)
    return WeightMask(kept, network_fingerprint(network), options.note())


def parameters(network: nn.Module) -> dict[str, Tensor]:
    """The parameters of a network by name, without their gradients."""
    return {name: weight.detach() for name, weight in network.named_parameters()}


def network_fingerprint(network: nn.Module) -> str:
    """SHA-256 of the names and shapes of all parameters: it stays while the network is trained."""
    lines = sorted(f"{name} {list(weight.shape)}" for name, weight in network.named_parameters())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _packed(keep: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(keep.cpu().numpy().reshape(-1)))


def _header(path: Path, metadata: Mapping[str, str] | None) -> _Header:
    try:
        return _Header.model_validate(mask_metadata(path, metadata, SCHEMA, WEIGHT_MASK))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part)[:80] for part in first["loc"]) or "top level"
        raise InputError(f"{path}: {where}: {first['msg']}") from None


def _listed(path: Path, header: _Header, names: Iterable[str]) -> dict[str, list[int]]:
    """The shapes of all entries; the tensors of the file are the same, and not too many."""
    different = sorted(set(names) ^ set(header.shapes))
    if different:
        raise InputError(f"{path}: entry {different[0][:80]!r} has a shape or bits, but not both")
    total = sum(math.prod(shape) for shape in header.shapes.values())
    if total > MAX_PARAMETERS:
        raise InputError(f"{path}: describes {total} weights, more than the {MAX_PARAMETERS}")
    return header.shapes


def _read(path: Path, file: Any, name: str, shape: list[int]) -> Tensor:
    count = math.prod(shape)
    part = file.get_slice(name)
    if part.get_dtype() != "U8" or list(part.get_shape()) != [-(-count // 8)]:
        raise InputError(
            f"{path}: entry {name[:80]!r} is {part.get_dtype()} {part.get_shape()}, but the bits "
            f"of {shape} are U8 [{-(-count // 8)}]"
        )
    bits = np.unpackbits(file.get_tensor(name).numpy())
    if bits[count:].any():
        raise InputError(f"{path}: entry {name[:80]!r} has bits behind its last weight")
    return torch.from_numpy(bits[:count].astype(bool)).reshape(shape)
