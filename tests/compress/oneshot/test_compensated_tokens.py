"""Compensation and trimming of networks from which tokens leave."""

from __future__ import annotations

import pytest
import torch
from tiny_models import relative_error, tiny_vit
from torch import Tensor
from vitrim import InputError, StructuredMask, compact, compensate, lift, masked
from vitrim.compress.network.count import count_macs
from vitrim.compress.network.modules.model import CompactModel
from vitrim.compress.oneshot.choice import priced
from vitrim.compress.oneshot.report import compare_features
from vitrim.compress.oneshot.stream import Stream
from vitrim.compress.oneshot.trim import TrimOptions, trim


def dense() -> CompactModel:
    return lift(tiny_vit(img_size=32, depth=3)).eval()


def images(count: int = 24) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(4))


def token_mask(model: CompactModel) -> StructuredMask:
    return StructuredMask.random(model, {"token": 0.4}, seed=3)


def test_the_stream_of_a_network_with_dropped_tokens_is_that_of_its_forward_pass() -> None:
    model = dense()
    small = compact(model, token_mask(model)).eval()
    stream = Stream(small, images(4))
    while not stream.finished:
        stream.advance()
    with torch.no_grad():
        assert torch.equal(stream.batches[0], small.features(images(4)))


def test_the_kept_tokens_follow_the_dense_stream_after_compensation() -> None:
    model = dense()
    cut = compact(model, token_mask(model)).eval()
    fitted, fits = compensate(cut, model, images())
    assert fitted.architecture.step_tokens() == cut.architecture.step_tokens()
    assert all(fit.after <= fit.before for fit in fits)
    before = compare_features(model, cut, images())
    after = compare_features(model, fitted.eval(), images())
    assert after.cosine > before.cosine
    assert after.patch_cosine is not None
    assert before.patch_cosine is not None
    assert after.patch_cosine > before.patch_cosine > 0.0


def test_where_all_patches_leave_there_is_no_cosine_of_patches() -> None:
    model = dense()
    keep = torch.zeros(model.architecture.tokens, dtype=torch.bool)
    keep[0] = True
    last = model.architecture.branches[-1].name
    cut = compact(model, StructuredMask({"token": {last: keep}})).eval()
    found = compare_features(model, cut, images())
    assert found.patch_cosine is None
    assert found.cosine > 0.9
    # Also beside a network that they leave, too, as that before the widths are cut.
    assert compare_features(cut, cut, images()).patch_cosine is None


def test_widths_are_compensated_in_a_network_whose_tokens_leave() -> None:
    model = dense()
    shorter = compact(model, token_mask(model)).eval()
    mask = StructuredMask.random(shorter, {"ffn": 0.6, "head": 0.7}, seed=1, scale="original")
    cut = compact(shorter, mask).eval()
    with torch.no_grad():
        assert relative_error(cut(images(2)), masked(shorter, mask)(images(2))) < 1e-5
    fitted, fits = compensate(cut, shorter, images())
    assert sum(fit.after for fit in fits) < sum(fit.before for fit in fits)
    assert fitted.architecture.order == shorter.architecture.order


def test_a_network_that_drops_more_tokens_is_compensated_at_those_that_both_carry() -> None:
    model = dense()
    shorter = compact(model, token_mask(model)).eval()
    again = compact(shorter, StructuredMask.random(shorter, {"token": 0.5}, seed=9)).eval()
    assert again.architecture.token_places != shorter.architecture.token_places
    fitted, fits = compensate(again, shorter, images())
    assert fits
    assert sum(fit.after for fit in fits) < sum(fit.before for fit in fits)
    before = compare_features(shorter, again, images())
    after = compare_features(shorter, fitted.eval(), images())
    assert after.cosine > before.cosine


def test_a_dense_network_without_tokens_of_the_compact_one_is_refused() -> None:
    model = dense()
    shorter = compact(model, token_mask(model)).eval()
    with pytest.raises(InputError, match="give the network before the token mask"):
        compensate(model, shorter, images(4))


@pytest.mark.parametrize("removed", [(0,), (4,), (2, 4), (0, 2, 4)])
def test_attentions_at_which_tokens_leave_may_be_removed(removed: tuple[int, ...]) -> None:
    """Tokens then leave elsewhere: at the stem, or not at all where the head reads one."""
    model, size = dense(), 17
    sets = {
        model.architecture.branches[step].name: torch.arange(size) < count
        for step, count in ((0, 12), (2, 7), (4, 1))
    }
    shorter = compact(model, StructuredMask({"token": sets})).eval()
    names = [shorter.architecture.branches[number].name for number in removed]
    mask = StructuredMask({"block": dict.fromkeys(names, torch.zeros(1, dtype=torch.bool))})
    cut = compact(shorter, mask, last_queries=True).eval()
    with torch.no_grad():
        assert relative_error(cut(images(2)), masked(shorter, mask)(images(2))) < 1e-5
    _, fits = compensate(cut, shorter, images())
    assert len(fits) == 6 - len(removed)
    assert all(fit.after <= fit.before for fit in fits)
    assert sum(fit.after for fit in fits) < sum(fit.before for fit in fits)


def test_a_network_whose_tokens_leave_is_trimmed_to_a_budget() -> None:
    model = dense()
    shorter = compact(model, token_mask(model)).eval()
    found = trim(shorter, images(), macs=0.6, options=TrimOptions(round_to=2))
    assert count_macs(found.model.architecture) <= 0.6 * count_macs(priced(shorter.architecture))
    assert found.model.architecture.order == shorter.architecture.order
    exact = compact(found.rotated, found.mask)
    reference = masked(found.rotated, found.mask)
    with torch.no_grad():
        assert relative_error(exact.eval()(images(2)), reference.eval()(images(2))) < 1e-5
