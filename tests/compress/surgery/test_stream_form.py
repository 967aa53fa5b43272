"""Index lists or zeros: both compute the same, and the choice follows the stated cost."""

from __future__ import annotations

import pytest
import torch
from tiny_models import relative_error, tiny_vit
from vitrim import StructuredMask, compact
from vitrim.compress.network.modules.model import CompactModel
from vitrim.compress.surgery import stream_form
from vitrim.compress.surgery.stream_form import choose_stream_form

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> CompactModel:
    source = tiny_vit(init_values=0.5)
    return compact(source, StructuredMask.random(source, 0.6, sharing="unshared", seed=4))


@pytest.mark.parametrize("price", [0, 10, 10**6])
def test_the_output_stays_equal_at_every_price(
    model: CompactModel, monkeypatch: pytest.MonkeyPatch, price: int
) -> None:
    monkeypatch.setattr(stream_form, "SCATTER_MACS", price)
    monkeypatch.setattr(stream_form, "FILL_MACS", price)
    chosen = choose_stream_form(model)
    with torch.no_grad():
        assert relative_error(chosen.model(IMAGES), model(IMAGES)) < 1e-6
    written = [branch.writes is None for branch in chosen.model.architecture.branches]
    assert all(written) if price == 10**6 else True
    assert not any(written) if price == 0 else True


def test_every_choice_is_listed_and_is_the_cheaper_one(model: CompactModel) -> None:
    choices = {choice.site: choice for choice in choose_stream_form(model).choices}
    assert set(choices) == {
        "stem.out",
        "head.in",
        *(
            f"blocks.{n}.{kind}.{way}"
            for n in (0, 1)
            for kind in ("attn", "ffn")
            for way in ("in", "out")
        ),
    }
    for site, choice in choices.items():
        if "statistics" in choice.why:
            assert site.endswith(".in")
            assert choice.form == "index"
        elif choice.why == "cheaper":
            assert choice.form == ("dense" if choice.dense_macs <= choice.index_macs else "index")


def test_shared_masks_have_nothing_to_choose() -> None:
    source = tiny_vit()
    cut = compact(source, StructuredMask.random(source, 0.5))
    chosen = choose_stream_form(cut)
    assert chosen.choices == ()
    assert chosen.model is cut
