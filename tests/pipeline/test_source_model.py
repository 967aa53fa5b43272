"""Checkpoints of training scripts: prefixes, averaged weights, counters, and new heads."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data.config import resolve_model_data_config
from tiny_models import relative_error, tiny_vit
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.optim.swa_utils import AveragedModel
from vitrim import lift, load, save
from vitrim.cli import call
from vitrim.compress.data.preprocessing import Preprocessing
from vitrim.core.errors import InputError
from vitrim.pipeline.recipe_sections import ModelSection
from vitrim.pipeline.source_model import (
    classes_in,
    require_trained_head,
    source_model,
    with_preprocessing,
)

NAME = "vit_tiny_patch16_224"
SIZES: dict[str, Any] = {
    "img_size": 16,
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 3,
}
CLASSES = 5
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_vit()


@pytest.fixture(scope="module")
def state(model: nn.Module) -> dict[str, Tensor]:
    return model.state_dict()


def section(path: Path, *, new_head: bool = False, **overrides: Any) -> ModelSection:
    sizes = {**SIZES, **overrides}
    return ModelSection(name=NAME, overrides=sizes, checkpoint=str(path), new_head=new_head)


def loaded(path: Path, content: Any, **overrides: Any) -> nn.Module:
    torch.save(content, path)
    part = section(path, **overrides)
    return source_model(part, classes_in(part))


def refusal(path: Path, content: Any, classes: int = CLASSES, **overrides: Any) -> str:
    torch.save(content, path)
    with pytest.raises(InputError) as caught:
        source_model(section(path, **overrides), classes)
    line = str(caught.value)
    assert line.startswith(f"{path}: ")
    assert "\n" not in line
    return line


def assert_same(found: nn.Module, wanted: nn.Module) -> None:
    with torch.no_grad():
        assert torch.equal(found(IMAGES), wanted(IMAGES))


def noisy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: each + 1.0 for name, each in state.items()}


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": each for name, each in state.items()}


# ---- prefixes and nesting ----

WRAPPERS = ("module", "_orig_mod", "model", "net", "backbone", "encoder", "student", "my_vit")


@pytest.mark.parametrize(
    "prefix",
    [".".join(each) for each in itertools.permutations(WRAPPERS[:4], 2)]
    + [
        ".".join(WRAPPERS),
        ".".join(reversed(WRAPPERS)),
        "module.module.module",
        "teacher",
        "visual",
    ],
)
def test_prefixes_of_any_depth_and_order(
    tmp_path: Path, model: nn.Module, state: dict[str, Tensor], prefix: str
) -> None:
    assert_same(loaded(tmp_path / "w.pth", prefixed(f"{prefix}.", state)), model)


@pytest.mark.parametrize(
    "keys",
    [
        ("state_dict",),
        ("model",),
        ("model_state_dict",),
        ("net",),
        ("params",),
        ("checkpoint", "model", "weights"),
        ("model_ema", "module"),
    ],
)
def test_nested_dictionaries(
    tmp_path: Path, model: nn.Module, state: dict[str, Tensor], keys: tuple[str, ...]
) -> None:
    content: Any = prefixed("_orig_mod.module.", state)
    for key in reversed(keys):
        optimizer = torch.optim.AdamW(model.parameters()).state_dict()
        content = {key: content, "epoch": 3, "optimizer": optimizer, "step": torch.tensor(7)}
    assert_same(loaded(tmp_path / "w.pth", content), model)


@pytest.mark.parametrize(
    "name",
    [
        "model_ema",
        "ema_state_dict",
        "state_dict_ema",
        "ema",
        "averaged_model",
        "teacher",
        "swa_model",
    ],
)
def test_averaged_weights_are_preferred(
    tmp_path: Path, model: nn.Module, state: dict[str, Tensor], name: str
) -> None:
    other = noisy(state)
    for content in (
        {"state_dict": other, name: state},
        {name: {"module": state, "decay": 0.99}, "model": other},
        {"state_dict": {**prefixed("model.", other), **prefixed(f"{name}.", state)}},
        {"student": prefixed("module.backbone.", other), name: prefixed("backbone.", state)},
    ):
        assert_same(loaded(tmp_path / "w.pth", content), model)


def test_a_larger_teacher_is_not_the_model(
    tmp_path: Path, model: nn.Module, state: dict[str, Tensor]
) -> None:
    teacher = tiny_vit(embed_dim=48, depth=4).state_dict()
    content = {**prefixed("student.", state), **prefixed("teacher.", teacher)}
    assert_same(loaded(tmp_path / "w.pth", content), model)


def test_two_networks_that_fit_are_refused(tmp_path: Path, state: dict[str, Tensor]) -> None:
    content = {"first": state, "second": noisy(state)}
    line = refusal(tmp_path / "w.pth", content)
    assert f"two networks in it fit {NAME}, 'first' and 'second'" in line
    same = {"first": state, "second": dict(state)}
    assert loaded(tmp_path / "w.pth", same)


def test_wrappers_inside_a_name(tmp_path: Path, model: nn.Module, state: dict[str, Tensor]) -> None:
    content = {
        name.replace("blocks.1.", "blocks.1._orig_mod._checkpoint_wrapped_module."): each
        for name, each in state.items()
    }
    assert_same(loaded(tmp_path / "w.pth", prefixed("module.", content)), model)


def test_names_as_nested_dictionaries(
    tmp_path: Path, model: nn.Module, state: dict[str, Tensor]
) -> None:
    tree: dict[str, Any] = {}
    for name, each in state.items():
        *parts, leaf = name.split(".")
        place = tree
        for part in parts:
            place = place.setdefault(part, {})
        place[leaf] = each
    assert_same(loaded(tmp_path / "w.pth", {"params": tree}), model)
    tree["blocks"]["0"]["attn"]["rel_pos"] = torch.zeros(3)
    assert "its entry 'blocks.0.attn.rel_pos' is not part of" in refusal(tmp_path / "w.pth", tree)


# ---- what wrappers and tools write ----


def averaged(model: nn.Module) -> dict[str, Tensor]:
    result = AveragedModel(model)
    result.update_parameters(model)
    return result.state_dict()


def profiled(model: nn.Module) -> dict[str, Tensor]:
    state = dict(model.state_dict())
    for name in ("", "blocks.0.", "blocks.0.attn."):
        state |= {f"{name}total_ops": torch.zeros(1), f"{name}total_params": torch.zeros(1)}
    return state


WRITTEN: dict[str, Callable[[nn.Module], Any]] = {
    "DataParallel": lambda model: nn.DataParallel(model).state_dict(),
    "compiled": lambda model: torch.compile(model).state_dict(),  # type: ignore[attr-defined]
    "compiled DataParallel": lambda model: torch.compile(  # type: ignore[attr-defined]
        nn.DataParallel(model)
    ).state_dict(),
    "AveragedModel": averaged,
    "profiler": profiled,
    "averaged, in a trainer": lambda model: {"model": prefixed("net.", averaged(model))},
    "timm's train.py": lambda model: {
        "epoch": 3,
        "arch": NAME,
        "state_dict": model.state_dict(),
        "args": argparse.Namespace(lr=1e-3, data_dir=Path("images")),
        "version": 2,
        "metric": np.float64(71.0),
    },
    "masked image modelling": lambda model: {
        **model.state_dict(),
        "mask_token": torch.zeros(1, 24),
    },
    "half": lambda model: {name: each.half().float() for name, each in model.state_dict().items()},
}


@pytest.mark.parametrize("kind", WRITTEN)
def test_what_wrappers_and_tools_write(tmp_path: Path, model: nn.Module, kind: str) -> None:
    found = loaded(tmp_path / "w.pth", WRITTEN[kind](model))
    with torch.no_grad():
        assert relative_error(found(IMAGES), model(IMAGES)) < (1e-2 if kind == "half" else 1e-9)


def test_prune_masks_below_prefixes(tmp_path: Path) -> None:
    model = tiny_vit()
    prune.random_unstructured(model.get_submodule("blocks.0.mlp.fc1"), "weight", 0.5)
    assert_same(loaded(tmp_path / "w.pth", prefixed("module.net.", model.state_dict())), model)


# torch's stub of `weight_norm` does not have None, which its documentation has.
WHOLE: Any = None
NORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight norm": lambda layer: weight_norm(layer),
    "weight norm of columns": lambda layer: weight_norm(layer, dim=1),
    "weight norm of the whole": lambda layer: weight_norm(layer, dim=WHOLE),
    "spectral norm": lambda layer: spectral_norm(layer),
    "parametrized weight norm": lambda layer: parametrizations.weight_norm(layer),
    "parametrized weight norm of columns": lambda layer: parametrizations.weight_norm(layer, dim=1),
    "parametrized spectral norm": lambda layer: parametrizations.spectral_norm(layer),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", NORMS)
def test_reparametrized_weights_are_folded(tmp_path: Path, kind: str) -> None:
    model = tiny_vit().train()
    for name in ("blocks.0.mlp.fc1", "blocks.1.attn.proj", "patch_embed.proj"):
        layer = NORMS[kind](model.get_submodule(name))
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.mul_(1.5)
    model(IMAGES)
    model.eval()
    found = loaded(tmp_path / "w.pth", prefixed("module.", model.state_dict()))
    with torch.no_grad():
        assert relative_error(found(IMAGES), model(IMAGES)) < 1e-5


def test_an_unknown_parametrization_is_refused(tmp_path: Path) -> None:
    model = tiny_vit()
    parametrizations.orthogonal(model.get_submodule("blocks.0.attn.proj"))
    line = refusal(tmp_path / "w.pth", model.state_dict())
    assert "'blocks.0.attn.proj.parametrizations.weight." in line
    assert "call torch.nn.utils.parametrize.remove_parametrizations before saving" in line


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_incomplete_parts_of_a_weight_are_refused(tmp_path: Path) -> None:
    model = tiny_vit()
    weight_norm(model.get_submodule("blocks.0.attn.proj"))
    spectral_norm(model.get_submodule("blocks.0.mlp.fc1"))
    state = model.state_dict()
    short = {**state, "blocks.0.attn.proj.weight_g": torch.ones(3, 1)}
    line = refusal(tmp_path / "short.pth", short)
    assert "'blocks.0.attn.proj.weight' (weight norm) do not fit: magnitude [3, 1]" in line
    del state["blocks.0.mlp.fc1.weight_v"]
    assert "'blocks.0.mlp.fc1.weight' (spectral norm)" in refusal(tmp_path / "half.pth", state)


def test_half_precision_and_sparse_weights(
    tmp_path: Path, model: nn.Module, state: dict[str, Tensor]
) -> None:
    content = {name: each.bfloat16().to_sparse() for name, each in state.items()}
    assert relative_error(loaded(tmp_path / "w.pth", content)(IMAGES), model(IMAGES)) < 0.1


def test_published_weights_in_jax_names(tmp_path: Path) -> None:
    model, width = tiny_vit(embed_dim=24), 24
    state = {name: each.numpy() for name, each in model.state_dict().items()}
    arrays = {
        "cls": state["cls_token"],
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "head/kernel": state["head.weight"].T,
        "head/bias": state["head.bias"],
    }
    for number in range(2):
        ours, theirs = f"blocks.{number}.", f"Transformer/encoderblock_{number}/"
        for norm, name in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            arrays[f"{theirs}{name}/scale"] = state[f"{ours}{norm}.weight"]
            arrays[f"{theirs}{name}/bias"] = state[f"{ours}{norm}.bias"]
        attention = f"{theirs}MultiHeadDotProductAttention_1/"
        for part, name in enumerate(("query", "key", "value")):
            rows = slice(part * width, (part + 1) * width)
            weight = state[f"{ours}attn.qkv.weight"][rows]
            arrays[f"{attention}{name}/kernel"] = weight.T.reshape(width, 3, 8)
            arrays[f"{attention}{name}/bias"] = state[f"{ours}attn.qkv.bias"][rows].reshape(3, 8)
        projection = state[f"{ours}attn.proj.weight"].T
        arrays[f"{attention}out/kernel"] = projection.reshape(3, 8, width)
        arrays[f"{attention}out/bias"] = state[f"{ours}attn.proj.bias"]
        for part in range(2):
            dense, layer = f"{theirs}MlpBlock_3/Dense_{part}/", f"{ours}mlp.fc{part + 1}."
            arrays[f"{dense}kernel"] = state[f"{layer}weight"].T
            arrays[f"{dense}bias"] = state[f"{layer}bias"]
    path = tmp_path / "w.npz"
    np.savez(path, **arrays)
    assert classes_in(section(path)) == CLASSES
    assert_same(source_model(section(path), CLASSES), model)
    with pytest.raises(
        InputError, match=r"its head has 5 classes, and 7 are needed; `model\.new_head"
    ):
        source_model(section(path), 7)
    assert source_model(section(path, new_head=True), 7)(IMAGES).shape == (2, 7)
    with pytest.raises(InputError, match="name the model that was saved"):
        source_model(section(path, depth=3), CLASSES)


# ---- refused ----


def test_a_missing_entry_names_what_the_entries_begin_with(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    content = {f"vit.{name}": each for name, each in state.items() if name != "norm.bias"}
    line = refusal(tmp_path / "w.pth", {"state_dict": content})
    assert "it has no entry 'norm.bias'" in line
    assert "its entries begin with 'state_dict.vit.blocks', 'state_dict.vit.patch_embed'" in line


def test_names_of_another_model_are_listed(tmp_path: Path) -> None:
    content = {f"layer{number}.conv.weight": torch.zeros(2) for number in range(6)}
    line = refusal(tmp_path / "w.pth", content)
    assert f"none of its entries is named as in {NAME}; its entries begin with 'layer0'" in line
    assert "and 2 others" in line
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(InputError, match="its entries begin with 'layer0'"):
        classes_in(section(tmp_path / "w.pth"))


def test_names_of_another_library(tmp_path: Path) -> None:
    content = {
        "vit.encoder.layer.0.attention.attention.query.weight": torch.zeros(2),
        "vit.layernorm.weight": torch.zeros(2),
    }
    assert "names of transformers: build the model" in refusal(tmp_path / "w.pth", content)
    assert "names of torchvision" in refusal(
        tmp_path / "w.pth", {"conv_proj.weight": torch.zeros(2)}
    )


@pytest.mark.parametrize(
    ("convert", "words"),
    [
        (lambda each: each.to(torch.int8), "contains numbers of type int8"),
        (lambda each: each.to(torch.complex64), "contains numbers of type complex64"),
        (lambda each: each.to("meta"), "has no values"),
        (lambda each: each * float("inf"), "contains NaN or infinity"),
    ],
)
def test_other_numbers(
    tmp_path: Path,
    state: dict[str, Tensor],
    convert: Callable[[Tensor], Tensor],
    words: str,
) -> None:
    content = {**state, "norm.weight": convert(state["norm.weight"])}
    assert f"norm.weight {words}" in refusal(tmp_path / "w.pth", content)


@pytest.mark.parametrize("name", ["fc_norm.weight", "blocks.0.attn.rel_pos", "decoder_pos_embed"])
def test_unknown_entries_are_not_skipped(
    tmp_path: Path, state: dict[str, Tensor], name: str
) -> None:
    content = prefixed("module.", {**state, name: torch.zeros(24)})
    assert f"its entry {name!r} is not part of {NAME}" in refusal(tmp_path / "w.pth", content)


def test_one_name_in_two_forms(tmp_path: Path, state: dict[str, Tensor]) -> None:
    content = {**state, "module.norm.bias": torch.zeros(24)}
    assert "are 'norm.bias' of" in refusal(tmp_path / "w.pth", content)


# ---- new heads ----


def test_another_number_of_classes_names_the_way_out(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    line = refusal(tmp_path / "w.pth", prefixed("module.", state), classes=7)
    assert "its head has 5 classes, and 7 are needed; `model.new_head = true`" in line
    bare = {name: each for name, each in state.items() if not name.startswith("head.")}
    line = refusal(tmp_path / "w.pth", bare)
    assert "it has no head ('head.weight' is missing, its entries begin with 'blocks'" in line
    assert "`model.new_head = true`" in line


@pytest.mark.parametrize("classes", [CLASSES, 7])
def test_a_new_head_keeps_everything_else(
    tmp_path: Path, model: Any, state: dict[str, Tensor], classes: int
) -> None:
    bare = {name: each for name, each in state.items() if not name.startswith("head.")}
    pretraining = {
        **bare,
        "mask_token": torch.zeros(1, 1, 24),
        "decoder_blocks.0.norm1.weight": torch.zeros(8),
        "head.mlp.0.weight": torch.zeros(3, 24),
    }
    for content in (state, bare, pretraining):
        torch.save(prefixed("backbone.", content), tmp_path / "w.pth")
        found: Any = source_model(section(tmp_path / "w.pth", new_head=True), classes)
        assert found(IMAGES).shape == (2, classes)
        assert torch.equal(found.forward_features(IMAGES), model.forward_features(IMAGES))
        if classes == CLASSES:
            assert not torch.equal(found.head.weight, model.head.weight)


def test_a_new_head_on_a_saved_model(tmp_path: Path, model: nn.Module) -> None:
    folder = save(model, tmp_path / "saved")
    with pytest.raises(InputError, match=r"the model has 5 classes, .*`model.new_head = true`"):
        source_model(section(folder), 7)
    found: Any = source_model(section(folder, new_head=True), 7)
    assert found(IMAGES).shape == (2, 7)
    assert torch.equal(found.features(IMAGES), lift(model).features(IMAGES))
    assert float(found.head.weight.abs().max()) > 0
    headless = save(tiny_vit(num_classes=0), tmp_path / "headless")
    found = source_model(section(headless, new_head=True), 4)
    assert found(IMAGES).shape == (2, 4)
    assert_same(load(save(found, tmp_path / "again")).eval(), found.eval())


def test_a_new_head_of_two_classifiers(tmp_path: Path) -> None:
    name = "deit_tiny_distilled_patch16_224"
    source = timm.create_model(name, num_classes=5, **SIZES)
    torch.save({"model": source.state_dict()}, tmp_path / "w.pth")
    part = ModelSection(
        name=name, overrides=SIZES, checkpoint=str(tmp_path / "w.pth"), new_head=True
    )
    assert source_model(part, 3)(IMAGES).shape == (2, 3)
    with pytest.raises(InputError, match="its head has 5 classes, and 3 are needed"):
        source_model(part.model_copy(update={"new_head": False}), 3)


def test_a_new_head_needs_weights_and_training() -> None:
    part = ModelSection(new_head=True)
    with pytest.raises(InputError, match=r"without model\.checkpoint or model\.pretrained"):
        require_trained_head(part, 3)
    part = ModelSection(new_head=True, pretrained=True)
    with pytest.raises(InputError, match=r"a new head has to be trained; set baseline\.epochs"):
        require_trained_head(part, 0)
    require_trained_head(part, 3)
    require_trained_head(ModelSection(), 0)


def test_the_data_config_is_the_preprocessing_of_the_run(tmp_path: Path, model: nn.Module) -> None:
    preprocessing = Preprocessing(
        channels=3,
        height=16,
        width=16,
        interpolation="bilinear",
        resize="center-crop",
        crop_ratio=0.9,
        mean=(0.1, 0.2, 0.3),
        std=(0.4, 0.5, 0.6),
    )
    small = load(save(with_preprocessing(lift(model), preprocessing), tmp_path / "model"))
    assert resolve_model_data_config(small) == {
        "input_size": (3, 16, 16),
        "interpolation": "bilinear",
        "mean": (0.1, 0.2, 0.3),
        "std": (0.4, 0.5, 0.6),
        "crop_pct": 0.9,
        "crop_mode": "center",
    }
    squashed = with_preprocessing(small, preprocessing.model_copy(update={"resize": "squash"}))
    assert resolve_model_data_config(squashed)["crop_mode"] == "squash"
    assert resolve_model_data_config(squashed)["crop_pct"] == 1.0
    assert torch.equal(squashed.eval()(IMAGES), small(IMAGES))


# ---- on the command line ----


def test_compact_reads_a_wrapped_checkpoint_with_another_ending(
    tmp_path: Path, model: nn.Module, state: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "weights.model"
    save_file(prefixed("_orig_mod.module.", state), path)
    words = [word for key, value in SIZES.items() for word in ("--override", f"{key}={value}")]
    out = tmp_path / "out"
    assert call(["compact", str(path), "--model", NAME, *words, "--out", str(out)]) == 0
    with torch.no_grad():
        assert relative_error(load(out).eval()(IMAGES), model(IMAGES)) < 1e-5
    (tmp_path / "folder").mkdir()
    save_file(state, tmp_path / "folder" / "model.safetensors")
    capsys.readouterr()
    assert call(["compact", str(tmp_path / "folder"), "--model", NAME]) == 2
    assert "name a file in it: model.safetensors" in capsys.readouterr().err
