"""Dead weight in and around predictors of tokens: the same scores, and so the same choices."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_networks import lone_predictor, network, selecting_architectures
from tiny_models import relative_error, tiny_vit
from torch import Tensor
from typer.testing import CliRunner
from vitrim import WeightMask, save
from vitrim.cli import app
from vitrim.compress.network.architecture import (
    NormSpec,
    PredictorSpec,
)
from vitrim.compress.network.modules.model import CompactModel
from vitrim.compress.network.modules.select import Choices
from vitrim.compress.network.select_specs import Scorer
from vitrim.compress.surgery.dead_predictor import dead_predictor
from vitrim.compress.surgery.dead_weight import DeadWeight, find_dead
from vitrim.compress.surgery.explain import explain
from vitrim.compress.tokens.select import SelectMethod, select_tokens

SLOW = settings(suppress_health_check=list(HealthCheck), max_examples=60)


def predicting(method: SelectMethod = "dynamicvit") -> CompactModel:
    """Three blocks of a ViT with a predictor before the second; no weight of it is zero."""
    model = select_tokens(tiny_vit(img_size=32, depth=3), method, stages=[1], ratio=0.6).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.startswith("selects."):
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
    return model


def predictor_of(model: CompactModel) -> PredictorSpec:
    spec = model.architecture.selects[0].predictor
    assert spec is not None
    return spec


def zero(model: CompactModel, leaf: str, rows: object = slice(None), columns: object = ()) -> None:
    """Set rows of a parameter of the first predictor to zero, or columns where these are given."""
    tensor = model.get_parameter(f"selects.0.predictor.{leaf}")
    with torch.no_grad():
        if columns == ():
            tensor[rows] = 0.0  # type: ignore[index]
        else:
            tensor[:, columns] = 0.0  # type: ignore[index]


def images(model: CompactModel, count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    shape = (count, *model.architecture.image)
    return torch.randn(shape, generator=generator, dtype=next(model.parameters()).dtype)


def run(model: CompactModel, choices: Choices) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(images(model), choices=choices)
    return found


def found(model: CompactModel) -> DeadWeight:
    """Find dead weight; the result chooses the same patches, and a second search finds nothing."""
    result = find_dead(model)
    one, other = Choices(scores=[]), Choices(scores=[])
    assert relative_error(run(result.compact, other), run(model, one)) < 1e-5
    assert all(torch.equal(a, b) for a, b in zip(one.found, other.found, strict=True))
    assert one.scores is not None
    assert other.scores is not None
    for a, b in zip(one.scores, other.scores, strict=True):
        assert relative_error(b, a) < 1e-5
    assert find_dead(result.compact).removed == ()
    return result


def rows_of(result: DeadWeight) -> list[tuple[str, int, int, bool]]:
    return [(row.site, row.removed, row.total, row.folded) for row in result.removed]


def test_a_predictor_without_dead_weight_is_unchanged() -> None:
    model = predicting()
    result = found(model)
    assert result.removed == ()
    assert result.remaining == ()
    assert result.compact.architecture == model.architecture


@pytest.mark.parametrize("method", ["dynamicvit", "dps"])
def test_units_of_the_first_layer_fold_their_constants_and_unread_ones_go(
    method: SelectMethod,
) -> None:
    model = predicting(method)
    spec = predictor_of(model)
    zero(model, "fc.weight", [0, 3])
    zero(model, "local.weight", columns=[2])
    removed = 3
    if spec.pooled:
        zero(model, "fc.weight", [spec.local + 1])
        zero(model, "pooled.weight", columns=[0, 4])
        removed += 3
    result = found(model)
    total = spec.local + spec.pooled
    assert rows_of(result) == [("select.1.hidden.0", removed, total, True)]
    after = predictor_of(result.compact)
    assert after.local == spec.local - 3
    assert after.pooled == max(0, spec.pooled - 3)


def test_units_without_constants_are_not_said_to_be_folded() -> None:
    model = predicting()
    zero(model, "local.weight", columns=[2])
    (row,) = found(model).removed
    assert (row.removed, row.folded) == (1, False)


def test_units_of_further_layers_need_zeros_in_both_halves() -> None:
    model = predicting()
    spec = predictor_of(model)
    assert len(spec.hidden) == 2
    zero(model, "local.weight", [0, 1])
    # Unit 1 still gets the mean of the patches.
    zero(model, "pooled.weight", [0])
    zero(model, "rest.0.weight", columns=[5])
    zero(model, "rest.0.weight", [3])
    result = found(model)
    assert rows_of(result) == [
        ("select.1.hidden.1", 2, spec.hidden[0], True),
        ("select.1.hidden.2", 1, spec.hidden[1], True),
    ]


def test_a_removal_that_makes_other_units_dead_is_followed() -> None:
    model = predicting()
    spec = predictor_of(model)
    # The only unit that reads local unit 4 is not read itself.
    zero(model, "local.weight", columns=[4])
    with torch.no_grad():
        model.get_parameter("selects.0.predictor.local.weight")[2, 4] = 1.0
    zero(model, "rest.0.weight", columns=[2])
    assert rows_of(found(model)) == [
        ("select.1.hidden.0", 1, spec.local + spec.pooled, False),
        ("select.1.hidden.1", 1, spec.hidden[0], False),
    ]


def test_all_pooled_units_may_go() -> None:
    model = predicting()
    zero(model, "pooled.weight")
    result = found(model)
    assert predictor_of(result.compact).pooled == 0
    assert "selects.0.predictor.pooled.weight" not in result.compact.state_dict()


def test_one_unit_of_each_layer_stays_with_the_reason() -> None:
    model = predicting("dps")
    zero(model, "fc.weight")
    result = find_dead(model)
    assert predictor_of(result.compact).local == 1
    assert [(rest.site, rest.count, rest.why) for rest in result.remaining] == [
        (
            "select.1.hidden.0",
            1,
            "a predictor keeps one unit in each layer, a local one in the first",
        )
    ]
    assert find_dead(result.compact).removed == ()


def test_the_cut_is_explained_and_counted() -> None:
    model = predicting()
    zero(model, "fc.weight", [0, 3])
    result = found(model)
    explained = explain(model, result.mask)
    (module,) = [part for part in explained.modules if part.module == "select.1"]
    assert module.params[0] > module.params[1]
    assert module.macs[0] > module.macs[1]
    cuts = {cut.tensor: cut.masks for cut in module.tensors if cut.after != cut.before}
    assert cuts["predictor.fc.weight"] == ("ffn/select.1.hidden.0",)


def test_the_command_lists_dead_units_of_predictors(tmp_path: Path) -> None:
    model = predicting()
    zero(model, "fc.weight", [0, 3])
    save(model, tmp_path / "model")
    arguments = ["compact", str(tmp_path / "model"), "--out", str(tmp_path / "small"), "--explain"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert (
        "select.1.hidden.0: 2 of 24 ffn units are dead, constant ones folded into a bias"
        in result.output
    )
    assert "predictor.fc.weight" in result.output


def test_a_wrong_fold_in_a_predictor_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The outputs are those of the same choices, and would not show it."""

    def wrong(*arguments: Any) -> Any:
        units = dead_predictor(*arguments)
        return type(units)(units.keep, {})

    model = predicting()
    zero(model, "fc.weight", [0, 3])
    monkeypatch.setattr("vitrim.compress.surgery.dead_weight.dead_predictor", wrong)
    with pytest.raises(AssertionError, match="this is a bug in vitrim"):
        find_dead(model)


def lone_reader(norm: NormSpec | None = None, reads: tuple[int, ...] | None = None) -> CompactModel:
    """Of its first channel only the predictor has a column with weights."""
    model = network(lone_predictor(norm, reads))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith(("core.fc1.weight", "head.weight")):
                tensor[:, 0] = 0
    return model


def test_a_channel_that_only_a_predictor_reads_stays_if_its_weights_are_not_zero() -> None:
    assert "embed" not in found(lone_reader()).mask.kept
    model = lone_reader()
    zero(model, "fc.weight", columns=[0])
    result = found(model)
    assert result.mask.kept["embed"]["*"].tolist() == [False, True, True, True]


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_a_channel_stays_where_the_norm_of_a_predictor_reads_it(kind: Any) -> None:
    model = lone_reader(NormSpec(width=4, kind=kind, eps=1e-2, bias=False))
    zero(model, "fc.weight", columns=[0])
    assert "embed" not in found(model).mask.kept


def test_a_predictor_keeps_one_of_its_channels() -> None:
    """It reads channel 0 alone, which is dead."""
    model = lone_reader(reads=(0,))
    zero(model, "fc.weight")
    result = find_dead(model)
    assert "embed" not in result.mask.kept
    assert find_dead(result.compact).removed == ()


def with_zeros(model: CompactModel, data: Any) -> CompactModel:
    """Zeros in rows, columns and single entries of the matrices, and in biases."""
    share = data.draw(st.sampled_from([0.1, 0.3, 0.6]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    only = data.draw(st.sampled_from(["", "selects."]))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if not name.startswith(only):
                continue
            for axis in range(min(tensor.ndim, 2)):
                gone = torch.rand(tensor.shape[axis], generator=generator) < share
                tensor.index_fill_(axis, torch.nonzero(gone).flatten(), 0.0)
    return model


@SLOW
@given(st.data())
def test_dead_weight_goes_with_the_same_scores_in_random_networks(data: Any) -> None:
    scorers = data.draw(st.sampled_from([("predictor",), get_args(Scorer)]))
    model = with_zeros(network(data.draw(selecting_architectures(scorers=scorers))), data)
    result = find_dead(model)
    small = result.compact
    one, other = Choices(scores=[]), Choices(scores=[])
    wanted = run(model, one)
    kept = len(small.architecture.selects)
    other.given = one.found[:kept]
    found_output = run(small, other)
    assert float((found_output - wanted).abs().max()) < 1e-9 * (1 + float(wanted.abs().max()))
    assert one.scores is not None
    assert other.scores is not None
    for a, b in zip(one.scores[:kept], other.scores, strict=True):
        assert float((b - a).abs().max()) < 1e-9 * (1 + float(a.abs().max()))
    own = Choices(scores=[])
    run(small, own)
    for spec, a, b, scores in zip(
        small.architecture.selects, one.found, own.found, one.scores, strict=False
    ):
        # Equal scores decide differently in two orders of summation.
        best = scores.sort(dim=-1, descending=True).values
        if bool((best[:, spec.patches - 1] - best[:, spec.patches] < 1e-8).any()):
            break
        assert torch.equal(a, b)
    assert find_dead(small).removed == ()


def test_norms_that_get_a_weight_have_the_type_of_the_model() -> None:
    """The RMSNorm of a predictor has no weight until zero channels leave it."""
    norm = NormSpec(width=3, kind="rms", eps=1e-2, weight=False, bias=False)
    model = lone_reader(norm, reads=(1, 2, 3))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.startswith(("stem.", "steps.0.0.core.fc2.")):
                tensor[2] = 0
        model.get_parameter("position")[:, 2] = 0
    result = found(model)
    assert not bool(result.mask.kept["embed"]["*"][2])
    assert {tensor.dtype for tensor in result.compact.parameters()} == {torch.float64}


def test_masks_of_single_weights_leave_predictors_alone() -> None:
    model = predicting()
    mask = WeightMask.from_magnitude(model, 0.9)
    assert not any(name.startswith("selects.") for name in mask.kept)
    zeroed = mask.zeroed(model)
    for name, tensor in model.named_parameters():
        if name.startswith("selects."):
            assert torch.equal(zeroed.get_parameter(name), tensor)
