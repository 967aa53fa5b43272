"""Programs with buckets: one library of which an image runs the calls of its own bucket."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from aarch64 import emulator
from bundle_sample import build, logits_in
from bundle_sample import needs_compiler as needs_tools
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from selecting_models import divided, noise_images, positioned_selection, sharp_selection
from vitrim import BucketedModel, InputError, bucketed, export, select_tokens
from vitrim.bench.local.measure import measure_interleaved
from vitrim.compress.data.preprocessing import Preprocessing
from vitrim.compress.network.modules.model import CompactModel
from vitrim.compress.tokens.bucket_rules import Rule
from vitrim.compress.tokens.select import SelectMethod
from vitrim.export.artifact import Artifact
from vitrim.export.bundle import bundle
from vitrim.runtimes import EngineError, open_engine

pytest.importorskip("tvm", reason="TVM is not installed: pip install 'vitrim[tvm]'")

import tvm
from tvm_networks import HOST, assert_lowered_as_by_all_passes, compiled_kernels, runnable
from vitrim.export.tvm_kernels.bucket_choice import (
    ChooseBucket,
    ChooseNear,
    choose_bucket,
    choose_near,
)
from vitrim.export.tvm_kernels.build import build_bucket_network
from vitrim.export.tvm_kernels.execution_plan import execution_plan
from vitrim.export.tvm_kernels.lanes import Lanes, RowLayout

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="no g++ here: apt-get install g++"
)
COUNTS = (3, 6, 11)


def buckets_of(model: CompactModel, rule: Rule = "coverage") -> BucketedModel:
    return divided(model, COUNTS, noise_images(12), rule)


def chosen_place(masses: NDArray[np.float64], counts: tuple[int, ...], coverage: float) -> int:
    best = np.sort(masses)[::-1].cumsum()
    held = [best[count - 1] >= coverage * best[-1] for count in counts[:-1]]
    return held.index(True) if True in held else len(counts) - 1


@settings(max_examples=25)
@given(
    patches=st.integers(2, 70),
    data=st.data(),
    predicted=st.booleans(),
    unit=st.integers(0, len(runnable()) - 1),
)
def test_the_kernel_chooses_the_first_bucket_that_holds_enough(
    patches: int, data: st.DataObject, predicted: bool, unit: int
) -> None:
    counts = data.draw(
        st.lists(st.integers(1, patches), min_size=2, max_size=4, unique=True).map(sorted)
    )
    profile, stride = runnable()[unit], data.draw(st.integers(1, 3))
    rng = np.random.default_rng(patches)
    # Few values, so that some are equal, among them zeros.
    scores = rng.integers(-2, 4, patches).astype(np.float32) / 2
    masses = np.maximum(scores, 0).astype(np.float64)
    if predicted:
        masses = 1 / (1 + np.exp(-scores.astype(np.float64)))
    best = np.sort(masses)[::-1].cumsum()
    # Between two shares, where rounding decides nothing.
    steps = np.unique([0.0, *(best[count - 1] / max(best[-1], 1e-9) for count in counts), 1.0])
    place = data.draw(st.integers(0, len(steps) - 2))
    coverage = float(steps[place] + steps[place + 1]) / 2
    spec = ChooseBucket(patches, tuple(counts), coverage, predicted, RowLayout(patches, stride))
    kernel = choose_bucket(spec, Lanes.of(profile.vector)).with_attr("global_symbol", "choose")
    module = compiled_kernels({"choose": kernel}, profile)
    rows = np.zeros((patches, stride), np.float32)
    rows[:, 0] = scores
    found = tvm.runtime.tensor(np.full(1, -1, np.int32))
    module["choose"](tvm.runtime.tensor(rows.ravel()), found)
    assert found.numpy()[0] == chosen_place(masses, tuple(counts), coverage)


@settings(max_examples=15)
@given(
    width=st.integers(1, 70),
    buckets=st.integers(2, 5),
    first=st.booleans(),
    seed=st.integers(0, 99),
    unit=st.integers(0, len(runnable()) - 1),
)
def test_the_kernel_chooses_the_first_bucket_that_is_predicted_near(
    width: int, buckets: int, first: bool, seed: int, unit: int
) -> None:
    profile, rng = runnable()[unit], np.random.default_rng(seed)
    lanes = Lanes.of(profile.vector)
    width = lanes.up(width)
    spec = ChooseNear(buckets, width, first)
    kernel = choose_near(spec, lanes).with_attr("global_symbol", "choose")
    module = compiled_kernels({"choose": kernel}, profile)
    rows = rng.standard_normal((1 + first, width)).astype(np.float32)
    weights = rng.standard_normal((buckets - 1, rows.size)).astype(np.float32)
    values = weights.astype(np.float64) @ rows.ravel()
    # Beside the predictions, where rounding decides nothing.
    enough = rng.random(buckets - 1) < 0.4
    most = (values + np.where(enough, 0.1, -0.1)).astype(np.float32)
    found = tvm.runtime.tensor(np.full(1, -1, np.int32))
    given_rows = [rows[-1], weights.ravel(), most, *rows[:-1]]
    module["choose"](*map(tvm.runtime.tensor, given_rows), found)
    assert found.numpy()[0] == [*enough, True].index(True)
    given_rows[0] = np.full(width, np.nan, np.float32)
    module["choose"](*map(tvm.runtime.tensor, given_rows), found)
    assert found.numpy()[0] == buckets - 1


def test_scores_that_are_no_numbers_get_some_bucket() -> None:
    spec = ChooseBucket(9, (2, 4, 8), 0.5, False, RowLayout(9, 1))
    kernel = choose_bucket(spec, Lanes.of(HOST.vector)).with_attr("global_symbol", "choose")
    module = compiled_kernels({"choose": kernel}, HOST)
    for scores in (np.full(9, np.nan), np.array([1.0] * 8 + [np.nan])):
        found = tvm.runtime.tensor(np.full(1, -1, np.int32))
        module["choose"](tvm.runtime.tensor(scores.astype(np.float32)), found)
        assert found.numpy()[0] in (0, 1, 2)


def test_passes_that_are_left_out_would_change_no_kernel_of_a_bucket() -> None:
    source = divided(sharp_selection(), (3, 8), noise_images(12))
    assert_lowered_as_by_all_passes(build_bucket_network(source, HOST))


@needs_compiler
@pytest.mark.parametrize(
    ("method", "rule"),
    [
        ("class-attention", "coverage"),
        ("class-attention", "divergence"),
        ("column-attention", "coverage"),
        ("dynamicvit", "coverage"),
        ("dynamicvit", "divergence"),
    ],
)
def test_a_program_runs_the_bucket_of_the_image(
    tmp_path: Path, method: SelectMethod, rule: Rule
) -> None:
    source, pictures = buckets_of(sharp_selection(method), rule), noise_images(12)
    artifact = export(source, tmp_path / "a", runtime="tvm", images=pictures.numpy())
    found = artifact.manifest.buckets
    assert found is not None
    assert (found.counts, found.equal) == (COUNTS, 1.0)
    stage = artifact.manifest.parity[-1]
    assert stage.max_relative_error < 1e-4
    assert stage.choices is not None
    assert [choice.equal for choice in stage.choices] == [1.0]
    kept = source.bucket_of(pictures).tolist()
    assert len(set(kept)) > 1
    engine = opened(artifact)
    with torch.no_grad():
        wanted = source(pictures).numpy()
    for image, count, row in zip(pictures.split(1), kept, wanted, strict=True):
        logits, number = engine.infer_chosen(image.numpy())
        assert number == count
        np.testing.assert_allclose(logits[0], row, atol=1e-4 * np.abs(wanted).max())


def opened(artifact: Artifact, **job: Any) -> Any:
    manifest = artifact.manifest
    engine = open_engine(
        {
            "runtime": "tvm",
            "model": str(artifact.model_path),
            "session": dict(manifest.session),
            "input": manifest.inputs[0].model_dump(mode="json"),
            **job,
        }
    )
    engine.load()
    return engine


@needs_compiler
def test_eight_bits_an_earlier_selection_and_a_forced_bucket(tmp_path: Path) -> None:
    dense = sharp_selection(stages=[0, 1], counts=[14, 8])
    source = divided(dense, (3, 8), noise_images(12), "divergence")
    images = noise_images(8)
    artifact = export(
        source, tmp_path / "a", runtime="tvm", precision="int8", images=images.numpy()
    )
    choices = artifact.manifest.parity[-1].choices
    assert choices is not None
    assert [choice.selection for choice in choices] == ["select.0", "select.1"]
    with torch.no_grad():
        wanted = source.fixed(3)(images[:1]).numpy()
    engine = opened(artifact, inputs={"bucket": 3})
    found = engine.infer(images[:1].numpy())
    assert np.abs(found - wanted).max() < 0.1 * np.abs(wanted).max()
    # Its own bucket does not change what is forced.
    engine.infer_chosen(images[:1].numpy())
    np.testing.assert_array_equal(engine.infer(images[:1].numpy()), found)
    with pytest.raises(EngineError, match="no bucket of 4 patches"):
        opened(artifact, inputs={"bucket": 4})


@needs_compiler
@pytest.mark.parametrize("kind", ["rope", "relative bias"])
def test_positions_are_those_of_the_patches_in_the_bucket(tmp_path: Path, kind: str) -> None:
    network, images = positioned_selection(kind, "dynamicvit", counts=[10, 6]), noise_images(8)
    source = divided(network, (3, 6), images)
    artifact = export(source, tmp_path / "a", runtime="tvm", images=images.numpy())
    stage = artifact.manifest.parity[-1]
    assert stage.max_relative_error < 1e-4
    assert [choice.equal for choice in stage.choices or ()] == [1.0, 1.0]


@needs_compiler
def test_all_buckets_of_a_program_are_measured(tmp_path: Path) -> None:
    source, images = buckets_of(sharp_selection()), noise_images(12)
    artifact = export(source, tmp_path / "a", runtime="tvm")
    with torch.no_grad():
        labels = source(images).argmax(1).numpy()
    np.savez(tmp_path / "d.npz", images=images.numpy(), labels=labels)
    quick: dict[str, Any] = {"least_rounds": 1, "most_rounds": 1, "quiet": True}
    found = measure_interleaved(
        {"a": artifact}, dataset=tmp_path / "d.npz", profile_runs=2, **quick
    )
    kept = source.bucket_of(images).numpy()
    for count, each in zip(COUNTS, found.values(), strict=True):
        assert each.bucket is not None
        assert each.bucket.share == (kept == count).mean()
        assert (each.correct or 0) == (kept == count).sum()
        # The kernels of one bucket, among them one that gathers the rows that stay.
        assert sum(row.operator == "gather_rows" for row in each.operators) == 1


def run(*command: object) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)


SPEC = Preprocessing(channels=3, height=32, width=32, mean=(0.5,) * 3, std=(0.25,) * 3)


def check_buckets(source: BucketedModel, folder: Path, *command: object) -> None:
    """Each picture gets its bucket or the one that is asked for, with the outputs of torch."""
    pixels = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    picture.save(folder / "picture.ppm")
    image = torch.from_numpy(SPEC.apply(picture)[None])
    for forced in (0, *COUNTS):
        ran = run(*command, folder / "picture.ppm", "--logits", "--bucket", forced)
        assert ran.returncode == 0, ran.stderr
        kept = forced or int(source.bucket_of(image)[0])
        lines = ran.stdout.splitlines()
        assert f"kept_patches {kept}" in lines
        with torch.no_grad():
            wanted = source.fixed(kept)(image)[0].numpy()
        np.testing.assert_allclose(logits_in(lines), wanted, atol=1e-4 * np.abs(wanted).max())
    ran = run(*command, folder / "picture.ppm", "--bucket", 5)
    assert (ran.returncode, ran.stderr.count("\n")) == (3, 1)
    assert "no bucket of 5 patches" in ran.stderr


@pytest.mark.parametrize("linked", [True, False], ids=["linked", "opened"])
def test_the_bundle_gives_each_picture_its_bucket(tmp_path: Path, linked: bool) -> None:
    needs_tools()
    source = buckets_of(sharp_selection())
    artifact = export(
        source, tmp_path / "a", runtime="tvm", preprocessing=SPEC, options={"static": "yes"}
    )
    folder = bundle(artifact, tmp_path / "bundle")
    # The folder of ONNX Runtime's header is not used.
    program = build(folder, tmp_path, f"-DVITRIM_LINKED={'ON' if linked else 'OFF'}")
    check_buckets(source, tmp_path, program, *([] if linked else ["-", folder / "model"]))


def test_an_arm_program_gives_each_picture_its_bucket(tmp_path: Path) -> None:
    needs_tools()
    machine = emulator()
    if shutil.which("aarch64-linux-gnu-g++") is None:
        pytest.skip("no cross compiler: apt-get install g++-aarch64-linux-gnu")
    source = buckets_of(sharp_selection())
    artifact = export(
        source,
        tmp_path / "a",
        runtime="tvm",
        target="rpi4",
        preprocessing=SPEC,
        options={"static": "yes"},
    )
    # The outputs and the buckets are those of the ARM code, in the emulator.
    assert any("outputs are those of qemu" in note for note in artifact.manifest.notes)
    assert artifact.manifest.parity[-1].choices is not None
    folder = bundle(artifact, tmp_path / "bundle")
    settings = ("-DCMAKE_TOOLCHAIN_FILE=aarch64.cmake", "-DVITRIM_STATIC=ON")
    program = build(folder, tmp_path, *settings)
    check_buckets(source, tmp_path, machine.qemu, "-cpu", "cortex-a72", program)


def test_without_an_emulator_the_same_kernels_are_compared_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VITRIM_EMULATION", str(tmp_path / "nothing"))
    artifact = export(buckets_of(sharp_selection()), tmp_path / "a", runtime="tvm", target="rpi4")
    notes = artifact.manifest.notes
    assert any(note.startswith("its own code was not run: ") for note in notes)
    assert artifact.manifest.parity[-1].stage == "tvm here"
    assert artifact.manifest.session["triple"].startswith("aarch64")
    assert artifact.manifest.buckets is not None
    assert artifact.manifest.buckets.equal == 1


def test_branches_share_the_common_part_and_plan_one_memory() -> None:
    source = buckets_of(sharp_selection("column-attention"))
    plan = execution_plan(build_bucket_network(source, HOST))
    branches = plan.branches
    assert branches is not None
    assert branches.counts == COUNTS
    assert plan.steps[branches.ends[0] - 1].kernel == "choose_bucket"
    assert plan.steps[branches.ends[0] - 1].tensors[-1] == branches.place
    lengths = np.diff(branches.ends)
    assert (lengths == lengths[0]).all()
    # Nothing that one branch writes is read by another: in the order of all steps, what a step
    # reads was last written by the common part or by its own branch.
    first, last_writer = branches.ends[0], dict[int, int]()
    for number, step in enumerate(plan.steps):
        start = max(end for end in (0, *branches.ends) if end <= number)
        for tensor in step.tensors[:-1]:
            if tensor.memory == "arena":
                writer = last_writer[tensor.offset_bytes]
                assert writer < first or writer >= start, step.kernel
        for tensor in step.tensors[-1:]:
            last_writer[tensor.offset_bytes if tensor.memory == "arena" else -1] = number
    other = bucketed(source.network, (6, 11), coverage=0.5)
    alone = execution_plan(build_bucket_network(other, HOST))
    # A further bucket needs no further memory, and the weights are the same up to their packing,
    # which depends on the number of rows where these are few.
    assert plan.arena_bytes < 1.2 * alone.arena_bytes
    sizes = [sum(part.nbytes for part in each.constants) for each in (plan, alone)]
    assert sizes[0] < 1.5 * sizes[1]


def test_networks_that_no_kernel_covers_are_refused() -> None:
    dense = sharp_selection()
    model = select_tokens(
        CompactModel(
            dense.architecture.model_copy(
                update={
                    "selects": (),
                    "pool": dense.architecture.pool.model_copy(update={"kind": "max"}),
                }
            )
        ),
        "dynamicvit",
        stages=[1],
        ratio=0.6,
    )
    with pytest.raises(InputError, match=r"do not cover pooling 'max'; export for onnxruntime"):
        build_bucket_network(bucketed(model, COUNTS[:2], coverage=0.5), HOST)
