"""Selections by content: the same choices give the same outputs, masked and compact, in any cut."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from random_networks import lone_predictor, network, selecting_architectures
from tiny_models import fvcore_macs, relative_error, tiny_vit, token_counts
from torch import Tensor
from vitrim import (
    InputError,
    StructuredMask,
    choose_tokens,
    compact,
    load,
    masked,
    resized,
    save,
    trim,
)
from vitrim.compress.masks.groups import sites
from vitrim.compress.masks.saliency import Criterion
from vitrim.compress.network.architecture import (
    Architecture,
    Indices,
)
from vitrim.compress.network.cost import live_cost
from vitrim.compress.network.count import count_macs, count_params
from vitrim.compress.network.modules.model import CompactModel
from vitrim.compress.network.modules.select import Choices, Scored, Select, first_places
from vitrim.compress.network.named_outputs import output_specs
from vitrim.compress.surgery.dead_weight import find_dead
from vitrim.compress.surgery.explain import explain
from vitrim.compress.surgery.plan import plan
from vitrim.compress.tokens.select import SCORERS, SelectMethod, chosen_tokens, select_tokens

SLOW = settings(suppress_health_check=list(HealthCheck), max_examples=80)
WIDTHS = {"embed": 0.6, "head": 0.6, "qk": 0.5, "v": 0.5, "ffn": 0.5}


def selecting(method: SelectMethod = "dynamicvit", **options: Any) -> CompactModel:
    """Three blocks on 16 patches and a class token, with a selection in or before the second."""
    model = tiny_vit(img_size=32, depth=3)
    return select_tokens(model, method, **{"stages": [1], "ratio": 0.6, **options})


def images(model: CompactModel, count: int = 2, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (count, *model.architecture.image)
    return torch.randn(shape, generator=generator, dtype=next(model.parameters()).dtype)


def random_mask(data: Any, architecture: Architecture) -> StructuredMask:
    """A mask with random entries of every dimension, or one that a test cannot use."""
    ratio = st.sampled_from([0.4, 0.7, 1.0])
    ratios = {name: data.draw(ratio) for name in ("embed", "head", "qk", "v", "ffn", "token")}
    sharing = data.draw(st.sampled_from(["unshared", "residual"]))
    mask = StructuredMask.random(architecture, ratios, sharing, data.draw(st.integers(0, 99)))
    try:
        mask.check(architecture)
    except InputError:
        assume(False)
    return mask


def translated(found: list[Tensor], source: Architecture, cut: Architecture) -> list[Tensor]:
    """The choices of a network at their places in the stream of a cut one."""
    places = cut.places_in(source)
    assert places is not None
    prefix = source.prefix
    new = {place - prefix: number for number, place in enumerate(places[prefix:])}
    # The tokens that are there, as (source place, place in the cut), in the order of each stream.
    batch = len(found[0])
    present = [sorted(new) for _ in range(batch)]
    old_order = [list(range(source.patches)) for _ in range(batch)]
    result: list[Tensor] = []
    for select, kept in zip(source.selects, found, strict=True):
        rows: list[list[int]] = []
        for image in range(batch):
            chosen = [old_order[image][int(place)] for place in kept[image]]
            streams = sorted(present[image], key=lambda place: new[place])
            rows.append(sorted(streams.index(place) for place in chosen))
            present[image] = list(chosen)
            old_order[image] = list(chosen)
            if select.fused:
                fused = -1 - len(result)
                new[fused] = source.patches + len(result)
                present[image].append(fused)
                old_order[image].append(fused)
        result.append(torch.tensor(rows))
    return result


@SLOW
@given(st.data())
def test_masked_equals_compact_for_the_same_choices(data: Any) -> None:
    model = network(data.draw(selecting_architectures()))
    mask = random_mask(data, model.architecture)
    try:
        cut = compact(model, mask)
    except InputError as error:
        assume("whose attention chooses" not in str(error))
        raise
    x = images(model, data.draw(st.sampled_from([1, 3])))
    reference = masked(model, mask)
    recorded = Choices()
    with torch.no_grad():
        wanted = reference(x, recorded)
        if len(cut.architecture.selects) < len(model.architecture.selects):
            assume(not cut.architecture.selects)
        given_choices = translated(recorded.found, model.architecture, cut.architecture)
        given_choices = given_choices[: len(cut.architecture.selects)]
        found = cut(x, Choices(given=given_choices))
    # Outputs of random networks may be zero.
    assert float((found - wanted).abs().max()) < 1e-9 * (1 + float(wanted.abs().max()))


@SLOW
@given(st.data())
def test_live_cost_is_exact_for_selections(data: Any) -> None:
    source = data.draw(selecting_architectures(countable=True))
    ratio = st.sampled_from([0.3, 0.6, 1.0])
    ratios = {name: data.draw(ratio) for name in ("token", "embed", "head", "qk", "v", "ffn")}
    mask = StructuredMask.random(source, ratios, "residual", data.draw(st.integers(0, 99)))
    tokens = token_counts(source, mask)

    def live(dimension: str, site: str, indices: Indices | None) -> int:
        if dimension == "token":
            return tokens[site] if indices is None else len(indices)
        keep = mask.get(dimension, site)
        if indices is not None and dimension == "ffn":
            return len(indices) if keep is None else int(keep[list(indices)].sum())
        return sites(source, dimension)[site] if keep is None else int(keep.sum())

    try:
        mask.check(source)
        built = plan(source, mask).architecture
    except InputError:
        assume(False)
    # Selections that nothing reads are removed; a budget counts them until then.
    assume(len(built.selects) == len(source.selects))
    assert live_cost(source, live, "macs") == count_macs(built)
    assert live_cost(source, live, "params") == count_params(built)


@pytest.mark.parametrize("method", sorted(SCORERS))
@pytest.mark.parametrize("batch", [1, 7])
def test_choices_survive_a_cut_of_widths(method: SelectMethod, batch: int) -> None:
    model = selecting(method)
    mask = StructuredMask.random(model, WIDTHS, seed=1)
    cut, x = compact(model, mask), images(model, batch)
    one, other = Choices(), Choices()
    with torch.no_grad():
        wanted, found = masked(model, mask)(x, one), cut(x, other)
    assert all(torch.equal(a, b) for a, b in zip(one.found, other.found, strict=True))
    assert relative_error(found, wanted) < 1e-5


@pytest.mark.parametrize("order", list(itertools.permutations(["embed", "attention", "ffn"])))
def test_cuts_of_widths_commute(order: tuple[str, ...]) -> None:
    model = selecting()
    mask = StructuredMask.random(model, WIDTHS, seed=2)
    parts = {
        "embed": {"embed": mask.kept["embed"]},
        "attention": {name: mask.kept[name] for name in ("head", "qk", "v")},
        "ffn": {"ffn": mask.kept["ffn"]},
    }
    cut = model
    for part in order:
        cut = compact(cut, StructuredMask(parts[part]))
    whole = compact(model, mask)
    assert cut.architecture == whole.architecture
    for name, tensor in whole.state_dict().items():
        assert torch.equal(cut.state_dict()[name], tensor), name


def test_predictors_are_cut_by_embed_masks_and_by_their_own() -> None:
    model = selecting()
    select = model.architecture.selects[0]
    assert select.predictor is not None
    site = next(iter(select.hidden_sites))
    width = sites(model.architecture, "ffn")[site]
    keep = torch.ones(width, dtype=torch.bool)
    keep[1 : select.predictor.local] = False
    embed = torch.ones(model.architecture.embed, dtype=torch.bool)
    embed[:3] = False
    cut = compact(model, StructuredMask({"ffn": {site: keep}, "embed": {"*": embed}}))
    spec = cut.architecture.selects[0]
    assert spec.predictor is not None
    assert (spec.predictor.local, spec.predictor.pooled) == (1, select.predictor.pooled)
    assert spec.norm is not None
    assert spec.norm.width == model.architecture.embed - 3
    explained = {m.module for m in explain(model, StructuredMask({"ffn": {site: keep}})).modules}
    assert select.name in explained


@pytest.mark.parametrize("method", sorted(SCORERS))
def test_multiply_adds_are_those_that_fvcore_counts(method: SelectMethod) -> None:
    model = selecting(method)
    cut = compact(model, StructuredMask.random(model, WIDTHS, seed=4))
    assert count_macs(cut.architecture) == fvcore_macs(cut, images(cut, 1))


def test_a_choice_is_the_best_patches_in_their_order_and_ties_go_to_the_first() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert first_places(scores, 2).tolist() == [[1, 2], [0, 1]]
    assert first_places(scores, 4).tolist() == [[1, 2, 3, 4], [0, 1, 2, 3]]


def test_class_attention_is_the_first_row_of_the_attention_in_the_step_before() -> None:
    model = selecting("class-attention")
    x = model.embed(images(model))
    steps: Any = model.steps
    before = model.run_step(steps[1], model.run_step(steps[0], x))
    attention = steps[2][0]
    normed = attention.norm(before)
    q, k = attention.core.queries_and_keys(normed, normed)
    row = attention.core.weights(q, k)[:, :, 0].mean(dim=1)[:, 1:]
    wanted = first_places(row, model.architecture.selects[0].patches)
    found = chosen_tokens(model, images(model))[0]
    assert torch.equal(found, wanted)


def test_a_fused_token_is_the_sum_of_the_dropped_ones_by_their_class_attention() -> None:
    model = selecting("evit")
    select: Any = model.selects[0]
    assert isinstance(select, Select)
    steps: Any = model.steps
    before = model.run_step(steps[1], model.run_step(steps[0], model.embed(images(model))))
    x = model.run_step(steps[2], before)
    weights = select.scores(x, Scored(steps[2][0], before))
    kept = first_places(weights, select.spec.patches)
    dropped = torch.ones_like(weights).scatter(1, kept, 0.0)
    wanted = ((weights * dropped).unsqueeze(-1) * x[:, 1:]).sum(dim=1)
    found, _ = select(x, Scored(steps[2][0], before))
    assert found.shape[1] == 1 + select.spec.patches + 1
    assert relative_error(found[:, -1], wanted) < 1e-5


def test_models_with_selections_are_read_as_they_were_written(tmp_path: Path) -> None:
    model = selecting().eval()
    save(model, tmp_path / "model")
    again = load(tmp_path / "model")
    assert again.architecture == model.architecture
    with torch.no_grad():
        assert torch.equal(again(images(model)), model(images(model)))


def test_a_selection_behind_which_nothing_reads_patches_is_removed() -> None:
    model = selecting("dynamicvit", stages=[1, 2])
    gone = {"block": {f"blocks.2.{part}": torch.tensor([False]) for part in ("attn", "ffn")}}
    cut = compact(model, StructuredMask(gone))
    assert [select.name for select in cut.architecture.selects] == ["select.1"]
    x = images(model)
    with torch.no_grad():
        assert relative_error(cut(x), masked(model, StructuredMask(gone))(x)) < 1e-5


def test_an_attention_that_scores_patches_cannot_be_removed() -> None:
    model = selecting("class-attention")
    gone = {"block": {"blocks.1.attn": torch.tensor([False])}}
    with pytest.raises(InputError, match=r"removes blocks\.1\.attn, whose attention chooses"):
        compact(model, StructuredMask(gone))


def test_what_needs_tokens_by_place_refuses_a_selecting_network() -> None:
    model = selecting()
    with pytest.raises(InputError, match="selects patches for each image"):
        model.forward_features(images(model))
    with pytest.raises(InputError, match="resized: this network selects patches"):
        resized(model, 64)
    with pytest.raises(InputError, match="a cut without training: this network selects patches"):
        trim(model, images(model), macs=0.5)
    with pytest.raises(InputError, match="a choice of tokens by place: this network selects"):
        choose_tokens(model, images=images(model), macs=0.5)
    with pytest.raises(InputError, match="has no output for each"):
        output_specs(model.architecture, ["tokens"])
    with pytest.raises(InputError, match='method = "random": this network selects patches'):
        select_tokens(model, "random")


def test_dead_weight_is_found_around_a_selection_and_its_scores_stay() -> None:
    model = selecting("class-attention", stages=[0]).eval()
    steps: Any = model.steps
    with torch.no_grad():
        # The first head of the scoring attention, and of one that scores nothing.
        for number in (0, 2):
            steps[number][0].core.out.weight[:, :8] = 0
    dead = find_dead(model)
    assert set(dead.mask.kept.get("head", {})) == {"blocks.1.attn"}
    assert [rest.why for rest in dead.remaining if rest.site == "blocks.0.attn"] == [
        "its attention chooses tokens"
    ]
    one, other = Choices(), Choices()
    with torch.no_grad():
        model(images(model), choices=one)
        dead.compact.eval()(images(model), choices=other)
    assert torch.equal(one.found[0], other.found[0])


@pytest.mark.parametrize("method", ["class-attention", "column-attention"])
def test_dead_columns_of_a_scoring_attention_that_no_score_reads_are_removed(
    method: SelectMethod,
) -> None:
    model = selecting(method, stages=[0]).eval()
    core: Any = model.steps[0][0].core  # type: ignore[index]
    with torch.no_grad():
        # One query/key column of each head, a value column that is constant, and one unread.
        core.k.weight[[0, 8, 16]] = 0
        core.v.weight[[1, 9, 17]] = 0
        core.out.weight[:, [2, 10, 18]] = 0
    dead = find_dead(model)
    after: Any = dead.compact.architecture.steps[0][0].core
    # The lengths of values count in the scores of column attention.
    values = 6 if method == "class-attention" else 8
    assert (after.heads, after.qk, after.v) == (3, 7, values)
    assert any("lengths of its values" in rest.why for rest in dead.remaining) == (values == 8)
    assert find_dead(dead.compact).removed == ()


def test_a_scoring_attention_that_adds_nothing_keeps_its_heads_and_one_value_column() -> None:
    model = selecting("class-attention", stages=[0]).eval()
    with torch.no_grad():
        model.steps[0][0].core.out.weight[:] = 0  # type: ignore[index]
    dead = find_dead(model)
    after: Any = dead.compact.architecture.steps[0][0].core
    assert (after.heads, after.qk, after.v) == (3, 8, 1)
    assert [(rest.count, rest.why) for rest in dead.remaining] == [
        (3, "its attention chooses tokens")
    ]


def test_a_channel_that_only_a_predictor_reads_is_not_dead() -> None:
    spec = lone_predictor()
    model = network(spec)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith(("core.fc1.weight", "head.weight")):
                tensor[:, 0] = 0
    assert "embed" not in find_dead(model).mask.kept


@pytest.mark.parametrize("criterion", ["l1", "l2"])
def test_magnitudes_rank_the_units_of_predictors(criterion: Criterion) -> None:
    model = selecting()
    spec = model.architecture.selects[0]
    site = next(iter(spec.hidden_sites))
    predictor: Any = model.selects[0].predictor
    with torch.no_grad():
        # The second pooled unit owns nothing but zeros.
        unit = spec.predictor.local + 1 if spec.predictor else 0
        predictor.fc.weight[unit] = predictor.fc.bias[unit] = 0
        predictor.pooled.weight[:, 1] = 0
    mask = StructuredMask.from_saliency(model, criterion, keep_ratio={"ffn": 0.9}, scope="layer")
    assert not bool(mask.kept["ffn"][site][unit])
    assert "select.1.hidden.0" in StructuredMask.everything(model, "full").kept["ffn"]


def test_layer_decay_counts_a_selection_with_its_block() -> None:
    model = selecting()
    patterns = model.group_matcher()["blocks"]
    found = [depth for pattern, depth in patterns if re.match(pattern, "selects.0.norm.weight")]
    assert found == [(1,)]


def test_ratios_are_those_of_the_official_code() -> None:
    model = tiny_vit(img_size=224, patch_size=16, depth=12)
    counts = [s.patches for s in select_tokens(model, "dynamicvit").architecture.selects]
    assert counts == [137, 96, 67]
    evit = select_tokens(model, "evit", stages=[3, 6, 9]).architecture
    assert [evit.prefix + s.left for s in evit.selects] == [140, 100, 72]
