"""Which selections are refused, and the way out that the message names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tiny_vit
from vitrim import InputError, choose_tokens, compact, select_tokens
from vitrim.compress.network.modules.model import CompactModel

REGISTERS = "vit_medium_patch16_reg4_gap_256"


def selecting(method: str = "dynamicvit", **options: Any) -> CompactModel:
    """Three blocks on 16 patches and a class token."""
    given = {"stages": [1], **options}
    return select_tokens(tiny_vit(img_size=32, depth=3), method, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["class-attention", "evit"])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        # Registers alone, no prefix at all, and a class token that the head does not read.
        (REGISTERS, {}),
        ("vit_medium_patch16_gap_240", {}),
        ("vit_tiny_patch16_224", {"global_pool": "avg"}),
    ],
)
def test_class_attention_needs_a_token_that_the_head_reads(
    method: str, name: str, settings: dict[str, Any]
) -> None:
    model = tiny_vit(name, img_size=32, depth=3, **settings)
    with pytest.raises(
        InputError,
        match=rf'method = "{method}" .*head reads no class token \(pool "mean.*"\); use '
        r'method = "column-attention" or "dynamicvit"',
    ):
        select_tokens(model, method)  # type: ignore[arg-type]
    # The ways out that the message names.
    for other in ("column-attention", "dynamicvit"):
        found = select_tokens(model, other).eval()
        assert found(torch.randn(1, 3, 32, 32)).isfinite().all()


@pytest.mark.parametrize(
    "name", ["vit_base_patch14_reg4_dinov2", "deit_tiny_distilled_patch16_224"]
)
def test_registers_and_a_distillation_token_behind_it_are_no_obstacle(name: str) -> None:
    model = tiny_vit(name, img_size=32, depth=3)
    assert select_tokens(model, "evit").architecture.selects


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "beit_base_patch16_224"])
def test_a_fused_token_has_no_position_and_two_ways_out(name: str) -> None:
    model = tiny_vit(name, img_size=32, depth=3, global_pool="token")
    with pytest.raises(
        InputError,
        match=r"blocks\.2\.attn: its positions are those of the grid, and the token into which "
        r"select\.1 fuses patches has none; choose without a fused token \(class-attention\), or "
        r"use a token mask instead",
    ) as caught:
        select_tokens(model, "evit", stages=[1])
    assert "--tokens patch-slimming" in str(caught.value)
    assert 'masks.tokens = "patch-slimming"' in str(caught.value)
    assert select_tokens(model, "class-attention", stages=[1]).architecture.selects
    mask = choose_tokens(model, "radial", macs=0.8)
    assert compact(model, mask).architecture.drops_tokens


def test_the_last_block_and_short_networks_have_a_way_out() -> None:
    with pytest.raises(
        InputError, match=r"nothing behind it reads patches; .*earlier block, or use a token mask"
    ):
        selecting("evit", stages=[2])
    with pytest.raises(InputError, match=r"stages: none fits 2 blocks; .* e\.g\. 0"):
        select_tokens(tiny_vit(img_size=32), "class-attention")
    assert select_tokens(tiny_vit(img_size=32), "class-attention", stages=[0])


def test_a_head_that_reads_every_patch_is_named() -> None:
    plain = tiny_vit(img_size=32, depth=3, num_classes=0, global_pool="")
    with pytest.raises(InputError, match=r'every patch \(pool "none"\); add a pooling first'):
        select_tokens(plain, "dynamicvit")
    refined = tiny_vit(img_size=32, depth=3, global_pool="prr")
    with pytest.raises(
        InputError,
        match=r'reads every patch \(pool "token" behind self-attention\); use a token mask',
    ):
        select_tokens(refined, "dynamicvit")
    # The way out.
    mask = choose_tokens(refined, "radial", [17, 9, 9])
    assert compact(refined, mask).architecture.drops_tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.05}, r"^ratio = 0\.05 \(geometric\): no patch is left at block 1, the 1\. of"),
        ({"ratio": 1.5}, r"^ratio = 1\.5: give a number above 0 and below 1$"),
        ({"ratio": 0.99}, r"^ratio = 0\.99: block 0 keeps 16 of 16 .* choose a smaller ratio$"),
        (
            {"ratio": 0.3, "stages": [0, 1, 2], "rule": "subtractive"},
            r"^ratio = 0\.3 \(subtractive\): no patch is left at block 2, the 3\. of 3 stages",
        ),
        ({"rule": "linear"}, r"^rule = 'linear': choose one of geometric, subtractive$"),
        ({"rule": "geometric", "counts": [8]}, r"^rule = 'geometric': .*counts state.* leave it"),
        ({"method": "evit", "rule": "subtractive"}, r"^rule = 'subtractive': .*evit.* leave it"),
        ({"counts": [0]}, r"^counts: 0 patches at block 1; each stage needs one at least$"),
        ({"counts": [16]}, r"^counts: 16 patches at block 1, where 16 are left; give fewer"),
        ({"counts": [4, 8], "stages": [0, 1]}, r"^counts: 8 patches at block 1, after 4 at bl"),
        (
            {"counts": [8, 8], "stages": [0, 1], "method": "evit"},
            r"^counts: 8 patches at block 1, after 8 .*, and one more for the fused token",
        ),
        ({"counts": [8, 4]}, r"^counts: 2 numbers for 1 stages; give one for each$"),
        ({"stages": [3]}, r"^stages: 3; the model has blocks 0 to 2$"),
        ({"stages": [2, 1]}, r"^stages = \[2, 1\]: give increasing numbers of blocks$"),
        ({"method": "magic"}, r'^method = "magic": choose one of dynamicvit, '),
    ],
)
def test_messages_name_the_argument_and_the_way_out(options: dict[str, Any], message: str) -> None:
    given = {"ratio": 0.6, **options}
    if given["ratio"] == 0.99:
        # So that the share of evit, rounded up, drops nothing.
        given |= {"method": "evit", "stages": [0]}
    with pytest.raises(InputError, match=message) as caught:
        selecting(**given)
    assert "\n" not in str(caught.value)


def test_rules_differ_from_the_second_stage_on() -> None:
    found: dict[str | None, list[int]] = {}
    for rule in (None, "geometric", "subtractive"):
        selects = selecting(stages=[0, 1], ratio=0.7, rule=rule).architecture.selects
        found[rule] = [select.patches for select in selects]
    assert found[None] == found["geometric"] == [11, 7]
    assert found["subtractive"] == [11, 8]
