"""Batches: equal order after a resume, for any number of workers and ranks; unreadable images."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import warm_processes
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from vitrim.compress.data import streams
from vitrim.compress.data.batch_loader import BatchLoader
from vitrim.compress.data.decoding import LazyPixels, RawSplit
from vitrim.compress.data.loading import open_dataset
from vitrim.compress.data.preprocessing import Preprocessing
from vitrim.compress.data.splits import Split
from vitrim.compress.data.streams import Record, Stream, StreamPixels
from vitrim.core.errors import InputError

SIZE = Preprocessing(channels=3, height=4, width=4, mean=(0.5,) * 3, std=(0.25,) * 3)


@dataclass(frozen=True)
class Numbered:
    """Image i is a square of the colour i; some images cannot be decoded."""

    bad: tuple[int, ...] = ()

    def open(self, index: int) -> Image.Image:
        if index in self.bad:
            raise OSError("image file is truncated")
        return Image.new("RGB", (4, 4), (index % 256, index // 256, 0))

    def where(self, index: int) -> str:
        return f"photos/{index}.jpg"


@dataclass(frozen=True)
class Tar:
    """A shard of numbered images."""

    name: str
    first: int
    count: int
    bad: tuple[int, ...] = ()
    classes: int = 7

    def records(self, start: int) -> Iterator[Record]:
        for number in range(self.first + start, self.first + self.count):
            data = number.to_bytes(4, "big")
            yield Record(data, number % self.classes, f"{self.name}, row {number - self.first}")


def lazy(count: int = 50, bad: tuple[int, ...] = (), fingerprint: str = "one") -> Split:
    source = Numbered(bad)
    targets = np.arange(count, dtype=np.int64) % 7
    raw = RawSplit(targets, source.open, source.where, fingerprint)
    return Split(LazyPixels(raw, SIZE), targets, SIZE, fingerprint=fingerprint)


def stream_of(*sizes: int, held_out: int = 0) -> Stream:
    firsts = np.cumsum([0, *sizes])
    shards = tuple(Tar(f"{n}.tar", int(firsts[n]), size) for n, size in enumerate(sizes))
    return Stream(shards, sum(sizes) - held_out * len(sizes), 7, held_out, "shards")


def numbers(images: Tensor) -> list[int]:
    return [int(image[0, 0, 0]) + 256 * int(image[1, 0, 0]) for image in images]


def flat(batches: Iterable[list[int]]) -> list[int]:
    return [number for batch in batches for number in batch]


def epoch_of(loader: BatchLoader, epoch: int = 1) -> list[list[int]]:
    return [numbers(images) for images, _ in loader.epoch(epoch)]


def noisy(image: Image.Image) -> np.ndarray[Any, Any]:
    array = np.asarray(image).transpose(2, 0, 1).copy()
    array[2] = random.randrange(100) + np.random.randint(50) + int(torch.randint(0, 50, ()))
    return array


def test_an_epoch_has_every_image_once_in_an_order_of_its_own() -> None:
    loader = BatchLoader(lazy(50), 10, seed=3)
    first, second = epoch_of(loader, 1), epoch_of(loader, 2)
    assert loader.steps == 5
    assert sorted(flat(first)) == list(range(50))
    assert sorted(flat(second)) == list(range(50))
    assert first != second
    assert first == epoch_of(BatchLoader(lazy(50), 10, seed=3), 1)


def test_targets_belong_to_their_images() -> None:
    for images, targets in BatchLoader(lazy(40), 8).epoch(1):
        assert [number % 7 for number in numbers(images)] == targets.tolist()


def test_decoded_splits_are_read_in_the_same_order() -> None:
    whole = lazy(30)
    decoded = Split(np.asarray(whole.pixels[:]), whole.targets, SIZE)
    assert epoch_of(BatchLoader(decoded, 7, workers=2)) == epoch_of(BatchLoader(whole, 7))


def test_without_shuffling_the_last_smaller_step_can_stay() -> None:
    loader = BatchLoader(lazy(10), 4, shuffle=False, drop_last=False)
    assert loader.steps == 3
    assert epoch_of(loader) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_worker_processes_change_nothing() -> None:
    one = BatchLoader(lazy(60), 8, seed=1, transform=noisy)
    two = BatchLoader(lazy(60), 8, seed=1, transform=noisy, workers=2)
    try:
        for epoch in (1, 2):
            for (a, b), (c, d) in zip(one.epoch(epoch), two.epoch(epoch), strict=True):
                assert torch.equal(a, c)
                assert torch.equal(b, d)
    finally:
        two.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_transforms_leave_the_random_generators_of_the_training(workers: int) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    loader = BatchLoader(lazy(), 5, transform=noisy, workers=workers)
    next(loader.epoch(1))
    next(loader.epoch(2))
    loader.close()
    assert torch.equal(torch.rand(3), expected)


@settings(max_examples=30)
@given(images=st.integers(12, 40), ranks=st.integers(1, 4), part=st.integers(1, 3))
def test_ranks_share_the_steps_of_one_process(images: int, ranks: int, part: int) -> None:
    size = ranks * part
    whole = epoch_of(BatchLoader(lazy(images), size))
    parts = [
        epoch_of(BatchLoader(lazy(images), size, rank=rank, ranks=ranks)) for rank in range(ranks)
    ]
    assert [flat(step) for step in zip(*parts, strict=True)] == whole


def test_ranks_evaluate_every_image_once() -> None:
    found = []
    for rank in range(4):
        options: dict[str, Any] = {"shuffle": False, "drop_last": False}
        found += flat(epoch_of(BatchLoader(lazy(10), 4, rank=rank, ranks=4, **options)))
    assert sorted(found) == list(range(10))


@pytest.mark.parametrize(("size", "ranks"), [(3, 4), (6, 4)])
def test_steps_that_ranks_cannot_share_are_refused(size: int, ranks: int) -> None:
    with pytest.raises(InputError, match=rf"^{size} images a step cannot be divided among {ranks}"):
        BatchLoader(lazy(), size, ranks=ranks)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["lazy", "stream"])
def test_a_resumed_epoch_continues_with_the_next_batch(
    workers: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "BLOCK", 16)
    monkeypatch.setattr(Record, "read", read_number)

    def split() -> Split:
        return lazy(60) if kind == "lazy" else streamed(stream_of(20, 10, 30))

    whole = epoch_of(BatchLoader(split(), 4, seed=2), 3)
    for taken in (1, 7, 14):
        first = BatchLoader(split(), 4, seed=2, workers=workers)
        epoch = first.epoch(3)
        seen = [numbers(next(epoch)[0]) for _ in range(taken)]
        state = json.loads(json.dumps(first.state_dict()))
        first.close()
        second = BatchLoader(split(), 4, seed=2, workers=workers)
        second.load_state_dict(state)
        rest = epoch_of(second, 3)
        after = epoch_of(second, 4)
        second.close()
        assert seen + rest == whole
        assert after == epoch_of(BatchLoader(split(), 4, seed=2), 4)


def test_the_state_after_an_epoch_begins_the_next_one_whole() -> None:
    first = BatchLoader(lazy(20), 4)
    epoch_of(first, 1)
    second = BatchLoader(lazy(20), 4)
    second.load_state_dict(first.state_dict())
    assert epoch_of(second, 2) == epoch_of(BatchLoader(lazy(20), 4), 2)


def test_data_that_changed_since_is_refused() -> None:
    state = BatchLoader(lazy(20), 4).state_dict()
    with pytest.raises(InputError, match=r"the data changed .*; restore what it was, or start"):
        BatchLoader(lazy(20, fingerprint="other"), 4).load_state_dict(state)
    with pytest.raises(InputError, match=r"batch_size was 4, now 5"):
        BatchLoader(lazy(20), 5).load_state_dict(state)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_stops_with_one_line(workers: int) -> None:
    loader = BatchLoader(lazy(20, bad=(11,)), 4, workers=workers)
    with pytest.raises(InputError) as stopped:
        epoch_of(loader)
    loader.close()
    assert str(stopped.value) == (
        "photos/11.jpg: not a readable image (image file is truncated); repair or remove it, or "
        'skip such images with data.on_error = "skip"'
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_skipped_and_counted(workers: int) -> None:
    loader = BatchLoader(lazy(20, bad=(11, 4)), 5, workers=workers, on_error="skip")
    for epoch in (1, 2):
        batches = epoch_of(loader, epoch)
        assert [len(batch) for batch in batches] == [5] * 4
        assert set(flat(batches)) == set(range(20)) - {11, 4}
        assert loader.skipped == 2
    assert loader.first_skipped is not None
    assert loader.first_skipped.startswith("photos/")
    loader.close()


def test_a_batch_without_a_readable_image_stops() -> None:
    loader = BatchLoader(lazy(8, bad=tuple(range(8))), 4, on_error="skip")
    with pytest.raises(InputError, match="no image of this batch can be read"):
        epoch_of(loader)


def test_a_worker_that_is_killed_ends_the_epoch_with_one_line() -> None:
    loader = BatchLoader(lazy(40, bad=()), 4, workers=1, transform=suicidal)
    with pytest.raises(InputError, match=r"a process that reads images ended .*train\.workers"):
        epoch_of(loader)
    loader.close()


def suicidal(image: Image.Image) -> np.ndarray[Any, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def streamed(stream: Stream) -> Split:
    targets = np.broadcast_to(np.int64(-1), (stream.images,))
    return Split(StreamPixels(stream), targets, SIZE, fingerprint=stream.fingerprint)


def read_number(record: Record, convert: Any) -> np.ndarray[Any, Any]:
    assert record.data is not None
    number = int.from_bytes(record.data, "big")
    pixels: np.ndarray[Any, Any] = convert(
        Image.new("RGB", (4, 4), (number % 256, number // 256, 0))
    )
    return pixels


def stream_numbers(stream: Stream, count: int, epoch: int = 1, **more: Any) -> list[int]:
    options = {"rank": 0, "ranks": 1, "position": None, **more}
    records = stream.records(0, epoch, **options)
    return [int.from_bytes(next(records)[1].data or b"", "big") for _ in range(count)]


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any),
    block=st.integers(1, 40),
)
def test_a_pass_over_a_stream_has_every_image_once(sizes: list[int], block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "BLOCK", block)
        found = stream_numbers(stream_of(*sizes), sum(sizes))
    assert sorted(found) == list(range(sum(sizes)))


def test_a_stream_is_shuffled_differently_in_each_epoch() -> None:
    stream = stream_of(30, 30, 30)
    first, second = stream_numbers(stream, 90, 1), stream_numbers(stream, 90, 2)
    assert first != second != sorted(second)


def test_held_out_rows_of_a_stream_are_not_trained_on() -> None:
    stream = stream_of(10, 10, 10, held_out=2)
    assert stream.images == 24
    assert not set(stream_numbers(stream, 24)) & {0, 1, 10, 11, 20, 21}


def test_ranks_read_different_shards() -> None:
    stream = stream_of(10, 10, 10, 10)
    parts = [set(stream_numbers(stream, 20, rank=rank, ranks=2)) for rank in range(2)]
    assert not parts[0] & parts[1]
    with pytest.raises(InputError, match=r"^0\.tar: 4 shards cannot be divided among 5 processes"):
        stream_numbers(stream, 1, ranks=5)


def test_a_label_outside_the_classes_stops_a_stream() -> None:
    stream = Stream((Tar("0.tar", 0, 10),), 10, 3)
    with pytest.raises(InputError, match=r"^0\.tar, row \d: label [3-6] is outside 0\.\.2; every"):
        stream_numbers(stream, 10)


def test_an_empty_stream_stops() -> None:
    with pytest.raises(InputError, match=r"^0\.tar: it holds no images"):
        stream_numbers(stream_of(0), 1)


def load(folder: Path, name: str, *, stops: bool = False) -> None:
    """Load an epoch of photos, from where an earlier process stopped; log every batch."""
    state, log = folder / f"{name}.json", folder / f"{name}.log"
    data = open_dataset(f"imagefolder:{folder / 'photos'}", image=(3, 8, 8), cache_gb=0)
    loader = BatchLoader(data.train, 4, seed=1, workers=2)
    if state.exists():
        loader.load_state_dict(json.loads(state.read_text()))
    for step, (images, targets) in enumerate(loader.epoch(1)):
        with log.open("a") as lines:
            lines.write(f"{images.sum()} {targets.tolist()}\n")
        temporary = state.with_suffix(".new")
        temporary.write_text(json.dumps(loader.state_dict()))
        os.replace(temporary, state)
        if stops and step == 3:
            (folder / "waits").touch()
            time.sleep(60)
    loader.close()


def load_and_wait(folder: Path) -> None:
    """Wait within the epoch."""
    load(folder, "killed", stops=True)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_an_epoch_continues_after_a_kill(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    for part in ("train", "val"):
        for label in ("ant", "bee"):
            (tmp_path / "photos" / part / label).mkdir(parents=True)
            for index in range(24):
                pixels = noise.integers(0, 255, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "photos" / part / label / f"{index}.png")
    killed = warm_processes.start(load_and_wait, tmp_path, log=tmp_path / "log")
    killed.wait_until((tmp_path / "waits").exists)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    for name in ("whole", "killed"):
        load(tmp_path, name)
    whole, resumed = ((tmp_path / f"{name}.log").read_text() for name in ("whole", "killed"))
    assert len(whole.splitlines()) == 10
    assert resumed == whole
