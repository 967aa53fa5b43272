"""A network has timm's interface with timm's meanings, dense and after a cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import timm
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from random_networks import architectures, network
from timm.data.config import resolve_model_data_config
from timm.models._features import FeatureGetterNet
from timm.optim._param_groups import param_groups_layer_decay
from tiny_models import add_noise, assert_equal_outputs, relative_error, tiny_vit
from torch import Tensor, nn
from torch.func import functional_call
from torchvision.models.vision_transformer import VisionTransformer
from vitrim import InputError, StructuredMask, compact, export, lift, load, masked, resized, save
from vitrim.compress.masks.masked import MaskedModel
from vitrim.compress.masks.masked_parameters import masked_tensors
from vitrim.compress.network.architecture import Architecture, DataSpec, PoolSpec
from vitrim.compress.network.files import read_architecture
from vitrim.compress.network.modules.model import CompactModel
from vitrim.compress.network.named_outputs import output_specs
from vitrim.compress.oneshot.stream_rotation import rotate_stream
from vitrim.compress.oneshot.trim import TrimOptions, trim

# timm's name, and overrides of the settings of `build`.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "registers, layer scale": ("vit_small_patch14_reg4_dinov2", {"init_values": 0.5}),
    "mean, norm after it": ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False}),
    "rope": ("eva02_tiny_patch14_224", {}),
    "rope in halves, registers": ("vit_small_patch16_dinov3", {}),
    "map": ("vit_base_patch16_siglip_224", {}),
    "pre-norm": ("vit_base_patch32_clip_224", {}),
    "parallel": ("vit_small_patch16_18x2_224", {}),
    "relative bias": ("beit_base_patch16_224", {}),
}
BOTH = pytest.mark.parametrize("kind", MODELS)


def build(kind: str, **more: Any) -> nn.Module:
    name, overrides = MODELS[kind]
    torch.manual_seed(0)
    patch = 14 if "patch14" in name else 32 if "patch32" in name else 16
    sizes: dict[str, Any] = {"img_size": (2 * patch, 3 * patch), "depth": 3, "num_heads": 3}
    sizes["embed_dim"] = 48
    return add_noise(timm.create_model(name, **sizes | {"num_classes": 7} | overrides | more))


def noise(model: Any, count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, *lift(model, proof=False).architecture.image, generator=generator)


def assert_same(found: Any, wanted: Any) -> None:
    """Compare tensors, and lists, pairs and dictionaries of them."""
    assert type(found) is type(wanted)
    if isinstance(wanted, Tensor):
        assert found.shape == wanted.shape
        assert_equal_outputs(found, wanted, 1e-5)
    elif isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert_same(found[name], value)
    else:
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_same(one, other)


def methods(images: Tensor) -> dict[str, Callable[[Any], Any]]:
    """Calls of timm's interface on images."""

    def intermediates(**options: Any) -> Callable[[Any], Any]:
        return lambda model: model.forward_intermediates(images, **options)

    return {
        "forward": lambda model: model(images),
        "features": lambda model: model.forward_features(images),
        "head": lambda model: model.forward_head(model.forward_features(images)),
        "pre-logits": lambda model: model.forward_head(
            model.forward_features(images), pre_logits=True
        ),
        "all": intermediates(),
        "last two, tokens": intermediates(indices=2, output_fmt="NLC"),
        "first and last": intermediates(
            indices=[0, -1], norm=True, return_prefix_tokens=True, intermediates_only=True
        ),
        "early": intermediates(indices=[1], stop_early=True),
    }


@BOTH
def test_methods_return_what_those_of_timm_return(kind: str) -> None:
    model: Any = build(kind)
    lifted = lift(model)
    # timm's models without prefix tokens return pairs in one class and none in another.
    if not model.num_prefix_tokens:
        images = noise(model)
        wanted = model.forward_intermediates(images, return_prefix_tokens=True)
        assert_same(lifted.forward_intermediates(images, return_prefix_tokens=True), wanted)
    for call in methods(noise(model)).values():
        with torch.no_grad():
            assert_same(call(lifted), call(model))


@BOTH
def test_facts_are_those_of_timm(kind: str) -> None:
    model: Any = build(kind)
    lifted = lift(model)
    names = "num_classes num_features embed_dim head_hidden_size num_prefix_tokens global_pool"
    for name in names.split():
        assert getattr(lifted, name) == getattr(model, name), name
    assert [info["module"] for info in lifted.feature_info] == ["blocks.0", "blocks.1", "blocks.2"]
    for ours, theirs in zip(lifted.feature_info, model.feature_info, strict=True):
        assert ours == {key: theirs[key] for key in ours}
    for name in ("img_size", "patch_size", "grid_size", "num_patches"):
        assert getattr(lifted.patch_embed, name) == getattr(model.patch_embed, name), name
    assert lifted.patch_embed.feat_ratio() == model.patch_embed.feat_ratio()
    config = resolve_model_data_config(model) | {"input_size": lifted.architecture.image}
    assert resolve_model_data_config(lifted) == config


class _Calls(nn.Module):
    """Runs a method of a network, so that `functional_call` can replace its parameters."""

    def __init__(self, inner: nn.Module, call: Callable[[Any], Any]) -> None:
        super().__init__()
        self.inner, self.call = inner, call

    def forward(self) -> Any:
        return self.call(self.inner)


def with_mask(model: MaskedModel, call: Callable[[Any], Any]) -> Any:
    """What a method of a full-size network returns that computes with a mask."""
    network_ = model.network
    parameters = dict(network_.named_parameters())
    changed = masked_tensors(
        network_.architecture, parameters, lambda *site: _keep(model, *site), model.mask.scale
    )
    named = {f"inner.{name}": tensor for name, tensor in changed.items()}
    return functional_call(_Calls(network_, call), named, ())


def _keep(model: MaskedModel, dimension: str, site: str) -> Tensor | None:
    keep = model.mask.get(dimension, site)
    return None if keep is None else keep.to(next(model.parameters()))


@BOTH
def test_a_network_with_a_cut_stream_returns_what_the_masked_one_returns(kind: str) -> None:
    model = build(kind)
    lifted = lift(model)
    mask = StructuredMask.random(lifted, 0.5, "residual", per_head=True)
    small, reference = compact(lifted, mask), masked(lifted, mask)
    assert small.architecture.embed < 48
    assert (small.num_features, small.embed_dim, small.head_hidden_size) == (48, 48, 48)
    assert {info["num_chs"] for info in small.feature_info} == {48}
    for call in methods(noise(model)).values():
        with torch.no_grad():
            assert_same(call(small), with_mask(reference, call))


@BOTH
def test_the_head_reads_features_of_a_network_with_unshared_masks(
    kind: str, tmp_path: Path
) -> None:
    model = build(kind)
    images = noise(model)
    mask = StructuredMask.random(lift(model), 0.5, "unshared")
    small = load(save(compact(model, mask), tmp_path / "model"))
    reference, kept = masked(model, mask), small.architecture.stream_channels
    channels = list(range(48) if kept is None else kept)

    def tokens(each: Any) -> Any:
        return each.forward_intermediates(images, output_fmt="NLC", intermediates_only=True)

    with torch.no_grad():
        features = small.forward_features(images)
        wanted = with_mask(reference, lambda each: each.forward_features(images))
        # Without a final norm, the masked model applies the mask of the head when it pools.
        read = list(small.architecture.read_places)
        assert_same(features[..., read], wanted[..., read])
        assert int((features != 0).any(dim=0).any(dim=0).sum()) == len(read)
        assert relative_error(small.forward_head(features), reference(images)) < 1e-5
        # The stream keeps what something reads.
        for found, wanted in zip(tokens(small), with_mask(reference, tokens), strict=True):
            assert_same(found[..., channels], wanted[..., channels])


def test_only_the_last_block_of_a_shortened_network_computes_fewer_tokens() -> None:
    model = build("vit")
    images = noise(model)
    lifted = lift(model)
    shorter = compact(lifted, StructuredMask({}), last_queries=True)
    with torch.no_grad():
        assert shorter.features(images).shape[1] == 1
        assert_same(shorter.forward_features(images), lifted.forward_features(images))


def test_a_removed_block_returns_the_tokens_before_it() -> None:
    lifted = lift(build("vit"))
    images = noise(lifted)
    none = torch.zeros(1, dtype=torch.bool)
    mask = StructuredMask({"block": {"blocks.1.attn": none, "blocks.1.ffn": none}})
    small = compact(lifted, mask)
    assert len(small.steps) == 4
    with torch.no_grad():
        first, second, third = small.forward_intermediates(images, intermediates_only=True)
    assert torch.equal(first, second)
    assert not torch.equal(second, third)


def test_the_bias_of_a_removed_attention_stays_in_its_block() -> None:
    lifted = lift(build("vit"))
    heads = torch.zeros(3, dtype=torch.bool)
    hidden = torch.zeros(192, dtype=torch.bool)
    for entries in (
        {"head": {"blocks.1.attn": heads}},
        {"ffn": {"blocks.1.ffn": hidden}},
        {"head": {"blocks.0.attn": heads, "blocks.1.attn": heads}, "ffn": {"blocks.0.ffn": hidden}},
    ):
        mask = StructuredMask(entries)
        small, reference = compact(lifted, mask), masked(lifted, mask)
        for call in methods(noise(lifted)).values():
            with torch.no_grad():
                assert_same(call(small), with_mask(reference, call))


def unpooled(architecture: Architecture) -> Architecture:
    update: dict[str, Any] = {"pool": PoolSpec(kind="none"), "pool_norm": None, "head": None}
    update |= {"last_queries": False, "feature_width": None, "feature_writes": None}
    if architecture.head_reads is not None:
        update |= {"feature_width": architecture.embed, "feature_writes": architecture.head_reads}
    return Architecture.model_validate(
        architecture.model_copy(update=update).model_dump(by_alias=True)
    )


@settings(
    max_examples=30,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(architecture=architectures(), sharing=st.sampled_from(["residual", "unshared"]))
def test_tokens_of_a_cut_network_equal_those_of_the_masked_one(
    architecture: Architecture, sharing: Any
) -> None:
    model = network(unpooled(architecture))
    images = torch.randn(2, *architecture.image, dtype=torch.float64)
    mask = StructuredMask.random(model, 0.5, sharing, seed=0)
    try:
        small, reference = compact(model, mask), masked(model, mask)
    except InputError as error:
        if "one at least" not in str(error):
            raise
        reject()
    with torch.no_grad():
        found, wanted = small(images), reference(images)
        assert found.shape == (2, architecture.tokens, architecture.embed)
        assert_equal_outputs(found, wanted, 1e-9)
        assert_equal_outputs(small.forward_features(images), wanted, 1e-9)


POOLINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "token": ("vit", {"global_pool": "token"}),
    "avg": ("vit", {"global_pool": "avg"}),
    "max": ("vit", {"global_pool": "max"}),
    "map": ("map", {}),
    "none": ("vit", {"global_pool": ""}),
    "none, rope": ("rope", {"global_pool": ""}),
    "none, no norm": ("vit", {"global_pool": "", "final_norm": False}),
    "distilled": ("distilled", {}),
}


@pytest.mark.parametrize("name", POOLINGS)
def test_a_backbone_is_lifted_cut_trimmed_and_saved(name: str, tmp_path: Path) -> None:
    kind, overrides = POOLINGS[name]
    model: Any = build(kind, num_classes=0, **overrides)
    images = noise(model, 24)
    lifted = lift(model)
    mask = StructuredMask.random(lifted, 0.5, "residual")
    small = compact(model, mask)
    trimmed = trim(model, images, macs=0.8, options=TrimOptions(round_to=1))
    assert trimmed.check.cosine > 0.5
    with torch.no_grad():
        wanted = model(images)
        assert relative_error(lifted(images), wanted) < 1e-5
        assert small(images).shape == trimmed.model(images).shape == wanted.shape
        assert relative_error(small(images), masked(model, mask)(images)) < 1e-5
        for number, each in enumerate((lifted, small, trimmed.model)):
            again = load(save(each, tmp_path / str(number)))
            assert again.architecture == each.architecture
            assert torch.equal(again(images), each.eval()(images))


def test_tokens_are_exported_by_name(tmp_path: Path) -> None:
    model = build("vit", num_classes=0, global_pool="")
    small = compact(model, StructuredMask.random(model, 0.5, "residual"))
    options: dict[str, Any] = {"runtime": "onnxruntime", "precision": "fp32"}
    with pytest.raises(InputError, match=r"name its outputs: outputs=\['patches'\]"):
        export(small, tmp_path / "without", **options)
    artifact = export(small, tmp_path / "with", outputs=["patches", "blocks.0"], **options)
    session = onnxruntime.InferenceSession(
        str(artifact.folder / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    images = noise(small, 1)
    found = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    # One of our graph forms, not torch's own graph.
    assert "matrix" in artifact.manifest.form
    with torch.no_grad():
        wanted = [
            small(images)[:, 1:],
            *small.forward_intermediates(images, [0], output_fmt="NLC", intermediates_only=True),
        ]
    for value, tokens in zip(found, wanted, strict=True):
        assert_equal_outputs(torch.from_numpy(value), tokens, 2e-5)


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (
            {"blocks": ("blocks.1", "blocks.0", "blocks.2")},
            "blocks has no block of blocks.1.attn, or in another order",
        ),
        ({"blocks": ("blocks.0",) * 2}, "two blocks have the same path"),
        ({"stream_width": 60}, "stream_width and stream_channels need each other"),
        (
            {"stream_width": 60, "stream_channels": (1, 2)},
            "stream_channels names 2 channels, the stream has 48",
        ),
        (
            {"stream_width": 4, "stream_channels": tuple(range(48))},
            "stream_channels must be increasing indices below 4",
        ),
        (
            {"data": DataSpec(mean=(0.5,), std=(0.5,))},
            "data.mean has 1 numbers, images have 3 channels",
        ),
        ({"pool": PoolSpec(kind="none")}, "a classifier needs a pooling, pool.kind is 'none'"),
    ],
)
def test_an_architecture_that_contradicts_itself_is_refused(
    update: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = save(lift(build("vit")), tmp_path / "model")
    architecture = read_architecture(folder / "architecture.json")
    changed = architecture.model_copy(update=update)
    (folder / "architecture.json").write_text(changed.model_dump_json(by_alias=True))
    with pytest.raises(InputError) as error:
        load(folder)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "names",
    [
        ("blocks.0", "blocks.1", "blocks.2"),
        ("encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1", "encoder.layers.x2"),
        ("vit.layers.0", "vit.layers.1", "vit.layers.2"),
    ],
)
def test_the_blocks_of_older_files_follow_from_the_names_of_branches(
    names: tuple[str, ...],
) -> None:
    architecture = lift(build("vit")).architecture
    steps = [
        tuple(
            branch.model_copy(update={"name": f"{names[number // 2]}.{branch.name[9:]}"})
            for branch in step
        )
        for number, step in enumerate(architecture.steps)
    ]
    older = architecture.model_copy(update={"steps": tuple(steps), "blocks": None})
    assert older.block_names == names
    assert older.block_ends == (2, 4, 6)


def test_the_data_config_is_saved_and_resized(tmp_path: Path) -> None:
    model = build("pre-norm")
    small = compact(model, StructuredMask.random(model, 0.5, "residual"))
    again = load(save(small, tmp_path / "model"))
    wanted = resolve_model_data_config(model)
    assert resolve_model_data_config(again) == wanted | {"input_size": (3, 64, 96)}
    larger = resized(again, "96x96")
    assert resolve_model_data_config(larger) == wanted | {"input_size": (3, 96, 96)}
    assert again.default_cfg == again.pretrained_cfg


def test_a_model_of_other_channels_has_no_data_config() -> None:
    lifted = lift(tiny_vit(in_chans=1))
    assert lifted.architecture.data is None
    assert lifted.pretrained_cfg["input_size"] == (1, 16, 16)


@pytest.mark.parametrize("kind", ["vit", "distilled", "map", "mean, norm after it"])
@pytest.mark.parametrize("classes", [4, 0])
def test_a_reset_classifier_is_trained_saved_and_loaded(
    kind: str, classes: int, tmp_path: Path
) -> None:
    model = build(kind)
    images = noise(model)
    small = compact(model, StructuredMask.random(model, 0.5, "residual"))
    dense_width = small.head_hidden_size
    small.reset_classifier(classes)
    assert small.num_classes == classes
    assert small.num_features == dense_width == 48
    outputs = small(images)
    assert outputs.shape == (2, classes or 48)
    outputs.square().sum().backward()
    first = small.get_classifier()
    if kind == "distilled":
        assert isinstance(first, tuple)
        first = first[0]
    if classes:
        assert first.weight.grad is not None
    else:
        assert isinstance(first, nn.Identity)
    with torch.no_grad():
        again = load(save(small, tmp_path / "model"))
        assert torch.equal(again(images), small.eval()(images))
        features = again.forward_features(images)
        assert relative_error(again.forward_head(features), again(images)) < 1e-5


@pytest.mark.parametrize("kind", ["vit", "registers, layer scale", "map", "rope"])
@pytest.mark.parametrize("pool", ["", "avg", "max", "avgmax", "token"])
def test_the_pooling_is_reset_as_in_timm(kind: str, pool: str, tmp_path: Path) -> None:
    model: Any = build(kind)
    images = noise(model)
    lifted = lift(model)
    small = compact(lifted, StructuredMask.random(lifted, 0.5, "residual"))
    if pool == "token" and not lifted.num_prefix_tokens:
        with pytest.raises(InputError, match="pool 'token' needs 1 prefix tokens, the stem has 0"):
            lifted.reset_classifier(0, pool)
        return
    for each in (model, lifted, small):
        each.reset_classifier(0, pool)
    with torch.no_grad():
        assert_same(lifted(images), model(images))
        assert small(images).shape == model(images).shape
        removed = small(images) == 0
        assert int(removed.reshape(-1, 48).all(dim=0).sum()) == 48 - small.architecture.embed
        assert torch.equal(load(save(small, tmp_path / "model"))(images), small.eval()(images))


def test_a_hidden_layer_of_the_head_goes_with_its_classifier() -> None:
    sizes = {"image_size": 32, "patch_size": 8, "num_layers": 1, "num_heads": 3}
    model = VisionTransformer(**sizes, hidden_dim=24, mlp_dim=48, representation_size=10)
    lifted = lift(add_noise(model))
    assert lifted.head_hidden_size == 24
    lifted.reset_classifier(4)
    assert lifted.pre_head is None
    assert lifted(torch.randn(1, 3, 32, 32)).shape == (1, 4)


@pytest.mark.parametrize(
    ("kind", "classes", "pool", "message"),
    [
        ("vit", 0, "map", "global_pool = 'map': attention pooling cannot be added; choose '', "),
        ("vit", 0, "mean", "global_pool = 'mean': choose one of '', 'avg', 'avgmax', "),
        ("vit", 3, "", "model: a classifier needs a pooling, pool.kind is 'none'"),
        (
            "distilled",
            3,
            "avg",
            "global_pool = 'avg': the two classifiers of this network read tokens of their own; "
            "keep 'token'",
        ),
    ],
)
def test_a_pooling_that_does_not_fit_is_refused(
    kind: str, classes: int, pool: str, message: str
) -> None:
    lifted = lift(build(kind))
    before = lifted.architecture
    with pytest.raises(InputError) as error:
        lifted.reset_classifier(classes, pool)
    assert str(error.value).startswith(message)
    assert lifted.architecture == before


def test_blocks_and_formats_that_do_not_exist_are_refused() -> None:
    lifted = lift(build("vit"))
    images = noise(lifted)
    for options, message in (
        ({"indices": [3]}, "indices: block 3 of 3; they are counted from 0, negative ones"),
        ({"indices": 4}, "indices = 4: the model has 3 blocks, 1 to 3 work"),
        ({"indices": []}, "indices: empty; name at least one block"),
        ({"output_fmt": "NHWC"}, "output_fmt = 'NHWC': choose 'NCHW' or 'NLC'"),
    ):
        call: Any = lifted.forward_intermediates
        with pytest.raises(InputError) as error:
            call(images, **options)
        assert str(error.value).startswith(message)
    with pytest.raises(InputError, match=r"call vitrim\.resized\(model, size\)"):
        lifted.set_input_size((32, 32))
    with pytest.raises(InputError, match=r"image size \(64, 64\): this network is for \(32, 48\)"):
        lifted.patch_embed.dynamic_feat_size((64, 64))


def test_tokens_of_a_rotated_stream_are_refused() -> None:
    model = build("vit")
    images = noise(model, 24)
    turned = rotate_stream(model, images)
    with torch.no_grad():
        assert relative_error(turned(images), model(images)) < 1e-4
    calls: list[Callable[[], Any]] = [
        lambda: turned.forward_features(images),
        lambda: turned.forward_intermediates(images),
        lambda: turned.forward_head(torch.zeros(1, 7, 48)),
        lambda: output_specs(turned.architecture, ["blocks.0"]),
        lambda: output_specs(turned.architecture, ["features"]),
    ]
    for call in calls:
        with pytest.raises(InputError, match=r"trim it with TrimOptions\(stream=False\)"):
            call()
    with pytest.raises(InputError, match="stream_rotated needs a head or attention pooling"):
        turned.reset_classifier(0)
    turned.reset_classifier(4)
    assert turned(images).shape == (24, 4)
    pooled = rotate_stream(build("map", num_classes=0), images)
    assert output_specs(pooled.architecture, ["features"])[0].shape == (48,)


@pytest.mark.parametrize("norm", [False, True])
def test_timm_extracts_features_of_a_cut_network(norm: bool, tmp_path: Path) -> None:
    model = build("registers, layer scale")
    images = noise(model)
    lifted = lift(model)
    small = compact(lifted, StructuredMask.random(lifted, 0.5, "residual"))
    options: dict[str, Any] = {"indices": [0, 1], "norm": norm, "intermediates_only": True}
    with torch.no_grad():
        for each in (lifted, small):
            wanted = each.forward_intermediates(images, **options)
            getter = FeatureGetterNet(each, out_indices=(0, 1), norm=norm)
            assert_same(getter(images), wanted)
            assert getter.feature_info.channels() == [48, 48]
            assert getter.feature_info.reduction() == [14, 14]
            assert len(each.steps) == 4
            assert each.head is None
            again = load(save(each, tmp_path / f"{each is small}"))
            assert torch.equal(again(images), each.eval()(images))


def test_layer_decay_groups_parameters_as_for_timm() -> None:
    model: Any = build("vit")
    lifted = lift(model)
    none = torch.zeros(1, dtype=torch.bool)
    small = compact(
        lifted, StructuredMask({"block": {"blocks.1.attn": none, "blocks.1.ffn": none}})
    )

    def groups(each: Any) -> list[tuple[float, float]]:
        found = param_groups_layer_decay(
            each, 0.05, no_weight_decay_list=each.no_weight_decay(), layer_decay=0.5
        )
        return [(group["lr_scale"], group["weight_decay"]) for group in found]

    assert groups(lifted) == groups(model)
    # One block less, hence one factor less.
    assert groups(small) == groups(model)[2:]
    assert lifted.no_weight_decay() == {"prefix", "position"}


def test_checkpointing_changes_no_gradient() -> None:
    model = lift(build("rope")).train()
    images = noise(model)
    gradients = []
    for enabled in (False, True):
        model.set_grad_checkpointing(enabled)
        model.zero_grad()
        _, found = model.forward_intermediates(images)
        (model(images).square().sum() + found[1].square().sum()).backward()
        gradients.append([tensor.grad for tensor in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


class SegmentationHead(nn.Module):
    """A decoder as it is written for timm's backbones: two feature maps, fused and upsampled."""

    def __init__(self, backbone: Any, classes: int, indices: tuple[int, ...] = (0, 2)) -> None:
        super().__init__()
        self.backbone, self.indices = backbone, indices
        info = [backbone.feature_info[index] for index in indices]
        self.scale = info[0]["reduction"]
        self.reduce = nn.ModuleList(nn.Conv2d(each["num_chs"], 16, 1) for each in info)
        self.fuse = nn.Conv2d(16 * len(indices), classes, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.backbone.forward_intermediates(
            images, indices=self.indices, norm=True, output_fmt="NCHW", intermediates_only=True
        )
        assert maps[0].shape[2:] == self.backbone.patch_embed.grid_size
        parts = [conv(each) for conv, each in zip(self.reduce, maps, strict=True)]
        return nn.functional.interpolate(
            self.fuse(torch.cat(parts, dim=1)), scale_factor=self.scale, mode="bilinear"
        )


def losses(segmenter: SegmentationHead, images: Tensor, labels: Tensor) -> list[float]:
    optimizer = torch.optim.AdamW(segmenter.parameters(), lr=1e-3)
    found = []
    for _ in range(3):
        loss = nn.functional.cross_entropy(segmenter.train()(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize("kind", ["vit", "rope in halves, registers", "registers, layer scale"])
def test_a_segmenter_trains_on_the_compact_backbone_in_place_of_the_dense_one(
    kind: str, tmp_path: Path
) -> None:
    dense: Any = build(kind, num_classes=0)
    images = noise(dense)
    labels = (images[:, 0] > 0).long()
    torch.manual_seed(0)
    segmenter = SegmentationHead(dense, 2)
    wanted = segmenter(images).shape
    small = compact(dense, StructuredMask.random(dense, 0.5, "residual"))
    # The decoder keeps the weights that it has for the dense backbone.
    segmenter.backbone = load(save(small, tmp_path / "model"))
    assert segmenter(images).shape == wanted == (2, 2, *images.shape[2:])
    first, _, last = losses(segmenter, images, labels)
    assert last < first
    trained = segmenter.backbone
    assert isinstance(trained, CompactModel)
    again = load(save(trained, tmp_path / "trained"))
    with torch.no_grad():
        assert torch.equal(again(images), trained.eval()(images))
