"""A lifted model computes what its source computes now; other models are refused by path."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import timm
import torch
from lv_vit import LVViT
from tiny_models import add_noise, relative_error, tiny_vit
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
from torch.utils.hooks import RemovableHandle
from torchvision.models.vision_transformer import ConvStemConfig, VisionTransformer
from vitrim import StructuredMask, UnsupportedModel, compact, lift, masked, save

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
KEEP = torch.arange(24) > 7


def difference(model: nn.Module) -> float:
    """The error of the lifted model, relative to the largest output of the source."""
    lifted = lift(model).eval()
    with torch.no_grad():
        return relative_error(lifted(IMAGES), model.eval()(IMAGES))


def halved(module: nn.Module, args: Any, output: Any) -> Any:
    return output * 0.5


def first_channels(module: nn.Module, args: Any) -> Any:
    return (args[0] * KEEP,)


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("patch_embed.proj", r"patch_embed\.proj has a forward hook"),
        ("patch_drop", "patch_drop has a forward hook"),
        ("blocks.0", r"blocks\.0: .*blocks\.0 has a forward hook"),
        ("blocks.0.norm1", r"blocks\.0: .*blocks\.0\.norm1 has a forward hook"),
        ("blocks.0.attn.qkv", r"blocks\.0\.attn: .*blocks\.0\.attn\.qkv has a forward hook"),
        ("blocks.0.attn", r"blocks\.0\.attn: .*blocks\.0\.attn has a forward hook"),
        ("blocks.0.ls1", r"blocks\.0: .*blocks\.0\.ls1 has a forward hook"),
        ("blocks.1.mlp.fc1", r"blocks\.1\.mlp: .*blocks\.1\.mlp\.fc1 has a forward hook"),
        ("blocks.1.drop_path2", r"blocks\.1: .*blocks\.1\.drop_path2 has a forward hook"),
        ("norm", "norm has a forward hook"),
        ("head", "head has a forward hook"),
        ("", "the model has a forward hook"),
    ],
)
def test_a_hook_that_changes_an_output_is_refused_by_path(path: str, named: str) -> None:
    model = tiny_vit()
    model.get_submodule(path).register_forward_hook(halved)
    with pytest.raises(UnsupportedModel, match=named):
        lift(model)


def test_a_hook_that_changes_an_input_is_refused_by_path() -> None:
    model = tiny_vit()
    model.get_submodule("blocks.0.attn.proj").register_forward_pre_hook(first_channels)
    with pytest.raises(
        UnsupportedModel, match=r"blocks\.0\.attn\.proj has a forward pre-hook"
    ) as refusal:
        lift(model)
    assert "\n" not in str(refusal.value)
    model = tiny_vit()
    model.register_forward_pre_hook(lambda module, args: ((args[0] - 0.5) / 0.25,))
    with pytest.raises(UnsupportedModel, match="the model has a forward pre-hook"):
        lift(model)


def test_a_hook_that_is_hidden_by_a_small_layer_scale_is_refused() -> None:
    model = tiny_vit(init_values=1e-6).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                parameter.fill_(1e-7)
    model.get_submodule("blocks.0.mlp.act").register_forward_hook(halved)
    with pytest.raises(UnsupportedModel, match=r"blocks\.0\.mlp"):
        lift(model)


def test_a_hook_that_is_hidden_by_a_classifier_of_zeros_is_refused() -> None:
    model = tiny_vit()
    with torch.no_grad():
        for parameter in model.get_submodule("head").parameters():
            parameter.zero_()
    lift(model)
    model.get_submodule("norm").register_forward_hook(halved)
    with pytest.raises(UnsupportedModel, match="norm has a forward hook"):
        lift(model)


def test_every_function_that_lifts_refuses_a_hook(tmp_path: Path) -> None:
    model = tiny_vit()
    mask = StructuredMask.random(model, 0.5)
    model.get_submodule("blocks.1.attn").register_forward_hook(halved)
    calls: list[Callable[[], object]] = [
        lambda: compact(model, mask),
        lambda: masked(model, mask),
        lambda: save(model, tmp_path / "model"),
        lambda: StructuredMask.from_saliency(model, "l2"),
    ]
    for call in calls:
        with pytest.raises(UnsupportedModel, match=r"blocks\.1\.attn has a forward hook"):
            call()


def test_without_the_proof_hooks_are_ignored(tmp_path: Path) -> None:
    model = tiny_vit()
    mask = StructuredMask.random(model, 0.5)
    wanted = lift(model)(IMAGES)
    model.get_submodule("blocks.1.attn").register_forward_hook(halved)
    assert torch.equal(lift(model, proof=False)(IMAGES), wanted)
    compact(model, mask, proof=False)
    masked(model, mask, proof=False)
    save(model, tmp_path / "model", proof=False)


class Recorder:
    """A hook that counts its calls and keeps what it saw."""

    def __init__(self) -> None:
        self.calls, self.seen = 0, list[Tensor]()
        self.by_name: dict[str, list[Tensor]] = {}

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.calls += 1
        self.seen.append(output)
        self.by_name.setdefault("output", []).append(output)

    def before(self, module: nn.Module, args: Any) -> None:
        self.calls += 1


GLOBAL_CALLS: list[int] = []
global_count = 0


def counts_globally(module: nn.Module, args: Any, output: Any) -> None:
    global global_count
    global_count += 1
    GLOBAL_CALLS.append(global_count)


def test_a_hook_that_only_records_is_allowed_and_not_called() -> None:
    model = tiny_vit()
    recorder, calls, count = Recorder(), list[int](), 0

    def counts(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal count
        count += 1
        calls.append(count)

    model.get_submodule("blocks.0").register_forward_hook(recorder)
    model.get_submodule("blocks.1").register_forward_pre_hook(recorder.before)
    model.get_submodule("blocks.1.mlp").register_forward_hook(counts)
    model.get_submodule("norm").register_forward_hook(counts_globally)
    model.get_submodule("head").register_forward_hook(
        functools.partial(lambda kept, module, args, output: kept.append(output), recorder.seen)
    )
    model(IMAGES)  # With gradients: recorded tensors are part of a graph.
    recorded = len(recorder.seen), len(recorder.by_name["output"]), recorder.calls
    before = (*recorded, count, list(calls), global_count, list(GLOBAL_CALLS))
    lift(model)
    recorded = len(recorder.seen), len(recorder.by_name["output"]), recorder.calls
    assert before == (*recorded, count, list(calls), global_count, list(GLOBAL_CALLS))


def test_a_hook_that_removes_itself_stays() -> None:
    model = tiny_vit()
    handles: list[RemovableHandle] = []
    handle = model.register_forward_hook(lambda *args: handles[0].remove())
    handles.append(handle)
    lift(model)
    assert len(model._forward_hooks) == 1
    handle.remove()
    assert not model._forward_hooks


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("pool", lambda self, x, pool_type=None: x.mean(dim=1)),
        ("_pos_embed", lambda self, x: type(self)._pos_embed(self, x) * 2),
        ("forward_head", lambda self, x, pre_logits=False: self.head(x[:, 1])),
        (
            "forward_features",
            lambda self, x, **more: type(self).forward_features(self, x).flip(1),
        ),
    ],
)
def test_a_method_that_was_replaced_on_the_model_is_refused(name: str, changed: Any) -> None:
    model = tiny_vit()
    setattr(model, name, MethodType(changed, model))
    with pytest.raises(UnsupportedModel, match=rf"the model has its own {name}"):
        lift(model)


def test_a_method_that_was_replaced_in_a_class_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_vit()
    kind = type(model.blocks[0].attn)
    original = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x, **more: original(self, x, **more) * 2)
    with pytest.raises(UnsupportedModel, match=r"blocks\.0\.attn: .*Attention\.forward"):
        lift(model)


def test_a_replaced_method_that_computes_the_same_is_allowed() -> None:
    model = tiny_vit()
    model.pool = MethodType(lambda self, x, pool_type=None: x[:, 0], model)  # type: ignore[assignment]
    assert difference(model) < 1e-6


def test_a_loop_over_the_blocks_in_another_order_is_refused() -> None:
    model: Any = tiny_vit()
    features = type(model).forward_features

    def reversed_features(self: Any, x: Tensor, **more: Any) -> Tensor:
        kept, self.blocks = self.blocks, nn.Sequential(*reversed(self.blocks))
        try:
            return features(self, x)  # type: ignore[no-any-return]
        finally:
            self.blocks = kept

    model.forward_features = MethodType(reversed_features, model)
    with pytest.raises(UnsupportedModel, match="the model has its own forward_features"):
        lift(model)


def test_a_model_that_cannot_run_is_refused_with_the_reason() -> None:
    model: Any = tiny_vit()
    model.blocks[1].attn.head_dim = 7
    with pytest.raises(
        UnsupportedModel, match=r"model: it raises RuntimeError on .*\(2, 3, 16, 16\)"
    ):
        lift(model)


def narrowed(model: Any, kept: int) -> Any:
    """Narrow all heads in place, as other tools do, and leave `scale` unchanged."""
    for block in model.blocks:
        attn = block.attn
        columns = torch.cat([torch.arange(kept) + 8 * head for head in range(3)])
        rows = torch.cat([columns, columns + 24, columns + 48])
        qkv, proj = nn.Linear(24, 3 * 3 * kept), nn.Linear(3 * kept, 24)
        qkv.weight.data, qkv.bias.data = attn.qkv.weight.data[rows] * 3, attn.qkv.bias.data[rows]
        proj.weight.data, proj.bias.data = attn.proj.weight.data[:, columns], attn.proj.bias.data
        attn.qkv, attn.proj, attn.head_dim, attn.attn_dim = qkv, proj, kept, 3 * kept
    return model


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "eva02_small_patch14_224",
        "beit_base_patch16_224",
        "vit_relpos_base_patch16_224",
        "vit_dwee_patch16_reg1_gap_256",
        "vit_base_patch16_xp_224",
        "vit_tiny_patch16_dinov3_qkvb",
    ],
)
def test_the_scale_is_that_of_the_attention_that_runs(name: str, fused: bool) -> None:
    model: Any = tiny_vit(name)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn, module.scale = fused, 1.5
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert difference(model) < 1e-5
    assert any("fused_attn" in str(warning.message) for warning in caught)
    assert all(
        module.fused_attn is fused for module in model.modules() if hasattr(module, "fused_attn")
    )


@pytest.mark.parametrize("fused", [True, False])
def test_heads_that_were_narrowed_in_place_keep_the_scale_that_runs(fused: bool) -> None:
    model = narrowed(tiny_vit(), 4)
    for block in model.blocks:
        block.attn.fused_attn = fused
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert difference(model) < 1e-5


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["vit_so400m_patch14_siglip_224", "vit_tiny_patch16_224"])
def test_the_scale_of_a_pool_is_that_of_the_attention_that_runs(name: str, fused: bool) -> None:
    more: dict[str, Any] = {"global_pool": "prr"} if "tiny" in name else {}
    model: Any = tiny_vit(name, **more)
    model.attn_pool.fused_attn, model.attn_pool.scale = fused, 1.5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert difference(model) < 1e-5


def test_a_scale_of_each_head_is_refused() -> None:
    model: Any = tiny_vit()
    model.blocks[0].attn.fused_attn = False
    model.blocks[0].attn.scale = torch.tensor([0.1, 0.2, 0.3])[:, None, None]
    with pytest.raises(UnsupportedModel, match=r"blocks\.0\.attn\.scale"):
        lift(model)


def pruned(seed: int) -> nn.Module:
    model: Any = tiny_vit(seed=seed)
    for block in model.blocks:
        for layer in (block.mlp.fc1, block.mlp.fc2, block.attn.qkv):
            prune.l1_unstructured(layer, "weight", 0.5)
        prune.ln_structured(block.mlp.fc1, "weight", 0.2, n=2, dim=0)
        prune.random_unstructured(block.mlp.fc1, "bias", 0.5)
        prune.l1_unstructured(block.norm1, "weight", 0.3)
    prune.l1_unstructured(model, "pos_embed", 0.5)
    prune.l1_unstructured(model.patch_embed.proj, "weight", 0.5)
    result: nn.Module = model
    return result


def test_prune_masks_are_folded_when_a_state_dict_was_loaded(tmp_path: Path) -> None:
    model, other = pruned(2), pruned(1)
    model.load_state_dict(other.state_dict())
    stale = model.get_submodule("blocks.0.mlp.fc1").weight
    lifted = lift(model)
    assert model.get_submodule("blocks.0.mlp.fc1").weight is stale
    with torch.no_grad():
        assert relative_error(lifted(IMAGES), other(IMAGES)) < 1e-6
        assert torch.equal(lift(model, proof=False)(IMAGES), lifted(IMAGES))
        mask = StructuredMask.random(lifted, 0.5)
        assert torch.equal(compact(model, mask)(IMAGES), compact(lifted, mask)(IMAGES))


def test_prune_masks_on_a_lifted_model_are_folded(tmp_path: Path) -> None:
    model = lift(tiny_vit())
    for module in list(model.modules()):
        if isinstance(module, nn.Linear):
            prune.l1_unstructured(module, "weight", 0.5)
    wanted = model(IMAGES)
    assert relative_error(lift(model)(IMAGES), wanted) < 1e-6
    mask = StructuredMask.random(model, 0.5)
    assert relative_error(compact(model, mask)(IMAGES), masked(model, mask)(IMAGES)) < 1e-5
    assert "weight_orig" not in str(list(lift(model).state_dict()))


def test_a_prune_mask_that_the_model_itself_does_not_apply_is_refused() -> None:
    # torch's MultiheadAttention reads the weight of out_proj without calling it.
    def pruned_projection(amount: float) -> nn.Module:
        model = add_noise(VisionTransformer(16, 8, 2, 3, 24, 48, num_classes=5))
        attention = model.get_submodule("encoder.layers.encoder_layer_0.self_attention")
        prune.l1_unstructured(attention, "in_proj_weight", amount)
        prune.l1_unstructured(attention.get_submodule("out_proj"), "weight", amount)
        return model

    torch.manual_seed(0)
    other, model = pruned_projection(0.5), pruned_projection(0.2)
    assert difference(other) < 1e-5
    model.load_state_dict(other.state_dict())
    with pytest.raises(UnsupportedModel, match=r"encoder_layer_0\.self_attention"):
        lift(model)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        weight_norm,
        spectral_norm,
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        lambda layer: parametrize.register_parametrization(layer, "weight", Doubled()),
    ],
    ids=["weight norm", "spectral norm", "new weight norm", "new spectral norm", "own"],
)
def test_parametrized_layers_are_folded(change: Any, training: bool) -> None:
    def changed() -> Any:
        model: Any = tiny_vit()
        for layer in (model.patch_embed.proj, model.blocks[0].attn.qkv, model.blocks[1].mlp.fc2):
            change(layer)
        return model

    model = changed().train(training)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    before = copy.deepcopy(model.state_dict())
    lifted = lift(model).eval()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    with torch.no_grad():
        assert relative_error(lifted(IMAGES), model.eval()(IMAGES)) < 1e-5


def test_parametrized_tokens_of_the_model_are_folded() -> None:
    model = tiny_vit()
    parametrize.register_parametrization(model, "pos_embed", Doubled())
    assert difference(model) < 1e-6


def test_lifting_changes_nothing_of_the_source() -> None:
    stem = [ConvStemConfig(8, 3, 2)] * 3
    model = add_noise(
        VisionTransformer(16, 8, 2, 3, 24, 48, dropout=0.5, num_classes=5, conv_stem_configs=stem)
    ).train()
    model.get_submodule("encoder.layers.encoder_layer_0").eval()
    flags = {name: module.training for name, module in model.named_modules()}
    before, versions = copy.deepcopy(model.state_dict()), _versions(model)
    state = torch.get_rng_state()
    with torch.enable_grad():
        lift(model)
        assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert flags == {name: module.training for name, module in model.named_modules()}
    assert versions == _versions(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def _versions(model: nn.Module) -> dict[str, tuple[int, int]]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: (id(tensor), tensor._version) for name, tensor in tensors}


class CountsCalls(nn.Module):
    """A block of another library that counts, in an attribute and in a buffer."""

    total: Tensor

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = (
            block.norm1,
            block.attn,
            block.norm2,
            block.mlp,
        )
        self.calls = 0
        self.register_buffer("total", torch.zeros(1))

    def forward(self, x: Tensor, **more: Any) -> Tensor:
        self.calls += 1
        self.total += 1
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


def test_counters_of_the_source_do_not_change() -> None:
    model: Any = tiny_vit()
    model.blocks[1] = CountsCalls(model.blocks[1])
    lift(model)
    assert model.blocks[1].calls == 0
    assert model.blocks[1].total.item() == 0


@pytest.mark.parametrize(
    "change",
    [
        {"img_size": (16, 24)},
        {"in_chans": 1},
        {"drop_rate": 0.3, "attn_drop_rate": 0.3, "drop_path_rate": 0.3, "proj_drop_rate": 0.2},
        {"patch_drop_rate": 0.5},
        {"init_values": 1e-5},
        {"dynamic_img_size": True},
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_the_proof_raises_no_false_alarm(change: dict[str, Any], training: bool) -> None:
    lift(tiny_vit(**change).train(training))


def test_the_proof_raises_no_false_alarm_in_unusual_contexts() -> None:
    model: Any = tiny_vit()
    model.set_grad_checkpointing(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lift(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            lift(model)
        with torch.inference_mode():
            lift(model)
        torch.set_default_dtype(torch.float64)
        try:
            lift(model)
        finally:
            torch.set_default_dtype(torch.float32)
    model = tiny_vit()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    lift(model)
    lift(add_noise(LVViT(img_size=32, embed_dim=24, depth=1, num_heads=3, classes=5)).train())


def test_a_model_with_large_activations_is_compared_in_double_precision() -> None:
    model: Any = tiny_vit(depth=6)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(40.0)
            block.mlp.fc2.weight.mul_(200.0)
    lift(model)


def test_a_model_without_weights_is_read_without_the_proof() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224", img_size=32)
    assert lift(model).architecture.image == (3, 32, 32)


@pytest.mark.parametrize("path", ["steps.0.0.core.q", "steps.1.0", "norm", ""])
def test_hooks_of_a_lifted_model_are_not_dropped_silently(path: str) -> None:
    model = lift(tiny_vit())
    mask = StructuredMask.everything(model)
    model.get_submodule(path).register_forward_hook(halved)
    for call in (lambda: compact(model, mask), lambda: lift(model), lambda: masked(model, mask)):
        with pytest.raises(UnsupportedModel, match="has a forward hook"):
            call()


def test_two_threads_may_lift_one_model() -> None:
    model = tiny_vit()
    model.register_forward_hook(Recorder())
    before = {name: id(tensor) for name, tensor in model.named_parameters()}
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: lift(model)(IMAGES), range(8)))
    assert all(torch.equal(each, found[0]) for each in found)
    assert before == {name: id(tensor) for name, tensor in model.named_parameters()}


def test_the_note_on_the_other_attention_names_what_differs() -> None:
    model: Any = tiny_vit()
    model.blocks[1].attn.attn_drop.register_forward_hook(halved)
    with pytest.warns(
        UserWarning,
        match=r"^blocks\.1\.attn: with fused_attn = False .*: blocks\.1\.attn\.attn_drop has a",
    ):
        lift(model)
    model.blocks[1].attn.fused_attn = False
    with pytest.raises(UnsupportedModel, match=r"^blocks\.1\.attn: .*attn_drop has a forward hook"):
        lift(model)


def test_hooks_of_the_whole_process_are_no_part_of_the_model() -> None:
    calls = list[str]()
    handle = register_module_forward_hook(lambda module, args, output: calls.append("called"))
    try:
        lift(tiny_vit())
        assert not calls
        tiny_vit()(IMAGES)
        assert calls
    finally:
        handle.remove()


def test_a_default_device_does_not_matter() -> None:
    model = tiny_vit()
    with torch.device("meta"):
        lifted = lift(model)
    assert torch.equal(lifted(IMAGES), lift(model)(IMAGES))
