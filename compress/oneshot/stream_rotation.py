"""An exact change of basis of the residual stream, so that its last channels matter least.

LayerNorm is turned into RMSNorm first: its scale and offset move into the layers that read it, and
every layer that writes to the stream loses its mean over channels, so that the stream has mean zero
and LN(x) = x / rms(x). RMSNorm commutes with an orthogonal Q: readers become W Q, writers Qᵀ W. The
basis is that of the principal components of all updates, each weighted by the sensitivity of its
depth, so that the lost variance of the removed directions predicts the error of the features.

After a cut to d' of d channels the norms divide by rms over d' channels. `rescaled_norms` restores
the divisor of the whole stream, sqrt(sum / d).

References:
    Ashkboos et al. 2024, "SliceGPT: Compress Large Language Models by Deleting Rows and Columns",
    section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from ...core.errors import InputError
from ..lift import lift
from ..network.architecture import Architecture, BranchSpec, NormSpec
from ..network.modules.branch import Branch
from ..network.modules.layers import Norm
from ..network.modules.model import CompactModel, build
from .sensitivity import WEIGHING_IMAGES, stream_weights
from .stream import Activations, Stream

LINEAR_POOLS = ("token", "mean", "mean_all", "token_mean", "distilled", "dense", "attention")
READERS = {
    "attention": {"q": "q_bias", "k": "k_bias", "v": "v_bias", "gate": "gate_bias"},
    "ffn": {"fc1": "in_bias", "gate": "gate_bias"},
}
WRITERS = {"attention": "out", "ffn": "fc2"}
State = dict[str, Tensor]
Readback = Callable[[Tensor], Tensor]


@torch.inference_mode(False)
def rotate_stream(
    model: nn.Module, images: Tensor, *, progress: Callable[[], None] | None = None
) -> CompactModel:
    """Turn the residual stream into the basis in which removing its last channels costs least.

    Args:
        model: A supported Vision Transformer with a head, or a `CompactModel`; it is not modified.
        images: Some hundred unlabeled images, (images, channels, height, width), normalized as the
            model expects.
        progress: Called after every step of the network.

    Returns:
        A network with the same function (fp32, relative 1e-5) and shapes, with RMSNorm in place of
        LayerNorm. The channels of its stream are ordered by falling importance.

    Raises:
        InputError: The images do not fit, or something in the network does not commute with a
            rotation; the message names it.
        UnsupportedModel: A module has no rule; the message names its path.

    References:
        Ashkboos et al. 2024, "SliceGPT", section 3.
    """
    source = lift(model).eval()
    source.architecture.require_no_selects("rotate_stream")
    obstacle = stream_obstacle(source.architecture)
    if obstacle is not None:
        raise InputError(f"the residual stream cannot be rotated: {obstacle}")
    weights = stream_weights(source, images[:WEIGHING_IMAGES])
    stream, moment = Stream(source, images), StreamMoment(source.architecture)
    moment.add_stem(stream, weights[0])
    while not stream.finished:
        moment.weight = weights[stream.position + 1]
        stream.advance(moment.add)
        if progress is not None:
            progress()
    return turned_stream(source, principal_basis(moment.total)[0])


class StreamMoment:
    """The second moment of everything that is written to the stream, weighted by sensitivity."""

    def __init__(self, architecture: Architecture) -> None:
        self.total = torch.zeros(architecture.embed, architecture.embed, dtype=torch.float64)
        self.weight = 1.0
        self._rows = 1
        self._centered = centers(architecture)

    def add_stem(self, stream: Stream, weight: float) -> None:
        """Add what the stem writes."""
        self._rows = sum(x.shape[0] * x.shape[1] for x in stream.batches)
        for x in stream.batches:
            self._add(x, weight)

    def add(self, branch: Branch, seen: Activations) -> None:
        """Add one batch of the update of a sub-layer, weighted by `weight`."""
        if branch.writes is None:
            self._add(seen.update, self.weight)

    def _add(self, update: Tensor, weight: float) -> None:
        if self._centered:
            update = update - update.mean(dim=-1, keepdim=True)
        rows = update.flatten(0, 1)
        self.total += (weight / self._rows) * (rows.T @ rows).double()


def principal_basis(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors as columns, (width, width), and eigenvalues (width,), both by falling value."""
    values, vectors = torch.linalg.eigh(moment)
    return vectors.flip(1), values.flip(0).clamp(min=0)


def centers(architecture: Architecture) -> bool:
    """Whether the norms on the stream subtract the mean over channels."""
    return any(norm.kind == "layer" for _, norm in _stream_norms(architecture))


def stream_obstacle(architecture: Architecture) -> str | None:
    """What does not commute with a rotation of the stream, or None."""
    for label in ("patch_norm", "stem_norm"):
        if getattr(architecture, label) is not None:
            return f"{label}, a norm in the stem, scales single channels before they are added"
    for label in ("stem_writes", "head_reads"):
        if getattr(architecture, label) is not None:
            return f"{label}: only some channels of the stream are used there"
    kinds = {norm.kind for _, norm in _stream_norms(architecture)}
    if len(kinds) > 1:
        return "some norms are LayerNorm and others RMSNorm"
    for branch in architecture.branches:
        if branch.post_norm is not None:
            return f"{branch.name}.post_norm scales single channels before they are added"
        if branch.reads is not None or branch.writes is not None:
            return f"{branch.name} uses only some channels of the stream"
        if branch.norm is None and branch.core.kind != "constant" and "layer" in kinds:
            return f"{branch.name} reads the stream without a norm, so its mean matters"
    return _head_obstacle(architecture)


def _head_obstacle(architecture: Architecture) -> str | None:
    pool = architecture.pool
    if architecture.head is None and pool.kind != "attention":
        return "the network has no head into which the basis of the features could be folded"
    if pool.kind not in LINEAR_POOLS or pool.refine is not None:
        return f"the pooling ({'refine' if pool.refine else pool.kind}) works on single channels"
    if pool.kind == "attention":
        return None
    if architecture.pool_norm is not None and architecture.norm is not None:
        return "norm and pool_norm follow each other, and only one of them can be folded"
    if architecture.pool_norm is not None and pool.kind == "token_mean":
        return "pool_norm runs over two concatenated vectors"
    if architecture.norm is None and architecture.pool_norm is None and centers(architecture):
        return "the head reads the stream without a norm, so its mean matters"
    return None


def _stream_norms(architecture: Architecture) -> list[tuple[str, NormSpec]]:
    """The norms that read the stream, or its mean over tokens."""
    found = [(branch.name, branch.norm) for branch in architecture.branches]
    found.append(("norm", architecture.norm))
    if architecture.pool.kind != "attention":
        found.append(("pool_norm", architecture.pool_norm))
    return [(name, norm) for name, norm in found if norm is not None]


def turned_stream(model: CompactModel, basis: Tensor) -> CompactModel:
    """The same function with the stream in another basis.

    Args:
        model: A network without `stream_obstacle`; it is not modified.
        basis: Orthogonal, (embed, embed); its columns are the new channels.

    Returns:
        A network with RMSNorm of scale 1, for any cut of its last channels.
    """
    state = {name: each.detach().double() for name, each in model.state_dict().items()}
    architecture, kept = model.architecture, next(iter(model.parameters()))
    turning = _Turning(state, basis.double(), centers(architecture))
    steps = tuple(
        tuple(
            turning.branch(f"steps.{number}.{position}.", branch)
            for position, branch in enumerate(step)
        )
        for number, step in enumerate(architecture.steps)
    )
    changed = {"steps": steps, **turning.stem(architecture), **turning.head(architecture)}
    changed["stream_rotated"] = True
    new = Architecture.model_validate(
        architecture.model_copy(update=changed).model_dump(by_alias=True)
    )
    result = build(new, {name: each.to(kept.dtype) for name, each in state.items()})
    return result.train(model.training)


class _Turning:
    """Folds norms, means and a basis into the tensors of `state`, in place."""

    def __init__(self, state: State, basis: Tensor, centered: bool) -> None:
        self.state, self.basis = state, basis
        # Writers: Qᵀ (I - 1 1ᵀ / d).
        self.written = basis.T
        if centered:
            self.written = basis.T - basis.T.mean(dim=1, keepdim=True)

    def branch(self, prefix: str, spec: BranchSpec) -> BranchSpec:
        """Turn one sub-layer, whose parameters are named `prefix` + leaf."""
        core, kind = spec.core, spec.core.kind
        if kind in READERS:
            weight, offset = self._norm(f"{prefix}norm", spec.norm)
            names = [name for name in READERS[kind] if f"{prefix}core.{name}.weight" in self.state]
            for name in names:
                self._read(f"{prefix}core.{name}", weight, offset)
            if offset is not None:
                biases = {READERS[kind][name]: True for name in names}
                core = core.model_copy(update=biases)
        scale = self.state.pop(f"{prefix}layer_scale", None)
        leaf = WRITERS.get(kind)
        names = ["core.value"] if leaf is None else [f"core.{leaf}.weight", f"core.{leaf}.bias"]
        for name in names:
            tensor = self.state.get(prefix + name)
            if tensor is not None:
                if scale is not None:
                    tensor = tensor * (scale if tensor.ndim == 1 else scale[:, None])
                self.state[prefix + name] = self.written @ tensor
        norm = rms_norm(spec.norm)
        return spec.model_copy(update={"core": core, "norm": norm, "layer_scale": False})

    def stem(self, architecture: Architecture) -> dict[str, object]:
        """Turn what the stem writes."""
        weight = self.state["stem.weight"]
        self.state["stem.weight"] = (self.written @ weight.flatten(1)).view_as(weight)
        if "stem.bias" in self.state:
            self.state["stem.bias"] = self.written @ self.state["stem.bias"]
        for name in ("prefix", "position"):
            if name in self.state:
                self.state[name] = self.state[name] @ self.written.T
        return {"stream_width": None, "stream_channels": None}

    def head(self, architecture: Architecture) -> dict[str, object]:
        """Fold the last norm and the basis into what reads the features."""
        pooled = architecture.pool.kind == "attention"
        label = "norm" if architecture.norm is not None or pooled else "pool_norm"
        spec = getattr(architecture, label)
        weight, offset = self._norm(label, spec)
        changed: dict[str, object] = {label: rms_norm(spec)}
        if pooled:
            attention = architecture.pool.attention
            assert attention is not None
            for name in ("pool.k", "pool.v"):
                self._read(name, weight, offset)
            if offset is not None:
                attention = attention.model_copy(update={"k_bias": True, "v_bias": True})
            changed["pool"] = architecture.pool.model_copy(update={"attention": attention})
            return changed
        head = architecture.head
        assert head is not None
        for name in ("pre_head",) if head.hidden else ("head", "head_dist"):
            if f"{name}.weight" in self.state:
                self._read(name, weight, offset, architecture.pool.kind == "token_mean")
        if offset is not None and not head.hidden:
            changed["head"] = head.model_copy(update={"bias": True})
        return changed

    def _norm(self, name: str, spec: NormSpec | None) -> tuple[Tensor | None, Tensor | None]:
        """The scale and offset of a norm, whose scale becomes 1."""
        weight = self.state.pop(f"{name}.weight", None)
        offset = self.state.pop(f"{name}.bias", None)
        if spec is not None:
            self.state[f"{name}.weight"] = torch.ones(spec.width, dtype=torch.float64)
        return weight, offset

    def _read(
        self, name: str, weight: Tensor | None, offset: Tensor | None, twice: bool = False
    ) -> None:
        """Fold scale, offset and basis into a linear layer; `twice` for concatenated features."""
        matrix = self.state[f"{name}.weight"]
        halves = matrix.chunk(2, dim=1) if twice else (matrix,)
        if offset is not None:
            old = self.state.get(f"{name}.bias", matrix.new_zeros(len(matrix)))
            self.state[f"{name}.bias"] = old + sum(half @ offset for half in halves)
        if weight is not None:
            halves = tuple(half * weight for half in halves)
        self.state[f"{name}.weight"] = torch.cat([half @ self.basis for half in halves], dim=1)


def rms_norm(spec: NormSpec | None) -> NormSpec | None:
    """The RMSNorm of scale 1 in place of a norm."""
    return spec and spec.model_copy(update={"kind": "rms", "weight": True, "bias": False})


def rescaled_norms(model: CompactModel, width: int) -> CompactModel:
    """Norms of a cut, rotated network that divide by the root of sum / `width`.

    Args:
        model: A network that `turned_stream` returned, cut to fewer channels; it is not modified.
        width: Channels of the stream before the cut.

    Returns:
        A network of the same shapes: x / sqrt(sum(x²) / width + eps) behind each norm.
    """
    architecture, ratio = model.architecture, width / model.architecture.embed
    names = {
        "norm" if architecture.norm is not None else "pool_norm",
        *(
            f"steps.{number}.{position}.norm"
            for number, step in enumerate(architecture.steps)
            for position, branch in enumerate(step)
            if branch.norm is not None
        ),
    }
    state = {
        name: each.detach() * (ratio**0.5 if name.removesuffix(".weight") in names else 1.0)
        for name, each in model.state_dict().items()
    }

    def eps(norm: NormSpec | None) -> NormSpec | None:
        return norm and norm.model_copy(update={"eps": norm.eps * ratio})

    steps = tuple(
        tuple(branch.model_copy(update={"norm": eps(branch.norm)}) for branch in step)
        for step in architecture.steps
    )
    update: dict[str, object] = {"steps": steps}
    for label in {"norm", "pool_norm"} & names:
        update[label] = eps(getattr(architecture, label))
    return build(architecture.model_copy(update=update), state).train(model.training)


def readbacks(source: CompactModel, basis: Tensor) -> tuple[Readback, Readback]:
    """Functions that map features of a rotated network to those of its source.

    Args:
        source: The network before `turned_stream`.
        basis: The kept columns of the basis, (embed, channels).

    Returns:
        For the pooled features, (batch, vectors * channels) -> (batch, vectors * embed), and for
        the normalized patch tokens, (..., channels) -> (..., embed).
    """
    architecture = source.architecture
    pooled = architecture.pool.kind == "attention"
    norm = source.pool_norm if source.norm is None and not pooled else source.norm
    norm = cast("Norm | None", norm)
    columns = basis.T.to(next(source.parameters()))

    def read(values: Tensor) -> Tensor:
        parts = torch.unflatten(values, -1, (-1, columns.shape[0])) @ columns
        if norm is not None and norm.weight is not None:
            parts = parts * norm.weight.detach()
        if norm is not None and norm.bias is not None:
            parts = parts + norm.bias.detach()
        return parts.flatten(-2)

    def same(values: Tensor) -> Tensor:
        return values

    return (
        same if pooled else read,
        read if source.norm is not None else lambda values: values @ columns,
    )
