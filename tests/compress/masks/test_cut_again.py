"""A model whose sub-layers read and write channels of their own is cut again by every criterion."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from tiny_models import SHARINGS, relative_error, tiny_vit
from typer.testing import CliRunner
from vitrim import StructuredMask, compact, lift, masked, save
from vitrim.cli import app
from vitrim.compress.masks.groups import Sharing
from vitrim.compress.masks.magnitude import magnitude, unit_costs
from vitrim.compress.masks.ranking import Scope
from vitrim.compress.masks.saliency import Criterion
from vitrim.compress.network.modules.model import CompactModel

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("vit_tiny_patch16_224", {}),
    "distilled": ("deit_base_distilled_patch16_224", {}),
    "features": ("vit_tiny_patch16_224", {"num_classes": 0}),
    "attention pooling": ("vit_so400m_patch14_siglip_224", {}),
    "norm after the sub-layer": ("vit_base_patch16_rpn_224", {}),
    "norms in the stem": ("vit_base_patch16_clip_quickgelu_224", {}),
    "parallel": ("vit_base_patch16_xp_224", {}),
    "mean of the tokens": ("vit_tiny_patch16_224", {"global_pool": "avg"}),
}
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))


def unshared(kind: str = "plain", seed: int = 0) -> CompactModel:
    name, overrides = MODELS[kind]
    model = lift(tiny_vit(name, **overrides))
    return compact(model, StructuredMask.random(model, 0.6, "unshared", seed=seed))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("scope", get_args(Scope))
@pytest.mark.parametrize("sharing", SHARINGS)
def test_a_model_cut_by_unshared_masks_is_cut_again(
    kind: str, scope: Scope, sharing: Sharing
) -> None:
    model = unshared(kind)
    for criterion in ("l1", "l2"):
        mask = StructuredMask.from_saliency(
            model, criterion, keep_ratio=0.7, scope=scope, sharing=sharing
        )
        small = compact(model, mask)
        with torch.no_grad():
            assert relative_error(small(IMAGES), masked(model, mask)(IMAGES)) < 1e-5
        compact(small, StructuredMask.from_saliency(small, criterion, sharing=sharing))


@pytest.mark.parametrize("criterion", ["taylor", "head", "random"])
def test_other_criteria_cut_such_a_model_again(criterion: Criterion) -> None:
    model = unshared()
    data = [(IMAGES, torch.tensor([0, 1]))]
    for sharing in ("unshared", "residual"):
        mask = StructuredMask.from_saliency(model, criterion, sharing=sharing, data=data)
        with torch.no_grad():
            assert relative_error(compact(model, mask)(IMAGES), masked(model, mask)(IMAGES)) < 1e-5


def test_scores_count_the_weights_that_a_channel_has() -> None:
    model = unshared()
    state, architecture = dict(model.named_parameters()), model.architecture
    scores = magnitude(architecture, state, 2, "unshared")["embed"]
    costs = unit_costs(architecture, state, "unshared")["embed"]
    for number, step in enumerate(architecture.steps):
        for position, branch in enumerate(step):
            leaf = "out" if branch.core.kind == "attention" else "fc2"
            rows = state[f"steps.{number}.{position}.core.{leaf}.weight"].detach().square().sum(1)
            channels = list(branch.writes or range(architecture.embed))
            found, cost = scores[f"{branch.name}.out"], costs[f"{branch.name}.out"]
            torch.testing.assert_close(found[channels], rows)
            absent = torch.ones(architecture.embed, dtype=torch.bool)
            absent[channels] = False
            assert not found[absent].any()
            assert not cost[absent].any()
    shared = magnitude(architecture, state, 2, "residual")["embed"]["*"]
    torch.testing.assert_close(shared, torch.stack(list(scores.values())).sum(0))


def test_the_command_line_cuts_such_a_model_again(tmp_path: Path) -> None:
    save(unshared(), tmp_path / "model")
    for sharing in ("residual", "unshared"):
        for scope in get_args(Scope):
            for saliency in ("l1", "l2"):
                options = ["--keep-ratio", "0.5", "--sharing", sharing, "--scope", scope]
                arguments = ["compact", str(tmp_path / "model"), "--saliency", saliency, *options]
                result = CliRunner().invoke(app, arguments)
                assert result.exit_code == 0, result.output
