"""Dead weight is removed with the same output, and what must stay is reported with the reason."""

from __future__ import annotations

import dataclasses

import pytest
import timm
import torch
from tiny_models import relative_error, tiny_vit
from torch import nn
from torch.nn.utils import prune
from vitrim import InputError, compact, lift
from vitrim.compress.network.architecture import Architecture, AttentionSpec, FfnSpec
from vitrim.compress.network.modules.model import CompactModel, build
from vitrim.compress.surgery.dead_weight import DeadWeight, find_dead, fold_prune_masks

IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(5))
ATTENTION, FFN = "steps.0.0.core", "steps.1.0.core"


def zero(
    model: CompactModel, name: str, rows: object = slice(None), columns: object = slice(None)
) -> None:
    tensor = model.get_parameter(name)
    with torch.no_grad():
        if tensor.ndim == 1:
            tensor[rows] = 0.0  # type: ignore[index]
        else:
            tensor[rows, columns] = 0.0  # type: ignore[index]


def found(model: nn.Module) -> DeadWeight:
    """Find dead weight, and compare the result with the source on other images."""
    result = find_dead(model)
    with torch.no_grad():
        assert relative_error(result.compact(IMAGES), model.eval()(IMAGES)) < 1e-5
    return result


def widths(result: DeadWeight, step: int = 0) -> tuple[int, int, int]:
    core = result.compact.architecture.steps[step][0].core
    assert isinstance(core, AttentionSpec)
    return core.heads, core.qk, core.v


def hidden(result: DeadWeight) -> int:
    core = result.compact.architecture.steps[1][0].core
    assert isinstance(core, FfnSpec)
    return core.hidden


@pytest.fixture
def model() -> CompactModel:
    return lift(tiny_vit())


def altered(model: CompactModel, leaf: str, **changes: object) -> CompactModel:
    """The model with changed specs of its attentions or FFNs; new tensors are random."""
    steps = []
    for step in model.architecture.steps:
        core = step[0].core
        steps.append(
            (
                step[0].model_copy(update={"core": core.model_copy(update=changes)})
                if core.kind == leaf
                else step[0],
            )
        )
    architecture = Architecture.model_validate(
        model.architecture.model_copy(update={"steps": tuple(steps)}).model_dump(by_alias=True)
    )
    torch.manual_seed(1)
    with torch.no_grad():
        fresh = {
            name: torch.randn_like(tensor) * 0.2
            for name, tensor in CompactModel(architecture).state_dict().items()
        }
    old = model.state_dict()
    state = {
        name: old[name] if name in old and old[name].shape == tensor.shape else tensor
        for name, tensor in fresh.items()
    }
    return build(architecture, state).eval()


def test_a_model_without_dead_weight_is_unchanged(model: CompactModel) -> None:
    result = found(model)
    assert result.removed == ()
    assert result.remaining == ()
    assert result.sparsity == ()
    assert result.compact.architecture == model.architecture


def test_a_zero_fc1_row_still_emits_its_bias(model: CompactModel) -> None:
    zero(model, f"{FFN}.fc1.weight", [3, 7])
    result = found(model)
    assert hidden(result) == 94
    assert [dataclasses.astuple(row) for row in result.removed] == [
        ("blocks.0.ffn", "ffn", 2, 96, True)
    ]
    # Without the fold the output would differ.
    with torch.no_grad():
        assert relative_error(compact(model, result.mask)(IMAGES), model(IMAGES)) > 1e-4


def test_an_fc2_column_of_zeros_is_unread(model: CompactModel) -> None:
    zero(model, f"{FFN}.fc2.weight", slice(None), [0, 50])
    result = found(model)
    assert hidden(result) == 94
    assert not result.removed[0].folded


def test_an_output_bias_is_added_where_there_is_none(model: CompactModel) -> None:
    bare = altered(model, "ffn", out_bias=False)
    zero(bare, f"{FFN}.fc1.weight", [3])
    result = found(bare)
    assert hidden(result) == 95
    assert result.compact.get_parameter(f"{FFN}.fc2.bias").abs().max() > 0


def test_gated_units_need_both_factors(model: CompactModel) -> None:
    gated = altered(model, "ffn", gated=True, gate_bias=True, act="silu")
    zero(gated, f"{FFN}.fc1.weight", [1, 2, 3])
    zero(gated, f"{FFN}.gate.weight", [3, 4, 5])
    zero(gated, f"{FFN}.fc1.bias", [2])
    zero(gated, f"{FFN}.gate.bias", [5])
    # 1: fc1 constant but not zero; 2: fc1 zero; 3: both constant; 4: gate constant; 5: gate silu(0)
    # = 0.
    assert hidden(found(gated)) == 96 - 3


def test_a_dead_ffn_becomes_a_bias(model: CompactModel) -> None:
    zero(model, f"{FFN}.fc1.weight")
    result = found(model)
    assert [branch.name for branch in result.compact.architecture.branches] == [
        "blocks.0.attn",
        "blocks.1.attn",
        "blocks.1.ffn",
    ]


def test_value_columns_fold_because_softmax_rows_sum_to_one(model: CompactModel) -> None:
    for head, column in ((0, 1), (1, 4), (2, 7)):
        zero(model, f"{ATTENTION}.v.weight", [head * 8 + column])
    result = found(model)
    assert widths(result) == (3, 8, 7)
    assert result.removed[0].folded


def test_every_head_loses_equally_many_columns_and_the_rest_is_reported(
    model: CompactModel,
) -> None:
    zero(model, f"{ATTENTION}.v.weight", [0, 1, 2, 8, 9, 16])
    result = found(model)
    assert widths(result) == (3, 8, 7)
    assert [(row.site, row.count) for row in result.remaining] == [("blocks.0.attn", 3)]
    assert "every head keeps equally many" in result.remaining[0].why
    assert any(
        row.tensor == "steps.0.0.core.v.weight" and row.zeros > 0.1 for row in result.sparsity
    )


def test_a_head_of_constant_values_is_removed(model: CompactModel) -> None:
    zero(model, f"{ATTENTION}.v.weight", range(8, 12))
    zero(model, f"{ATTENTION}.out.weight", slice(None), range(12, 16))
    result = found(model)
    assert widths(result) == (2, 8, 8)
    assert result.mask.kept["head"]["blocks.0.attn"].tolist() == [True, False, True]


def test_zero_queries_do_not_make_a_head_dead(model: CompactModel) -> None:
    zero(model, f"{ATTENTION}.q.weight")
    zero(model, f"{ATTENTION}.q.bias")
    result = found(model)
    # All scores are zero: one column suffices, and the heads still average.
    assert widths(result) == (3, 1, 8)
    assert "one at least" in result.remaining[0].why


def test_zero_keys_are_removed_with_their_bias_but_constant_queries_stay(
    model: CompactModel,
) -> None:
    zero(model, f"{ATTENTION}.k.weight", [0, 8, 16])
    assert widths(found(model)) == (3, 7, 8)
    other = lift(tiny_vit())
    zero(other, f"{ATTENTION}.q.weight", [0, 8, 16])
    result = found(other)
    assert widths(result) == (3, 8, 8)
    assert "weigh keys against each other" in result.remaining[0].why
    zero(other, f"{ATTENTION}.q.bias", [0, 8, 16])
    assert widths(found(other)) == (3, 7, 8)


def test_norms_of_queries_and_keys_forbid_removal() -> None:
    normed = lift(tiny_vit(qk_norm=True))
    zero(normed, f"{ATTENTION}.k.weight", [0, 8, 16])
    zero(normed, f"{ATTENTION}.k.bias", [0, 8, 16])
    result = found(normed)
    assert widths(result) == (3, 8, 8)
    assert "norm of queries or keys" in result.remaining[0].why


def test_a_shared_column_is_removed_only_if_no_head_needs_it() -> None:
    grouped = altered(lift(tiny_vit(num_heads=4)), "attention", kv_of=(0, 0, 1, 1))
    zero(grouped, f"{ATTENTION}.v.weight", [0, 6])
    zero(grouped, f"{ATTENTION}.k.weight", [1, 7])
    assert widths(found(grouped)) == (4, 5, 5)
    zero(grouped, f"{ATTENTION}.q.weight", [2, 14, 20])
    zero(grouped, f"{ATTENTION}.q.bias", [2, 14, 20])
    # Head 1 still needs column 2.
    assert widths(found(grouped)) == (4, 5, 5)
    zero(grouped, f"{ATTENTION}.out.weight", slice(None), range(6, 12))
    # Head 1, the last one that needs it, is removed.
    assert widths(found(grouped)) == (3, 4, 5)


def test_gated_attention_folds_only_a_constant_gate(model: CompactModel) -> None:
    gated = altered(model, "attention", gated=True, gate_bias=True)
    zero(gated, f"{ATTENTION}.v.weight", [0, 8, 16])
    assert widths(found(gated)) == (3, 8, 8)
    zero(gated, f"{ATTENTION}.gate.weight", [0, 8, 16])
    result = found(gated)
    assert widths(result) == (3, 8, 7)
    assert result.removed[0].folded


def test_a_layer_scale_of_zero_makes_a_sub_layer_dead() -> None:
    scaled = lift(tiny_vit(init_values=0.5))
    zero(scaled, "steps.0.0.layer_scale")
    zero(scaled, "steps.1.0.layer_scale")
    assert [branch.name for branch in found(scaled).compact.architecture.branches] == [
        "blocks.1.attn",
        "blocks.1.ffn",
    ]


def dead_channels(model: CompactModel, channels: list[int]) -> CompactModel:
    for name in ("stem.weight", "stem.bias"):
        zero(model, name, channels)
    for name in ("prefix", "position"):
        zero(model, name, slice(None), channels)
    for number, _ in enumerate(model.architecture.steps):
        leaf = "out" if number % 2 == 0 else "fc2"
        zero(model, f"steps.{number}.0.core.{leaf}.weight", channels)
        zero(model, f"steps.{number}.0.core.{leaf}.bias", channels)
    return model


def test_layer_norm_keeps_zero_channels(model: CompactModel) -> None:
    result = found(dead_channels(model, [2, 5]))
    assert result.compact.architecture.embed == 24
    assert [(row.site, row.count, row.why) for row in result.remaining] == [
        ("residual stream", 2, "LayerNorm's mean and variance run over them")
    ]


def test_rms_norm_allows_the_removal_of_zero_channels(model: CompactModel) -> None:
    def rms(spec: object) -> object:
        return None if spec is None else spec.model_copy(update={"kind": "rms", "bias": False})  # type: ignore[attr-defined]

    architecture = model.architecture
    steps = tuple(
        tuple(branch.model_copy(update={"norm": rms(branch.norm)}) for branch in step)
        for step in architecture.steps
    )
    architecture = architecture.model_copy(update={"steps": steps, "norm": rms(architecture.norm)})
    state = {name: tensor for name, tensor in model.state_dict().items() if "norm.bias" not in name}
    result = found(dead_channels(build(architecture, state).eval(), [2, 5, 23]))
    assert result.compact.architecture.embed == 21
    assert result.removed[0].dimension == "embed"


@pytest.mark.parametrize(
    "name",
    ["vit_base_patch16_rope_reg1_gap_256", "eva02_tiny_patch14_224", "beit_base_patch16_224"],
)
def test_dead_columns_of_other_kinds_of_attention_are_removed(name: str) -> None:
    torch.manual_seed(0)
    size = 28 if "14" in name else 32
    network = lift(
        timm.create_model(
            name, img_size=size, depth=1, embed_dim=32, num_heads=2, num_classes=3
        ).eval()
    )
    step = next(
        number
        for number, step in enumerate(network.architecture.steps)
        if step[0].core.kind == "attention"
    )
    core = network.architecture.steps[step][0].core
    assert isinstance(core, AttentionSpec)
    half = core.qk // 2
    columns = [
        head * core.qk + column for head in range(core.heads) for column in (0, 1, half, half + 1)
    ]
    zero(network, f"steps.{step}.0.core.k.weight", columns)
    if core.k_bias:
        zero(network, f"steps.{step}.0.core.k.bias", columns)
    result = find_dead(network)
    assert widths(result, step)[1] == core.qk - 4
    images = torch.randn(2, *network.architecture.image)
    with torch.no_grad():
        assert relative_error(result.compact(images), network(images)) < 1e-5


def test_unstructured_pruning_by_another_tool_leaves_dead_units(model: CompactModel) -> None:
    """Global magnitude pruning at 97 % leaves dead rows, columns and heads."""
    source = tiny_vit(depth=3)
    layers = [(module, "weight") for module in source.modules() if isinstance(module, nn.Linear)]
    prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=0.97)
    result = found(source)
    assert sum(row.removed for row in result.removed) > 50
    before = sum(parameter.numel() for parameter in lift(source).parameters())
    assert sum(parameter.numel() for parameter in result.compact.parameters()) < 0.8 * before
    assert result.sparsity
    # A second search finds nothing.
    assert found(result.compact).removed == ()


def test_prune_masks_in_a_state_dict_are_folded() -> None:
    source = tiny_vit()
    prune.random_unstructured(source.get_submodule("blocks.0.mlp.fc1"), "weight", 0.5)
    state = source.state_dict()
    assert "blocks.0.mlp.fc1.weight_orig" in state
    folded = fold_prune_masks(state)
    plain = tiny_vit()
    plain.load_state_dict(folded)
    with torch.no_grad():
        assert torch.equal(plain(IMAGES), source(IMAGES))
    whole = {"a.weight": torch.ones(2), "attn_mask": torch.ones(2)}
    assert fold_prune_masks(whole) == whole


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a.weight_orig": torch.ones(2)}, "'a.weight_orig' has no 'a.weight_mask'"),
        ({"a.weight_orig": torch.ones(2), "a.weight_mask": torch.ones(3)}, r"shape \[3\]"),
        (
            {
                "a.weight_orig": torch.ones(2),
                "a.weight_mask": torch.ones(2),
                "a.weight": torch.ones(2),
            },
            "both 'a.weight' and",
        ),
    ],
)
def test_prune_masks_without_a_partner_are_refused(
    state: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        fold_prune_masks(state)
