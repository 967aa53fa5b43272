"""What is no model, or has tensors that are no floating-point numbers, is refused by path."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import relative_error, tiny_vit
from torch import Tensor, nn
from vitrim import (
    InputError,
    StructuredMask,
    UnsupportedModel,
    compact,
    lift,
    load,
    masked,
    resized,
    save,
)
from vitrim.cli import call
from vitrim.compress.network.modules.model import CompactModel
from vitrim.core.errors import ModelWarning

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
FULL = StructuredMask({})
CALLS: dict[str, Callable[[Any, Path], object]] = {
    "lift": lambda model, folder: lift(model),
    "compact": lambda model, folder: compact(model, FULL),
    "masked": lambda model, folder: masked(model, FULL),
    "save": lambda model, folder: save(model, folder / "saved"),
    "resized": lambda model, folder: resized(model, 24),
    "random": lambda model, folder: StructuredMask.random(model),
    "from_saliency": lambda model, folder: StructuredMask.from_saliency(model),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (lambda: "vit_tiny", r"model: the text 'vit_tiny' .*vitrim\.load.*timm\.create_model"),
        (lambda: Path("folder"), r"model: the path folder .*vitrim\.load"),
        (lambda: tiny_vit().state_dict(), r"model: a table of tensors .*load_state_dict"),
        (lambda: {"state_dict": {}}, r"model: a table of tensors .*load_state_dict"),
        (lambda: None, "model: None where"),
        (lambda: nn.Linear, "model: the class Linear where .*instance"),
        (lambda: [tiny_vit()], "model: a list where"),
        (lambda: torch.zeros(3), "model: a Tensor where"),
    ],
    ids=["text", "path", "state dict", "checkpoint", "None", "class", "list", "tensor"],
)
def test_what_is_no_module_is_refused_with_what_to_give(
    call: str, given: Callable[[], Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=reason) as refusal:
        CALLS[call](given(), tmp_path)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("given", [None, {"ffn": {}}, "mask.safetensors"])
def test_what_is_no_mask_is_refused(given: Any) -> None:
    for function in (compact, masked):
        with pytest.raises(InputError, match=r"mask: .* where a StructuredMask was expected"):
            function(tiny_vit(), given)


def parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


@pytest.mark.parametrize("call", [name for name in CALLS if name != "random"])
@pytest.mark.parametrize("lifted", [False, True])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda w: w.mul(100).to(torch.int8), "numbers of type int8"),
        (lambda w: w.mul(100).to(torch.uint8), "numbers of type uint8"),
        (lambda w: w > 0, "numbers of type bool"),
        (lambda w: w.to(torch.complex64), "numbers of type complex64"),
        (lambda w: w.to_sparse(), r"layout sparse_coo; call to_dense\(\)"),
        (lambda w: w.to_sparse_csr(), r"layout sparse_csr; call to_dense\(\)"),
        (lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), "a quantized tensor"),
        (lambda w: w.index_fill(0, torch.tensor([3]), float("nan")), "contains NaN or infinity"),
        (lambda w: w.index_fill(0, torch.tensor([3]), float("inf")), "contains NaN or infinity"),
        (lambda w: w.index_fill(0, torch.tensor([3]), -float("inf")), "contains NaN or infinity"),
    ],
    ids=["int8", "uint8", "bool", "complex", "coo", "csr", "quantized", "nan", "inf", "-inf"],
)
def test_tensors_that_are_no_finite_floats_are_refused_by_path(
    call: str, lifted: bool, change: Callable[[Tensor], Tensor], reason: str, tmp_path: Path
) -> None:
    model = lift(tiny_vit()) if lifted else tiny_vit()
    path = "steps.3.0.core.fc1" if lifted else "blocks.1.mlp.fc1"
    layer = model.get_submodule(path)
    layer.weight = parameter(change(layer.weight.detach()))  # type: ignore[operator]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(InputError, match=rf"{path}\.weight: .*{reason}"):
            CALLS[call](model, tmp_path)


def test_a_running_statistic_that_is_nan_is_refused_by_path() -> None:
    from torchvision.models.vision_transformer import ConvStemConfig, VisionTransformer

    stem = [ConvStemConfig(8, 3, 2)] * 3
    model = VisionTransformer(16, 8, 1, 3, 24, 48, num_classes=5, conv_stem_configs=stem)
    model.get_buffer("conv_proj.conv_bn_relu_1.1.running_var").fill_(float("nan"))
    with pytest.raises(InputError, match=r"conv_proj\.conv_bn_relu_1\.1\.running_var: .*NaN"):
        lift(model)


def test_large_finite_weights_are_no_infinity() -> None:
    model = lift(tiny_vit())
    with torch.no_grad():
        model.get_parameter("head.weight").fill_(3e38)
    lift(model)


def test_a_parameter_without_a_value_is_refused() -> None:
    model: Any = tiny_vit()
    model.extra = nn.LazyLinear(3)
    with pytest.raises(InputError, match=r"extra\.weight: it has no value yet; run the model once"):
        lift(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_torchscript_module_is_refused() -> None:
    model: Any = tiny_vit()
    model.blocks[0].mlp = torch.jit.trace(model.blocks[0].mlp, torch.zeros(1, 5, 24))
    with pytest.raises(UnsupportedModel, match=r"blocks\.0\.mlp: a TorchScript module"):
        lift(model)


def test_a_block_that_is_used_twice_becomes_two_blocks() -> None:
    model: Any = tiny_vit()
    model.blocks = nn.Sequential(model.blocks[0], model.blocks[1], model.blocks[0])
    lifted = lift(model)
    assert len(lifted.steps) == 6
    with torch.no_grad():
        assert relative_error(lifted(IMAGES), model(IMAGES)) < 1e-6
        mask = StructuredMask.random(model, 0.5, "unshared")
        assert relative_error(compact(model, mask)(IMAGES), masked(model, mask)(IMAGES)) < 1e-5


def test_sub_layers_that_are_used_twice_become_two() -> None:
    model: Any = tiny_vit()
    one, two = model.blocks
    two.attn, two.mlp, two.norm1 = one.attn, one.mlp, one.norm2
    lifted = lift(model)
    with torch.no_grad():
        assert relative_error(lifted(IMAGES), model(IMAGES)) < 1e-6
    hooked = model.blocks[0].attn.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(UnsupportedModel, match=r"blocks\.0\.attn has a forward hook"):
        lift(model)
    hooked.remove()


def edited(change: Callable[[Any], object]) -> nn.Module:
    model: nn.Module = tiny_vit()
    change(model)
    return model


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: setattr(m, "cls_token", None), "cls_token: num_prefix_tokens is 1"),
        (lambda m: setattr(m, "pos_embed", parameter(torch.zeros(1, 9, 24))), "model: position"),
        (lambda m: setattr(m.blocks[1], "norm1", None), "model: it raises"),
        (lambda m: setattr(m.blocks[1], "mlp", None), r"blocks\.1\.ffn: "),
        (lambda m: setattr(m.blocks[1], "attn", None), r"blocks\.1\.attn: "),
        (lambda m: delattr(m.blocks[1].attn, "num_heads"), r"blocks\.1\.attn: "),
        (lambda m: setattr(m.blocks[1].attn, "qkv", None), r"blocks\.1\.attn\.qkv: "),
        (lambda m: setattr(m.blocks[1].mlp, "fc2", nn.Linear(96, 25)), "model: "),
        (lambda m: setattr(m.blocks[1].mlp, "fc2", nn.Linear(95, 24)), "model: "),
        (lambda m: setattr(m, "norm", nn.LayerNorm(23)), "model: "),
        (lambda m: setattr(m, "head", nn.Linear(23, 5)), "model: "),
        (lambda m: setattr(m, "blocks", None), "model: "),
        (lambda m: setattr(m, "patch_embed", None), "patch_embed: "),
        (lambda m: m.blocks[1].register_module("attn", None), r"blocks\.1\.attn: "),
    ],
)
def test_an_inconsistently_edited_model_is_refused_by_path(
    change: Callable[[Any], object], reason: str
) -> None:
    with pytest.raises(InputError, match=f"^{reason}") as refusal:
        lift(edited(change))
    assert "\n" not in str(refusal.value)


def test_a_model_without_blocks_is_lifted() -> None:
    lift(edited(lambda model: setattr(model, "blocks", nn.Sequential())))


TYPES = [torch.float16, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "eva02_small_patch14_224", "vit_dwee_patch16_reg1_gap_256"]
)
def test_other_types_are_computed_in_float32(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_vit(name).to(dtype)
    wanted, images = tiny_vit(name).to(dtype).float(), IMAGES.to(dtype)
    name = str(dtype).removeprefix("torch.")
    with pytest.warns(UserWarning, match=f"the model is in {name}; it is computed in float32"):
        lifted = lift(model)
    assert {tensor.dtype for tensor in model.parameters()} == {dtype}
    assert {tensor.dtype for tensor in lifted.parameters()} == {torch.float32}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert relative_error(lifted(images), wanted(images.float())) < 1e-5
        mask = StructuredMask.from_saliency(model, "l2")
        reference, small = masked(model, mask), compact(model, mask)
        assert relative_error(small(images), reference(images)) < 1e-5
        again = load(save(small, tmp_path / "small"))
        assert torch.equal(again(images), small(images))
        assert torch.equal(load(save(model, tmp_path / "lifted"))(images), lifted(images))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_lifted_model_of_another_type_is_saved_as_it_is_and_cut(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    model = lift(tiny_vit()).to(dtype)
    again = load(save(model, tmp_path / "model"))
    assert {tensor.dtype for tensor in again.parameters()} == {dtype}
    assert isinstance(again, CompactModel)
    data = [(IMAGES, torch.tensor([0, 1]))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for criterion in ("l1", "l2", "taylor", "head"):
            mask = StructuredMask.from_saliency(again, criterion, data=data)
            with torch.no_grad():
                small, reference = compact(again, mask), masked(again, mask)
                assert relative_error(small(IMAGES), reference(IMAGES)) < 1e-5


def test_a_model_of_mixed_types_is_saved_in_float32(tmp_path: Path) -> None:
    for model in (tiny_vit(), lift(tiny_vit())):
        model.get_submodule("norm").half()
        with pytest.warns(UserWarning, match="the model is in float16 and float32"):
            again = load(save(model, tmp_path / type(model).__name__))
        assert {tensor.dtype for tensor in again.parameters()} == {torch.float32}


def test_the_command_line_prints_a_conversion_once_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(lift(tiny_vit()).half(), tmp_path / "model")
    assert call(["compact", str(tmp_path / "model"), "--keep-ratio", "0.5"]) == 0
    line = "vitrim: the model is in float16; it is computed in float32"
    assert capsys.readouterr().err.splitlines().count(line) == 1


def test_a_warning_names_the_line_of_the_caller() -> None:
    with pytest.warns(ModelWarning) as caught:
        lift(tiny_vit().half())
    assert [Path(each.filename).name for each in caught] == [Path(__file__).name]


def test_a_plain_attribute_instead_of_a_parameter_is_refused_by_path() -> None:
    model: Any = tiny_vit()
    layer = model.blocks[1].mlp.fc1
    weight = layer.weight.detach()
    del layer.weight
    layer.weight = weight.to(torch.complex64)
    with pytest.raises(InputError, match=r"blocks\.1\.ffn: core\.fc1\.weight: .*complex64"):
        lift(model)


def test_numbers_of_eight_bits_are_computed_in_float32() -> None:
    model = tiny_vit()
    layer = model.get_submodule("blocks.1.mlp.fc1")
    layer.weight = parameter(layer.weight.detach().to(torch.float8_e4m3fn))  # type: ignore[operator]
    with pytest.warns(UserWarning, match="float32 and float8_e4m3fn"):
        assert lift(model).get_parameter("steps.3.0.core.fc1.weight").dtype == torch.float32
