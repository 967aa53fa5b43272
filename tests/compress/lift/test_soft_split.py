"""T2T-ViT is read whole, with its soft splits, and is refused by path where a part has no rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from t2t_vit import T2TViT
from tiny_models import add_noise, assert_exact, relative_error
from torch import Tensor, nn
from vitrim import UnsupportedModel, lift
from vitrim.compress.network.architecture import SoftSplitSpec
from vitrim.compress.network.count import count_params

KINDS = ("performer", "transformer")


def tiny_t2t(kind: Any = "performer", img_size: int = 32) -> Any:
    torch.manual_seed(0)
    shape: Any = {"token_dim": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "classes": 5}
    return add_noise(T2TViT(kind, img_size=img_size, **shape))


@pytest.mark.parametrize("kind", KINDS)
def test_t2t_vit_is_pruned_exactly(kind: str) -> None:
    lifted = assert_exact(tiny_t2t(kind), torch.randn(2, 3, 32, 32))
    stem = lifted.architecture.stem
    assert [layer.kernel for layer in stem.before] == [(7, 7), (3, 3)]
    assert all(isinstance(layer, SoftSplitSpec) for layer in stem.before)
    assert (stem.patch, stem.stride, stem.padding) == ((3, 3), (2, 2), (1, 1))
    assert lifted.architecture.image == (3, 32, 32)
    assert lifted.architecture.grid == (2, 2)


def test_the_random_features_are_read_and_are_no_parameters() -> None:
    source = tiny_t2t()
    lifted = lift(source)
    first: Any = lifted.before[0]  # type: ignore[index]
    assert torch.equal(first.features, source.tokens_to_token.attention1.w)
    assert not any("features" in name for name, _ in lifted.named_parameters())
    assert "before.0.features" in lifted.state_dict()
    # The position of the class token is folded into the token.
    fixed = 2 * source.tokens_to_token.attention1.w.numel() + 24
    expected = sum(p.numel() for p in source.parameters()) - fixed
    assert count_params(lifted.architecture) == expected


def test_keys_that_come_before_queries_are_read_by_the_features() -> None:
    """Where queries and keys were swapped, each token would weight the others in another way."""
    source, lifted = tiny_t2t(), lift(tiny_t2t())
    kqv = source.tokens_to_token.attention1.kqv.weight
    qkv = lifted.get_parameter("before.0.qkv.weight")
    assert torch.equal(qkv[:8], kqv[8:16])
    assert torch.equal(qkv[8:16], kqv[:8])


def test_a_scale_of_the_published_models_is_read() -> None:
    source = tiny_t2t("transformer")
    source.tokens_to_token.attention1.attn.scale = 0.7
    lifted, images = lift(source), torch.randn(2, 3, 32, 32)
    first = lifted.architecture.stem.before[0]
    assert isinstance(first, SoftSplitSpec)
    assert first.scale == 0.7
    with torch.no_grad():
        assert relative_error(lifted(images), source(images)) < 1e-5


class SquaredFeatures(nn.Module):
    """A performer with the published names and other features."""

    def __init__(self, other: Any) -> None:
        super().__init__()
        self.kqv: nn.Module = other.kqv
        self.proj: nn.Module = other.proj
        self.norm1: nn.Module = other.norm1
        self.norm2: nn.Module = other.norm2
        self.mlp: nn.Module = other.mlp
        self.w, self.epsilon = other.w, other.epsilon

    def forward(self, x: Tensor) -> Tensor:
        k, q, v = self.kqv(self.norm1(x)).chunk(3, dim=-1)
        k, q = (k @ self.w.T).square(), (q @ self.w.T).square()
        y = q @ (k.transpose(1, 2) @ v) / (q @ k.sum(dim=1).unsqueeze(-1) + self.epsilon)
        x = v + self.proj(y)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


def test_a_performer_with_other_features_is_refused() -> None:
    model = tiny_t2t()
    attention = model.tokens_to_token
    attention.attention1 = SquaredFeatures(attention.attention1)
    with pytest.raises(
        UnsupportedModel,
        match=r"tokens_to_token: .*T2TModule computes something else than soft splits and "
        r"attention in the order of its parts \(outputs differ",
    ):
        lift(model)


def test_a_hook_in_a_soft_split_is_refused() -> None:
    model = tiny_t2t()
    layer = model.tokens_to_token.attention2.norm2
    layer.register_forward_hook(lambda module, args, output: output * 0.5)
    with pytest.raises(
        UnsupportedModel,
        match=r"^tokens_to_token: .*outputs differ by .*: "
        r"tokens_to_token\.attention2\.norm2 has a forward hook$",
    ):
        lift(model)


@pytest.mark.parametrize(
    ("kind", "change", "named"),
    [
        ("performer", lambda t: delattr(t.attention1, "w"), r"attention1: no matrix w"),
        ("performer", lambda t: delattr(t, "attention2"), r"token: no attention2 after"),
        ("performer", lambda t: delattr(t, "project"), r"token: no project, the Linear after"),
        (
            "performer",
            lambda t: setattr(t, "soft_split1", nn.Unfold(3, dilation=2, stride=2, padding=2)),
            r"soft_split1: a window with dilation 2 has no rule",
        ),
        (
            "performer",
            lambda t: setattr(t, "attention1", nn.Linear(147, 8)),
            r"attention1: no rule for torch.nn.modules.linear.Linear after a soft split",
        ),
        (
            "performer",
            lambda t: setattr(t.attention1, "mlp", nn.Linear(8, 8)),
            r"attention1.mlp: .*Linear where Linear, activation, Linear was expected",
        ),
        (
            "transformer",
            lambda t: setattr(t.attention1.attn, "num_heads", 2),
            r"attention1.attn: 2 heads after a soft split; one has a rule",
        ),
        (
            "transformer",
            lambda t: setattr(t.attention2, "norm1", nn.Identity()),
            r"attention2: no norm1",
        ),
    ],
)
def test_a_part_without_a_rule_is_refused_with_its_path(kind: str, change: Any, named: str) -> None:
    model = tiny_t2t(kind)
    change(model.tokens_to_token)
    with pytest.raises(UnsupportedModel, match=rf"tokens_to_{named}|tokens_to_token\.{named}") as e:
        lift(model)
    assert "\n" not in str(e.value)
