"""Selections by content in our kernels: for the same choices the outputs are those of torch."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from aarch64 import emulator
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from random_networks import network, selecting_architectures
from selecting_models import positioned_selection
from tvm_networks import (
    HOST,
    assert_lowered_as_by_all_passes,
    compiled_kernels,
    noise,
    ranges_of,
    runnable,
)
from tvm_sample import source
from vitrim.compress.network.architecture import (
    Architecture,
    AttentionSpec,
    BranchSpec,
    DifferentialSpec,
    FfnSpec,
    HeadSpec,
    NormSpec,
    PoolSpec,
    PredictorSpec,
    RelativeBiasSpec,
    SelectSpec,
    StemSpec,
)
from vitrim.compress.network.modules.model import CompactModel
from vitrim.compress.network.modules.select import Choices, Select, first_places
from vitrim.compress.tokens.select import SelectMethod
from vitrim.export.parity import relative_error
from vitrim.export.runtimes import RuntimeFiles, runtime_named
from vitrim.runtimes.subprocess_inference import infer_with_choices
from vitrim.targets.profile import TargetProfile

pytest.importorskip("tvm", reason="TVM is not installed: pip install 'vitrim[tvm]'")

import tvm
from tvm import relax
from vitrim.export.tvm_kernels.attention import Attend
from vitrim.export.tvm_kernels.build import TvmNetwork, build_network, tvm_target
from vitrim.export.tvm_kernels.coverage import uncovered_part
from vitrim.export.tvm_kernels.emitter import Emitter
from vitrim.export.tvm_kernels.lanes import Lanes, RowLayout
from vitrim.export.tvm_kernels.network import choosing_module, kernel_specs
from vitrim.export.tvm_kernels.precision import Name, precision_named
from vitrim.export.tvm_kernels.program import lowering
from vitrim.export.tvm_kernels.schedule import default_schedule
from vitrim.export.tvm_kernels.token_choice import Choose, choose_patches

Places = list[NDArray[np.int64]]


def compiled(
    model: CompactModel,
    profile: TargetProfile,
    images: NDArray[np.float32],
    precision: Name = "fp32",
    threads: int = 1,
) -> tuple[NDArray[np.float32], Places]:
    """Logits of our kernels, and the places that the selections choose."""
    ranges = ranges_of(model) if precision == "int8-static" else None
    unit, batch = profile.vector, len(images)
    form = precision_named(precision, unit, ranges)
    schedule = default_schedule(unit, threads)
    module = choosing_module(model, Lanes.of(unit), schedule, batch, form)
    built = TvmNetwork(module, tvm_target(profile), lowering(), "kernels", threads)
    machine = relax.VirtualMachine(built.compile(), tvm.cpu())
    logits, *chosen = (value.numpy() for value in machine["main"](tvm.runtime.tensor(images)))
    return logits, [places.reshape(batch, -1).astype(np.int64) for places in chosen]


def torchs(
    model: CompactModel, images: NDArray[np.float32], chosen: Places
) -> tuple[NDArray[Any], dict[str, NDArray[Any]]]:
    """Torch's logits for these choices, and its scores of each selection."""
    scores: dict[str, NDArray[Any]] = {}
    own = Select.scores

    def recorded(self: Select, *arguments: Any) -> torch.Tensor:
        found = own(self, *arguments)
        scores.setdefault(self.spec.name, found.numpy())
        return found

    numbers = torch.from_numpy(images).to(next(model.parameters()).dtype)
    places = [torch.from_numpy(part) for part in chosen]
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(Select, "scores", recorded)
        for number in range(len(places)):
            # A selection whose choice is given computes no scores.
            model(numbers, Choices(given=places[:number]))
        found: NDArray[Any] = model(numbers, Choices(given=places)).numpy()
    return found, scores


def assert_equal_to_torch(
    model: CompactModel,
    profile: TargetProfile,
    batch: int,
    tolerance: float,
    threads: int = 1,
    *,
    shared: bool = True,
) -> None:
    """Compare outputs, and choices; `shared`: with the queries and keys of the sub-layer itself."""
    images = noise(model, batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Emitter, "computes_fp32", shared)
        logits, chosen = compiled(model, profile, images, threads=threads)
    wanted, scores = torchs(model, images, chosen)
    assert len(chosen) == len(model.architecture.selects)
    for select, places in zip(model.architecture.selects, chosen, strict=True):
        assert_best(scores[select.name], places, select.patches)
    assert float(relative_error(wanted, logits).max()) < tolerance


def assert_best(scores: NDArray[Any], places: NDArray[np.int64], count: int) -> None:
    """The chosen scores are the largest up to rounding, and their places increase."""
    assert places.shape == (len(scores), count)
    assert (np.diff(places, axis=1) > 0).all()
    stays = np.zeros(scores.shape, bool)
    np.put_along_axis(stays, places, values=True, axis=1)
    least = np.where(stays, scores, np.inf).min(axis=1)
    largest = np.where(stays, -np.inf, scores).max(axis=1)
    assert (least >= largest - 1e-4 * np.abs(scores).max(axis=1)).all()


def selection(name: str, at: int, patches: int, scorer: Any, **options: Any) -> SelectSpec:
    return SelectSpec(name=f"select.{name}", at=at, patches=patches, scorer=scorer, **options)


@cache
def sample(kind: str) -> CompactModel:
    """A class token and 20 patches, of which four selections with every scorer leave five."""
    variants: dict[str, dict[str, Any]] = {
        "plain": {"q_norm": NormSpec(width=9)},
        "direct": {"k_norm": NormSpec(width=9, kind="rms"), "kv_of": (0, 0)},
        "differential": {"differential": DifferentialSpec(start=0.3, width=3)},
    }
    attention = AttentionSpec(heads=2, qk=9, v=14, scale=0.3, **variants[kind])
    steps = tuple(
        (BranchSpec(name=str(number), core=core, norm=NormSpec(width=40)),)
        for number, core in enumerate((attention, attention, FfnSpec(hidden=70)))
    )
    predictor = PredictorSpec(local=5, pooled=4, hidden=(6, 3))
    reads = tuple(range(3, 39, 2))
    architecture = Architecture(
        image=(1, 8, 10),
        embed=40,
        stem=StemSpec(patch=(2, 2)),
        prefix=1,
        steps=steps,
        selects=(
            selection("0", 0, 16, "predictor", predictor=predictor, norm=NormSpec(width=40)),
            selection("1", 1, 11, "class-attention", fused=True),
            selection("2", 2, 9, "column-attention"),
            selection("3", 2, 7, "random", seed=2),
            selection(
                "4", 2, 5, "predictor", predictor=PredictorSpec(local=3, pooled=0), reads=reads
            ),
        ),
        norm=NormSpec(width=40),
        pool=PoolSpec(kind="mean"),
        head=HeadSpec(classes=7),
    )
    return network(architecture)


def with_relative_bias() -> CompactModel:
    """Class attention with a bias, which needs keys; a token mask shortens the stream before."""
    order = tuple(range(19, -1, -1))
    bias = RelativeBiasSpec(grid=(4, 5), prefix=1, order=order)
    core = AttentionSpec(heads=2, qk=9, v=14, scale=0.3, bias=bias)
    steps = (
        (BranchSpec(name="attn", core=core, norm=NormSpec(width=40), tokens=18),),
        (BranchSpec(name="mlp", core=FfnSpec(hidden=30)),),
        (BranchSpec(name="last", core=AttentionSpec(heads=3, qk=5, v=6, scale=0.4)),),
    )
    architecture = Architecture(
        image=(1, 8, 10),
        embed=40,
        stem=StemSpec(patch=(2, 2)),
        prefix=1,
        order=order,
        steps=steps,
        selects=(selection("0", 1, 8, "class-attention"),),
        pool=PoolSpec(kind="token"),
        head=HeadSpec(classes=7),
    )
    return network(architecture)


@pytest.mark.parametrize("kind", ["plain", "direct", "differential"])
@pytest.mark.parametrize(("batch", "shared"), [(1, False), (7, True)])
def test_every_scorer_computes_torchs_outputs(kind: str, batch: int, shared: bool) -> None:
    assert_equal_to_torch(sample(kind), runnable()[0], batch, 1e-5, shared=shared)


@pytest.mark.parametrize("batch", [1, 3])
def test_class_attention_with_positions_reads_keys_of_the_longer_stream(batch: int) -> None:
    assert_equal_to_torch(with_relative_bias(), HOST, batch, 1e-5)


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("rope", "class-attention"),
        ("rope behind registers", "dynamicvit"),
        ("rope of each head", "column-attention"),
        ("relative bias", "class-attention"),
        ("relative bias of patches alone", "column-attention"),
        ("relative bias without learned tokens", "random"),
    ],
)
@pytest.mark.parametrize(("batch", "shared"), [(1, False), (3, True)])
def test_positions_are_those_of_the_rows_that_stay(
    kind: str, method: SelectMethod, batch: int, shared: bool
) -> None:
    model = positioned_selection(kind, method)
    assert_equal_to_torch(model, HOST, batch, 1e-5, threads=1 + (batch > 1), shared=shared)


@pytest.mark.parametrize("kind", ["rope", "relative bias"])
def test_positions_in_eight_bits(kind: str) -> None:
    model = positioned_selection(kind, sharpness=1)
    images = noise(model, 3)
    logits, chosen = compiled(model, HOST, images, "int8")
    assert float(relative_error(torchs(model, images, chosen)[0], logits).max()) < 0.1


def test_threads_share_scores_rows_and_the_columns_of_fused_tokens() -> None:
    assert_equal_to_torch(sample("plain"), runnable()[-1], 3, 1e-5, threads=2)


@pytest.mark.parametrize("precision", ["int8", "int8-static"])
@pytest.mark.parametrize(("kind", "batch"), [("plain", 1), ("direct", 3), ("differential", 3)])
def test_scores_stay_in_fp32_in_eight_bits(kind: str, precision: Name, batch: int) -> None:
    model = sample(kind)
    images = noise(model, batch)
    logits, chosen = compiled(model, HOST, images, precision)
    wanted, scores = torchs(model, images, chosen)
    # Before the first selection nothing is quantized.
    assert_best(scores["select.0"], chosen[0], 16)
    # The same bound as without a selection.
    assert float(relative_error(wanted, logits).max()) < 0.1


@settings(
    max_examples=12,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)
@given(
    architecture=selecting_architectures(),
    batch=st.integers(1, 3),
    threads=st.integers(1, 2),
    unit=st.integers(0, 2),
    shared=st.booleans(),
)
def test_any_covered_network_with_selections_computes_torchs_outputs(
    architecture: Architecture, batch: int, threads: int, unit: int, shared: bool
) -> None:
    assume(uncovered_part(architecture) is None)
    profile = runnable()[unit % len(runnable())]
    assert_equal_to_torch(network(architecture), profile, batch, 1e-4, threads, shared=shared)


@pytest.mark.parametrize("kind", ["direct", "differential"])
def test_passes_that_are_left_out_would_change_no_kernel_of_a_selection(kind: str) -> None:
    assert_lowered_as_by_all_passes(build_network(sample(kind), HOST))


@pytest.mark.parametrize(("patches", "kept"), [(1, 1), (5, 4), (196, 137), (197, 8)])
@pytest.mark.parametrize("unit", range(len(runnable())))
def test_the_first_of_equal_scores_are_chosen(patches: int, kept: int, unit: int) -> None:
    profile, images, stride = runnable()[unit], 60, 3
    rng = np.random.default_rng(patches)
    scores = rng.standard_normal((images, patches)).astype(np.float32)
    # Ties of every number, among them those of both zeros, and infinities.
    scores[:20] = rng.integers(-1, 2, (20, patches)) * rng.choice([-1.0, 1.0], (20, patches))
    scores[20:30] = rng.choice([-np.inf, -0.0, 0.0, 1e-45, -1e-45, np.inf], (10, patches))
    spec = Choose(images, patches, kept, RowLayout(patches, stride))
    kernel = choose_patches(spec, Lanes.of(profile.vector), 1).with_attr("global_symbol", "choose")
    module = compiled_kernels({"choose": kernel}, profile)
    rows = np.zeros((images, patches, stride), np.float32)
    rows[..., 0] = scores
    found = tvm.runtime.tensor(np.full(images * kept, -1, np.int32))
    module["choose"](tvm.runtime.tensor(rows.ravel()), found)
    wanted = first_places(torch.from_numpy(scores), kept).numpy()
    np.testing.assert_array_equal(found.numpy().reshape(images, kept), wanted)


def test_scores_that_are_no_numbers_choose_as_many_places() -> None:
    scores = np.array([-1, 0x7FFFFFFF, 0x7FC00000, 0, 0x3F800000, -0x400000] * 3, np.int32)
    spec = Choose(1, scores.size, 7, RowLayout(scores.size, 1))
    kernel = choose_patches(spec, Lanes.of(HOST.vector), 1).with_attr("global_symbol", "choose")
    module = compiled_kernels({"choose": kernel}, HOST)
    found = tvm.runtime.tensor(np.full(7, -1, np.int32))
    module["choose"](tvm.runtime.tensor(scores.view(np.float32)), found)
    places = found.numpy()
    assert (np.diff(places) > 0).all()
    assert places.min() >= 0
    assert places.max() < scores.size


def test_products_behind_a_selection_have_the_rows_that_stay() -> None:
    model = sample("plain")
    specs = kernel_specs(model, Lanes.of(HOST.vector), default_schedule(HOST.vector), 2)
    attends = [(spec.query_rows, spec.tokens) for spec in specs if isinstance(spec, Attend)]
    assert attends == [(17, 17), (13, 13)]
    module = build_network(model, HOST, batch=2).module
    names = [name.name_hint for name in module.get_global_vars()]
    # The places of a fixed order are constants.
    assert len([name for name in names if "choose_patches" in name]) == 4
    assert not [name for name in names if "first_rows" in name]


def test_in_fp32_the_class_attention_of_a_selection_adds_no_product() -> None:
    lanes, schedule = Lanes.of(HOST.vector), default_schedule(HOST.vector)
    model = with_relative_bias()
    (select,) = model.architecture.selects
    constant = select.model_copy(update={"scorer": "random"})
    other = network(model.architecture.model_copy(update={"selects": (constant,)}))
    assert kernel_specs(model, lanes, schedule, 2) == kernel_specs(other, lanes, schedule, 2)


def test_in_fp32_column_attention_reads_the_maps_of_the_attention_itself() -> None:
    model = sample("plain")
    attends = [
        spec
        for spec in kernel_specs(model, Lanes.of(HOST.vector), default_schedule(HOST.vector), 2)
        if isinstance(spec, Attend)
    ]
    assert [spec.columns for spec in attends] == [False, True]
    names = [name.name_hint for name in build_network(model, HOST, batch=2).module.functions]
    # One for the class attention of the first attention, whose queries are another number.
    assert len([name for name in names if "column_sums" in name]) == 1
    eight = build_network(model, HOST, batch=2, precision="int8").module.functions
    assert len([name for name in eight if "column_sums" in name.name_hint]) == 1


def written(folder: Path, target: str, batch: int) -> tuple[CompactModel, RuntimeFiles]:
    """A network with every scorer, compiled as the exporter does; all weights in fp32."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ here: apt-get install g++")
    model = copy.deepcopy(sample("plain")).float()
    shape = model.architecture.image
    folder.mkdir()
    request = replace(
        source(target, batch=batch),
        model=model,
        compact=model,
        shape=shape,
        images=noise(model, 4),
    )
    return model, runtime_named("tvm").write(request, folder)


@pytest.mark.parametrize("target", ["host", "rpi4"])
def test_the_choices_are_read_from_the_written_file(tmp_path: Path, target: str) -> None:
    if target == "rpi4":
        emulator("apache-tvm-ffi")
    model, files = written(tmp_path / "a", target, 2)
    assert files.engine_choices
    images = noise(model, 5)
    job = {
        "runtime": "tvm",
        "model": str(tmp_path / "a" / files.main),
        "threads": 1,
        "session": dict(files.session),
        "input": {"name": "images", "shape": [2, *model.architecture.image]},
    }
    logits, batches, _ = infer_with_choices(job, images, command=files.command)
    recorded = Choices()
    with torch.no_grad():
        expected = model(torch.from_numpy(images), recorded).numpy()
    # Another choice changes logits by more.
    assert float(relative_error(expected, logits).max()) < 1e-4
    # The last batch has one image.
    assert [len(batch[0]) for batch in batches] == [2, 2, 1]
    wanted = [
        places.numpy()
        for select, places in zip(model.architecture.selects, recorded.found, strict=True)
        if select.scorer != "random"
    ]
    assert len(wanted) > 1
    for parts, other in zip(zip(*batches, strict=True), wanted, strict=True):
        np.testing.assert_array_equal(np.concatenate(parts), other)
