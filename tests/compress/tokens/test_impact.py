"""Equation 6 of Patch Slimming: the recursion equals the sum over all paths of heads."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from tiny_models import tiny_vit
from torch import Tensor
from vitrim.compress.tokens.counts import attention_steps, read_counts, whole_counts
from vitrim.compress.tokens.impact import impacts, passed_down, received, stem_impact, top_down
from vitrim.compress.tokens.streaming import (
    Attended,
    DenseStreams,
    observed_step,
    silent,
    working_copy,
)

BATCH, HEADS, TOKENS, CHANNELS = 2, 2, 5, 3


def random_maps(blocks: int, seed: int = 0) -> list[Tensor]:
    """Attention weights of each block, (batch, heads, tokens, tokens), double precision."""
    torch.manual_seed(seed)
    shape = (BATCH, HEADS, TOKENS, TOKENS)
    return [torch.randn(shape, dtype=torch.float64).softmax(-1) for _ in range(blocks)]


def kept(*tokens: int) -> Tensor:
    keep = torch.zeros(TOKENS, dtype=torch.float64)
    keep[list(tokens)] = 1.0
    return keep


# m_1 of the first block is free; m_2 and m_3 of the later blocks are nested, the last is the class.
SETS = [kept(0, 1, 2, 3, 4), kept(0, 2, 3), kept(0)]


def outer_products(maps: list[Tensor], stream: Tensor) -> Tensor:
    """A[:, i] U[i, :] for each path of heads and token i: (paths, batch, tokens, tokens, channels).

    A = D_L P_L ... D_2 P_2 and U = P_1 |Z_0|, by definition.
    """
    found = []
    for heads in product(range(HEADS), repeat=len(maps)):
        a = torch.eye(TOKENS, dtype=torch.float64).expand(BATCH, -1, -1)
        for block in range(1, len(maps)):
            a = torch.diag(SETS[block]) @ maps[block][:, heads[block]] @ a
        u = maps[0][:, heads[0]] @ stream.abs()
        found.append(torch.einsum("bji,bic->bijc", a, u))
    return torch.stack(found)


@pytest.mark.parametrize("blocks", [2, 3])
def test_the_recursion_equals_the_sum_over_all_paths(blocks: int) -> None:
    maps = random_maps(blocks)
    stream = torch.randn(BATCH, TOKENS, CHANNELS, dtype=torch.float64)
    wanted = outer_products(maps, stream).square().sum(dim=(0, 3, 4))
    gram = torch.eye(TOKENS, dtype=torch.float64).expand(BATCH, -1, -1)
    for block in range(blocks - 1, 0, -1):
        d = torch.diag(SETS[block])
        gram = passed_down(d @ gram @ d, maps[block])
    sums = received([Attended(stream, maps[0], stream[:, None])])
    found = gram.diagonal(dim1=1, dim2=2) * sums
    torch.testing.assert_close(found, wanted)


def test_the_recursion_over_kept_rows_equals_that_with_zero_rows() -> None:
    maps = random_maps(3)
    last = passed_down(torch.ones(BATCH, 1, 1, dtype=torch.float64), maps[2][:, :, :1])
    zeros = torch.diag(SETS[2])
    wanted = passed_down(zeros.expand(BATCH, -1, -1), maps[2])
    torch.testing.assert_close(last, wanted)


def test_the_sum_of_the_outer_products_is_the_exact_error_of_linear_attention() -> None:
    maps = random_maps(3)
    stream = torch.rand(BATCH, TOKENS, CHANNELS, dtype=torch.float64)
    dropped = torch.tensor([False, True, False, True, True])

    def output(first: Tensor) -> Tensor:
        z = stream
        for block, keep in enumerate([first, *SETS[1:]]):
            z = torch.diag(keep) @ maps[block].sum(dim=1) @ z
        return z

    error = output(SETS[0]) - output((~dropped).double())
    terms = outer_products(maps, stream)
    torch.testing.assert_close(terms[:, :, dropped].sum(dim=(0, 2)), error)


@pytest.fixture
def images() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(3, 3, 16, 16)


def test_impacts_of_a_network_equal_those_of_its_attention_maps(images: Tensor) -> None:
    model = working_copy(tiny_vit(depth=3, num_heads=2))
    mixing = attention_steps(model.architecture)
    sets = [torch.arange(5) < count for count in whole_counts(model.architecture)]
    found = impacts(model, DenseStreams(model, images, mixing), sets, mixing)
    with torch.no_grad():
        x, maps, read = model.embed(images), [], []
        for number in range(len(model.steps)):
            before = x
            x, attended = observed_step(model, number, x)
            if attended:
                maps.append(attended[0].maps.double())
                read.append(before.double())
    for place, step in enumerate(mixing):
        total = torch.zeros(3, 5, dtype=torch.float64)
        for heads in product(range(2), repeat=3 - place):
            a = torch.eye(5, dtype=torch.float64).expand(3, -1, -1)
            for head, block in zip(heads[1:], maps[place + 1 :], strict=True):
                a = block[:, head] @ a
            # The head reads the class token alone.
            u = maps[place][:, heads[0]] @ read[place].abs()
            total += a[:, 0].square() * u.square().sum(dim=-1)
        torch.testing.assert_close(found[step], total.mean(dim=0), rtol=1e-4, atol=1e-6)


def test_the_impact_after_the_stem_uses_the_embedded_patches(images: Tensor) -> None:
    model = working_copy(tiny_vit(depth=1, num_heads=2))
    sets = [torch.arange(5) < count for count in whole_counts(model.architecture)]
    with torch.no_grad():
        x = model.embed(images)
        maps = observed_step(model, 0, x)[1][0].maps
    wanted = maps[:, :, 0].square().sum(dim=1) * x.square().sum(dim=-1)
    found = stem_impact(model, DenseStreams(model, images, ()), sets)
    torch.testing.assert_close(found, wanted.double().mean(dim=0), rtol=1e-4, atol=1e-6)


def test_scores_come_from_the_network_as_pruned_so_far(images: Tensor) -> None:
    model = working_copy(tiny_vit(depth=3, num_heads=2))
    counts = read_counts(model.architecture, [4, 3, 1])
    sets, scores = top_down(model, images, counts, silent)
    # The maps of the third block run over the three tokens that the second one keeps.
    mixing = attention_steps(model.architecture)
    whole = [torch.ones(5, dtype=torch.bool) for _ in sets]
    pruned = [*whole[:3], *sets[3:]]
    found = impacts(model, DenseStreams(model, images, ()), pruned, [0])[0]
    torch.testing.assert_close(found, scores[0])
    unpruned = [*whole[:-2], *sets[-2:]]
    other = impacts(model, DenseStreams(model, images, ()), unpruned, [0])[0]
    assert not torch.allclose(other, scores[0])
    assert set(scores) == {mixing[0], mixing[1]}
