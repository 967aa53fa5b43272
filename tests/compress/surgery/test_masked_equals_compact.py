"""Masked equals compact, in outputs and in gradients, over random architectures and masks."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import HealthCheck, assume, given, reject, settings
from hypothesis import strategies as st
from random_networks import architectures, network
from vitrim import InputError, StructuredMask, compact, masked
from vitrim.compress.network.architecture import Architecture, ConstantSpec
from vitrim.compress.surgery.compactor import cut
from vitrim.compress.surgery.plan import Plan, plan

# Double precision, so that only rounding differs.
CLOSE = 1e-9


@st.composite
def masks(draw: Any, architecture: Architecture) -> StructuredMask:
    """A random mask, in some draws without any head, value or hidden unit of a sub-layer."""
    ratio = draw(st.sampled_from([0.15, 0.4, 0.7, 0.9]))
    dimensions = draw(
        st.sets(st.sampled_from(["embed", "head", "qk", "v", "ffn", "block", "token"]), min_size=1)
    )
    if architecture.pool.kind == "none":
        dimensions.discard("token")
    sharing = draw(st.sampled_from(["unshared", "residual", "full"]))
    settled = {
        "per_head": draw(st.booleans()),
        "scale": draw(st.sampled_from(["kept", "original"])),
        "seed": draw(st.integers(0, 99)),
    }
    try:
        mask = StructuredMask.random(
            architecture, dict.fromkeys(dimensions, ratio), sharing, **settled
        )
    except InputError:
        # Blocks of different sizes cannot share one mask.
        mask = StructuredMask.random(
            architecture, dict.fromkeys(dimensions, ratio), "residual", **settled
        )
    empty = draw(st.sampled_from([None, None, "head", "v", "ffn"]))
    mask = _without(mask, empty) if empty else mask
    try:
        mask.check(architecture)
    except InputError as error:
        # A reader of few channels may keep none, which is refused.
        if "channels that there are at" not in str(error):
            raise
        reject()
    return mask


def _without(mask: StructuredMask, empty: str) -> StructuredMask:
    kept = {dimension: dict(entries) for dimension, entries in mask.kept.items()}
    for site, keep in kept.get(empty, {}).items():
        if not site.startswith("pool."):
            kept[empty][site] = torch.zeros_like(keep)
            break
    return StructuredMask(kept, scale=mask.scale)


@settings(
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(st.data())
def test_masked_equals_compact_in_outputs_and_gradients(data: Any) -> None:
    architecture = data.draw(architectures())
    mask = data.draw(masks(architecture))
    model = network(architecture)
    images = torch.randn(
        2, *architecture.image, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    reference, small = masked(model, mask), compact(model, mask)
    wanted, found = reference(images), small(images)
    assert found.shape == wanted.shape
    assert torch.allclose(
        found, wanted, rtol=CLOSE, atol=CLOSE * float(wanted.detach().abs().max().clamp(min=1))
    )

    surgery = plan(architecture, mask)
    if any(isinstance(branch.core, ConstantSpec) for branch in surgery.architecture.branches):
        # Constants are folded into biases, which are then sums of parameters.
        return
    weights = torch.randn(
        wanted.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )
    (wanted * weights).sum().backward()
    (found * weights).sum().backward()
    grads = {name: _grad(parameter) for name, parameter in reference.network.named_parameters()}
    expected = cut(surgery, grads)
    largest = max([1.0, *(float(grad.abs().max()) for grad in grads.values())])
    for name, parameter in small.named_parameters():
        found, wanted = _grad(parameter), expected[name]
        shared = _was_shared(surgery, name, grads)
        if shared is not None:
            # A weight of all heads has become one per head: its gradient is the sum over heads.
            source, index = shared
            found, wanted = (
                torch.zeros_like(source).index_add(0, index.flatten(), found.flatten()),
                source,
            )
        assert torch.allclose(found, wanted, rtol=CLOSE, atol=CLOSE * largest), name


def _was_shared(
    surgery: Plan, name: str, grads: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The old gradient of a weight that was split between heads, and the entries of each head."""
    if name.startswith("steps."):
        _, number, position, leaf = name.split(".", 3)
        branch = surgery.branches[int(number)][int(position)]
        old, slices = f"steps.{branch.step}.{branch.position}.{leaf}", branch.slices.get(leaf, ())
    else:
        old, slices = name, surgery.outer.get(name, ())
    index = slices[-1] if slices else None
    return (
        (grads[old], index)
        if index is not None and index.ndim == 2 and grads[old].ndim == 1
        else None
    )


# Most random networks pool over all tokens and are skipped.
@settings(
    max_examples=10,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.filter_too_much,
    ],
)
@given(st.data())
def test_the_last_block_may_compute_only_the_tokens_that_are_read(data: Any) -> None:
    architecture = data.draw(architectures())
    assume(architecture.pooled_prefix)
    mask = data.draw(masks(architecture))
    model = network(architecture)
    images = torch.randn(2, *architecture.image, dtype=torch.float64)
    whole, fewer = compact(model, mask, last_queries=False), compact(model, mask, last_queries=True)
    assert torch.allclose(fewer(images), whole(images), rtol=CLOSE, atol=CLOSE)


@settings(
    max_examples=10,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(st.data())
def test_json_preserves_an_architecture(data: Any) -> None:
    architecture = data.draw(architectures())
    cut_down = compact(network(architecture), data.draw(masks(architecture))).architecture
    for one in (architecture, cut_down):
        assert Architecture.model_validate_json(one.model_dump_json(by_alias=True)) == one


def _grad(parameter: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
