"""The bundle resizes as Pillow does, bit for bit."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image
from vitrim.export.bundle import SOURCES, pillow_major

FILTERS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
MAJOR = int(PIL.__version__.split(".")[0])


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("g++ not installed: apt-get install g++")
    made = tmp_path_factory.mktemp("resize") / "resize_samples"
    source = Path(__file__).with_name("resize_samples.cpp")
    command = [
        "g++",
        "-std=c++17",
        "-O2",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unused-result",
        f"-I{SOURCES}",
        str(source),
        "-o",
        str(made),
    ]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    return made


def pictures(count: int, seed: int) -> list[tuple[np.ndarray, tuple[int, int], str]]:
    """Random sizes, colours, filters and samples.

    Every third picture is black and white, where filters overshoot most.
    """
    random = np.random.default_rng(seed)
    found = []
    for number in range(count):
        width, height, new_width, new_height = (
            int(size) for size in random.integers(1, 250 if number % 50 == 0 else 70, 4)
        )
        new_width, new_height = (
            width if number % 7 == 0 else new_width,
            height if number % 11 == 0 else new_height,
        )
        samples = random.integers(
            0, 256, (height, width, 3) if number % 2 else (height, width), dtype=np.uint8
        )
        samples = np.where(samples > 127, 255, 0).astype(np.uint8) if number % 3 == 0 else samples
        found.append((samples, (new_width, new_height), FILTERS[number % len(FILTERS)]))
    return found


def resized(
    program: Path, wanted: list[tuple[np.ndarray, tuple[int, int], str]], pillow: int
) -> list[np.ndarray]:
    pieces = []
    for samples, size, name in wanted:
        channels = 1 if samples.ndim == 2 else 3
        height, width = samples.shape[:2]
        line = f"{width} {height} {channels} {size[0]} {size[1]} {pillow} {name}\n"
        pieces.append(line.encode() + samples.tobytes())
    output = np.frombuffer(
        subprocess.run(
            [str(program)], input=b"".join(pieces), capture_output=True, check=True, timeout=120
        ).stdout,
        np.uint8,
    )
    found, start = [], 0
    for samples, size, _ in wanted:
        shape = (size[1], size[0], *samples.shape[2:])
        found.append(output[start : start + int(np.prod(shape))].reshape(shape))
        start += int(np.prod(shape))
    assert start == len(output)
    return found


def test_every_filter_matches_pillow_at_any_size(program: Path) -> None:
    wanted = pictures(1500, seed=4)
    for (samples, size, name), found in zip(wanted, resized(program, wanted, MAJOR), strict=True):
        expected = np.asarray(Image.fromarray(samples).resize(size, Image.Resampling[name.upper()]))
        np.testing.assert_array_equal(found, expected, err_msg=f"{name} {samples.shape} -> {size}")


def test_older_pillows_resize_columns_first(program: Path) -> None:
    wanted = [
        (samples, size, name) for samples, size, name in pictures(400, seed=5) if name != "nearest"
    ]
    differ = 0
    newer = resized(program, wanted, 13)
    for (samples, size, name), found, new in zip(
        wanted, resized(program, wanted, 12), newer, strict=True
    ):
        kind, picture = Image.Resampling[name.upper()], Image.fromarray(samples)
        expected = np.asarray(picture.resize((size[0], picture.height), kind).resize(size, kind))
        np.testing.assert_array_equal(found, expected, err_msg=f"{name} {samples.shape} -> {size}")
        differ += not np.array_equal(found, new)
    assert differ > 10


def test_the_order_of_passes_is_that_of_the_pillow_in_training() -> None:
    assert pillow_major({"pillow": "11.3.0"}) == 11
    assert pillow_major({}) == MAJOR
