"""Data sets that are not decoded as a whole: folders with an index, tars, streams."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image
from vitrim.compress.data import file_list, loading, sealed_index
from vitrim.compress.data.batch_loader import BatchLoader
from vitrim.compress.data.decoding import LazyPixels
from vitrim.compress.data.image_folder import read_image_folder
from vitrim.compress.data.loading import open_dataset
from vitrim.compress.data.splits import DataSplits
from vitrim.compress.data.streams import StreamPixels
from vitrim.core.errors import InputError

INPUT = (3, 8, 8)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, number // 256, 9)).save(buffer, "PNG")
    return buffer.getvalue()


def numbers(images: Any) -> list[int]:
    return [int(image[0, 0, 0]) + 256 * int(image[1, 0, 0]) for image in images]


def write_folder(root: Path, part: str, first: int, count: int = 12) -> Path:
    for number in range(first, first + count):
        folder = root / part / ("ant", "bee", "fly")[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:04}.png").write_bytes(png(number))
    return root


def write_tar(path: Path, first: int, count: int = 12, label: str = "cls") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in range(first, first + count):
            content = str(number % 3) if label == "cls" else json.dumps({"label": number % 3})
            for ending, data in ((label, content.encode()), ("png", png(number))):
                member = tarfile.TarInfo(f"photos/{number:06}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def write_parquet(path: Path, first: int, count: int = 12, named: bool = True) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    names = datasets.ClassLabel(names=["ant", "bee", "fly"])
    features = datasets.Features(
        {"image": datasets.Image(), "label": names if named else datasets.Value("int64")}
    )
    rows = range(first, first + count)
    table = {
        "image": [{"bytes": png(number), "path": None} for number in rows],
        "label": [number % 3 for number in rows],
    }
    datasets.Dataset.from_dict(table, features=features).to_parquet(str(path))
    return path


def shards(root: Path, kind: str, *parts: str, count: int = 12) -> str:
    """Write two shards of each part; return the name of the data set."""
    for at, part in enumerate(parts):
        for shard in range(2):
            first = 100 * at + count * shard
            if kind == "parquet":
                write_parquet(root / f"{part}-{shard}.parquet", first, count)
            else:
                write_tar(root / f"{part}-{shard}.tar", first, count)
    return f"{kind}:{root}"


def one_line(call: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(InputError) as stopped:
        call(*arguments, **options)
    assert "\n" not in str(stopped.value)
    return str(stopped.value)


def trained_on(data: DataSplits, epoch: int = 1) -> list[int]:
    loader = BatchLoader(data.train, 1)
    return [number for images, _ in loader.epoch(epoch) for number in numbers(images)]


def test_a_data_set_above_the_limit_is_decoded_image_by_image(tmp_path: Path) -> None:
    root = write_folder(write_folder(tmp_path / "p", "train", 0, 30), "val", 100)
    name = f"imagefolder:{root}"
    small = open_dataset(name, image=INPUT)
    large = open_dataset(name, image=INPUT, cache_gb=0)
    assert isinstance(small.train.pixels, np.ndarray)
    assert isinstance(large.train.pixels, LazyPixels)
    for part in ("train", "val", "test"):
        decoded, lazy = getattr(small, part), getattr(large, part)
        assert np.array_equal(decoded.targets, lazy.targets)
        assert np.array_equal(decoded.floats(), lazy.floats())
    chosen = large.train.select(np.array([3, 1]))
    assert np.array_equal(chosen.floats(), small.train.select(np.array([3, 1])).floats())
    assert not list((tmp_path / "cache").rglob("*.npy"))


@pytest.mark.parametrize("cache_gb", [0, 1])
def test_unreadable_images_stop_or_are_left_out(
    tmp_path: Path, cache_gb: float, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_folder(write_folder(tmp_path / "p", "train", 0, 30), "val", 100)
    bad = root / "train" / "ant" / "0003.png"
    bad.write_bytes(bad.read_bytes()[:-30])
    name = f"imagefolder:{root}"

    def opened(on_error: Any) -> DataSplits:
        return open_dataset(name, image=INPUT, cache_gb=cache_gb, on_error=on_error)

    line = one_line(lambda: trained_on(opened("stop")))
    assert line.startswith(f"{bad}: not a readable image (")
    assert line.endswith('or skip such images with data.on_error = "skip"')
    data = opened("skip")
    loader = BatchLoader(data.train, 9, on_error="skip")
    found = [number for images, _ in loader.epoch(1) for number in numbers(images)]
    assert 3 not in found
    if cache_gb:
        assert "1 unreadable images are left out" in capsys.readouterr().err
        assert data.left_out == 1
        assert loader.skipped == 0
    else:
        assert loader.skipped == 1


def test_unreadable_images_of_evaluation_are_black_and_counted(tmp_path: Path) -> None:
    root = write_folder(write_folder(tmp_path / "p", "train", 0, 30), "val", 100)
    (root / "val" / "ant" / "0102.png").write_bytes(b"text")
    data = open_dataset(f"imagefolder:{root}", image=INPUT, cache_gb=0, on_error="skip")
    assert isinstance(data.test.pixels, LazyPixels)
    images = data.test.batch(slice(None))[0]
    (black,) = data.test.pixels.unreadable
    assert not images[black].any()
    assert len(images) == 12


def test_a_copy_of_the_data_elsewhere_is_the_same_data(tmp_path: Path) -> None:
    root = write_folder(write_folder(tmp_path / "p", "train", 0, 30), "val", 100)
    name = shards(tmp_path / "s", "webdataset", "train", "val")
    shutil.copytree(root, tmp_path / "q")
    shutil.copytree(tmp_path / "s", tmp_path / "t")
    for one, other in ((f"imagefolder:{root}", "imagefolder:q"), (name, "webdataset:t")):
        kind, _, folder = other.partition(":")
        before = BatchLoader(open_dataset(one, image=INPUT, cache_gb=0).train, 4)
        next(before.epoch(1))
        copy = open_dataset(f"{kind}:{tmp_path / folder}", image=INPUT, cache_gb=0)
        BatchLoader(copy.train, 4).load_state_dict(before.state_dict())


def test_skipped_images_are_known_to_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitrim.compress.data.decoding.MEMORY_LIMIT_BYTES", 0)
    root = write_folder(write_folder(tmp_path / "p", "train", 0, 30), "val", 100)
    (root / "train" / "ant" / "0003.png").write_bytes(b"text")
    name = f"imagefolder:{root}"
    sizes = [len(open_dataset(name, image=INPUT, on_error="skip").train) for _ in range(2)]
    assert sizes[0] == sizes[1] == len(open_dataset(name, image=INPUT, cache_gb=0).train) - 1
    assert "0003.png: not a readable image" in one_line(open_dataset, name, image=INPUT)


def test_an_index_spares_the_second_scan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_list, "INDEX_ABOVE", 3)
    monkeypatch.setattr(sealed_index, "_SETTLED_S", 0)
    root = write_folder(tmp_path / "p", "train", 0, 12)
    first = read_image_folder(root)
    monkeypatch.setattr(file_list._Scan, "add", lambda *_: pytest.fail("scanned again"))
    second = read_image_folder(root)
    assert second.train.fingerprint == first.train.fingerprint
    assert np.array_equal(second.train.targets, first.train.targets)
    assert [second.train.where(i) for i in range(12)] == [first.train.where(i) for i in range(12)]


@pytest.mark.parametrize("change", ["add", "remove", "rename", "damage", "add-nested"])
def test_a_folder_that_changed_is_scanned_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    monkeypatch.setattr(file_list, "INDEX_ABOVE", 3)
    monkeypatch.setattr(sealed_index, "_SETTLED_S", 0)
    root = write_folder(tmp_path / "p", "train", 0, 12)
    (root / "train" / "ant" / "more").mkdir()
    read_image_folder(root)
    ant = root / "train" / "ant"
    if change == "add":
        (ant / "new.png").write_bytes(png(1))
    elif change == "remove":
        (ant / "0003.png").unlink()
    elif change == "rename":
        (ant / "0003.png").rename(ant / "x.png")
    elif change == "add-nested":
        (ant / "more" / "new.png").write_bytes(png(1))
    else:
        (index,) = (tmp_path / "cache").rglob("*.npz")
        index.write_bytes(index.read_bytes()[:-100])
    found = read_image_folder(root).train
    names = {Path(found.where(number)).name for number in range(len(found))}
    assert names == {path.name for path in root.rglob("*.png")}


def test_a_folder_that_vanishes_while_it_is_listed_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_folder(tmp_path / "p", "train", 0, 12)
    plain = file_list._Scan.add

    def add(scan: Any, folder: str, number: int) -> None:
        if folder.endswith("bee"):
            for file in Path(folder).iterdir():
                file.unlink()
            Path(folder).rmdir()
        plain(scan, folder, number)

    monkeypatch.setattr(file_list._Scan, "add", add)
    line = one_line(read_image_folder, root)
    assert line == (
        f"{root}/train/bee: it vanished while {root}/train was listed; start again when the folder "
        "no longer changes"
    )


def test_a_file_that_vanished_is_named(tmp_path: Path) -> None:
    root = write_folder(write_folder(tmp_path / "p", "train", 0, 30), "val", 100)
    data = open_dataset(f"imagefolder:{root}", image=INPUT, cache_gb=0)
    (root / "train" / "bee" / "0004.png").unlink()
    line = one_line(trained_on, data)
    assert line.startswith(f"{root}/train/bee/0004.png: not a readable image (")


def test_names_of_files_take_little_memory(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "p", "train", 0, 30)
    files = file_list.list_images(root, [root])
    assert len(files.names) == sum(len(str(path.relative_to(root))) for path in root.rglob("*.png"))
    assert [files.where(i) for i in range(len(files))] == sorted(
        str(path) for path in root.rglob("*.png")
    )


@pytest.mark.parametrize("label", ["cls", "json"])
def test_tars_are_read_in_any_order(tmp_path: Path, label: str) -> None:
    write_tar(tmp_path / "w" / "train-0.tar", 0, 20, label)
    write_tar(tmp_path / "w" / "train-1.tar", 20, 20, label)
    write_tar(tmp_path / "w" / "val-0.tar", 100, 10, label)
    data = open_dataset(f"webdataset:{tmp_path / 'w'}", image=INPUT, cache_gb=0)
    assert data.labels == ("0", "1", "2")
    assert numbers(data.test.pixels[:]) == list(range(100, 110))
    images, targets = data.train.batch(np.array([5, 30, 2]))
    assert [number % 3 for number in numbers(images)] == targets.tolist()
    held_out = set(numbers(data.val.batch(slice(None))[0]))
    assert not held_out & set(trained_on(data))
    assert sorted(held_out | set(trained_on(data))) == list(range(40))


@pytest.mark.parametrize("cut", [700, 1024, 5000])
def test_a_tar_that_ends_early_is_refused(tmp_path: Path, cut: int) -> None:
    write_tar(tmp_path / "w" / "train-0.tar", 0, 20)
    tar = write_tar(tmp_path / "w" / "train-1.tar", 20, 20)
    tar.write_bytes(tar.read_bytes()[:cut])
    line = one_line(open_dataset, f"webdataset:{tmp_path / 'w'}", image=INPUT)
    assert line == f"{tar}: the tar ends early, at byte {cut}; fetch or write it again"


def test_tars_with_other_content_are_refused(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "train.tar", 0, 20)
    content = tar.read_bytes()

    def line() -> str:
        return one_line(open_dataset, f"webdataset:{tar}", image=INPUT)

    tar.write_bytes(content.replace(b"000004.cls", b"000004.txt"))
    # The checksum of the header no longer holds.
    assert f"{tar}: the tar is damaged at byte " in line()
    write_tar(tar, 0, 20, label="txt")
    assert "sample photos/000000 has no label; add a member of that name ending in .cls" in line()
    with tarfile.open(tar, "w") as words:
        for ending, data in (("cls", b"ant"), ("png", png(1))):
            member = tarfile.TarInfo(f"1.{ending}")
            member.size = len(data)
            words.addfile(member, io.BytesIO(data))
    assert f"{tar}: 1.cls holds 'ant'; a label is a class number, e.g. 7" in line()
    with tarfile.open(tar, "w") as empty:
        empty.addfile(tarfile.TarInfo("nothing.txt"))
    assert "the data set is empty; give it images" in line()
    tar.write_bytes(b"PK" * 1000)
    assert "not a readable tar (" in line()


def test_a_label_outside_the_classes_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "w" / "train-0.tar", 0, 30)
    tar = write_tar(tmp_path / "w" / "val-0.tar", 100, 10)
    with tarfile.open(tar, "a") as more:
        for ending, data in (("png", png(1)), ("cls", b"17")):
            member = tarfile.TarInfo(f"photos/last.{ending}")
            member.size = len(data)
            more.addfile(member, io.BytesIO(data))
    line = one_line(open_dataset, f"webdataset:{tmp_path / 'w'}", image=INPUT)
    assert line.startswith(f"{tar}, image at byte ")
    assert "label 17 does not occur in the training split" in line


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_a_stream_trains_on_every_image_once(tmp_path: Path, kind: str) -> None:
    name = shards(tmp_path / "s", kind, "train", "validation", "test")
    data = open_dataset(name, image=INPUT, streaming=True)
    assert isinstance(data.train.pixels, StreamPixels)
    assert data.classes == 3
    assert sorted(trained_on(data)) == list(range(24))
    assert trained_on(data, 1) != trained_on(data, 2)
    assert numbers(data.val.pixels[:]) == list(range(100, 124))
    assert numbers(data.test.pixels[:]) == list(range(200, 224))
    for images, targets in BatchLoader(data.train, 5, workers=1).epoch(1):
        assert [number % 3 for number in numbers(images)] == targets.tolist()


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_splits_that_a_stream_lacks_are_held_out(tmp_path: Path, kind: str) -> None:
    name = shards(tmp_path / "s", kind, "train")
    data = open_dataset(name, image=INPUT, streaming=True, validation=0.25)
    parts = [
        set(trained_on(data)),
        set(numbers(data.val.pixels[:])),
        set(numbers(data.test.pixels[:])),
    ]
    assert parts[1] == {2, 3, 4, 14, 15, 16}
    assert set().union(*parts) == set(range(24))
    assert sum(map(len, parts)) == 24 == len(data.train) + len(data.val) + len(data.test)


def test_a_stream_is_copied_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = shards(tmp_path / "s", "parquet", "train", "validation", "test")
    open_dataset(name, image=INPUT, streaming=True)
    monkeypatch.setattr(
        "vitrim.compress.data.packed_images._write", lambda *_: pytest.fail("copied again")
    )
    assert len(open_dataset(name, image=INPUT, streaming=True).val) == 24


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_a_shard_that_changed_is_refused_on_resume(tmp_path: Path, kind: str) -> None:
    name = shards(tmp_path / "s", kind, "train", "validation", "test")

    def loader() -> BatchLoader:
        return BatchLoader(open_dataset(name, image=INPUT, streaming=True).train, 4)

    before = loader()
    next(before.epoch(1))
    loader().load_state_dict(before.state_dict())
    shard = next((tmp_path / "s").glob("train-1.*"))
    os.utime(shard, (1, 1))
    line = one_line(loader().load_state_dict, before.state_dict())
    assert line.startswith("resuming within epoch 1: the data changed (a file was added, removed")


def test_unreadable_images_of_a_stream(tmp_path: Path) -> None:
    name = shards(tmp_path / "s", "webdataset", "train", "validation", "test")
    tar = tmp_path / "s" / "train-1.tar"
    content = tar.read_bytes()
    at = content.index(png(15))
    tar.write_bytes(content[: at + 40] + b"\0" * 20 + content[at + 60 :])
    data = open_dataset(name, image=INPUT, streaming=True)
    line = one_line(trained_on, data)
    assert line.startswith(f"{tar}, image at byte {at}: not a readable image")
    loader = BatchLoader(data.train, 6, on_error="skip")
    found = {number for images, _ in loader.epoch(1) for number in numbers(images)}
    assert found == set(range(24)) - {15}
    assert loader.skipped == 1


def test_sources_that_are_read_in_place_are_not_streamed(tmp_path: Path) -> None:
    line = one_line(open_dataset, f"imagefolder:{tmp_path}", image=INPUT, streaming=True)
    assert "is read in place already, image by image; leave streaming out" in line


def test_a_step_that_needs_single_images_of_a_stream_stops(tmp_path: Path) -> None:
    name = shards(tmp_path / "s", "parquet", "train", "validation", "test")
    data = open_dataset(name, image=INPUT, streaming=True)
    line = one_line(data.train.floats, slice(0, 2))
    assert line.endswith("leave data.streaming out")


def test_no_disk_for_the_copy_of_a_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    name = shards(tmp_path / "s", "parquet", "train", "validation", "test")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vitrim.compress.data.packed_images._write", full)
    line = one_line(open_dataset, name, image=INPUT, streaming=True)
    assert "no space left" in line.lower()
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_no_disk_for_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    root = write_folder(write_folder(tmp_path / "p", "train", 0, 30), "val", 100)
    monkeypatch.setattr("vitrim.compress.data.decoding.MEMORY_LIMIT_BYTES", 0)
    monkeypatch.setattr("vitrim.compress.data.decoding._write", lambda *_: full())

    def full() -> None:
        raise OSError(28, "No space left on device")

    line = one_line(open_dataset, f"imagefolder:{root}", image=INPUT)
    assert "no space left" in line.lower()
    assert not [path for path in cache.rglob("*") if path.is_file()]
    assert len(open_dataset(f"imagefolder:{root}", image=INPUT, cache_gb=0).train) == 27


def test_zero_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "p" / "ant").mkdir(parents=True)
    assert "no images in this class" in one_line(
        open_dataset, f"imagefolder:{tmp_path / 'p'}", image=INPUT, cache_gb=0
    )
    write_parquet(tmp_path / "q" / "train.parquet", 0, 0)
    line = one_line(open_dataset, f"parquet:{tmp_path / 'q'}", image=INPUT, streaming=True)
    assert "images" in line


def test_workers_read_a_folder_and_tars(tmp_path: Path) -> None:
    root = write_folder(write_folder(tmp_path / "p", "train", 0, 30), "val", 100)
    tars = shards(tmp_path / "s", "webdataset", "train", "val")
    for name in (f"imagefolder:{root}", tars):
        data = open_dataset(name, image=INPUT, cache_gb=0)
        loader = BatchLoader(data.train, 4, workers=2)
        for images, targets in loader.epoch(1):
            assert [number % 3 for number in numbers(images)] == targets.tolist()
        loader.close()


def test_the_limit_above_which_nothing_is_decoded_is_documented() -> None:
    assert loading.CACHE_GB == 16.0
