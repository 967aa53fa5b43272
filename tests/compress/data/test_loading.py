"""Loading of image folders, parquet, arrow and saved data sets, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import datasets
import numpy as np
import pytest
from PIL import Image
from vitrim.compress.data import fashion_mnist
from vitrim.compress.data.decoding import cache_folder
from vitrim.compress.data.embedded import ARCHIVE
from vitrim.compress.data.loading import open_dataset, open_sample, require_classes
from vitrim.compress.data.named_datasets import canonical_name, default_preprocessing
from vitrim.compress.data.splits import DataSplits, Split
from vitrim.core.errors import InputError

SMALL = (3, 8, 8)


@pytest.fixture(scope="module")
def quickstart() -> DataSplits:
    return open_dataset("quickstart", image=(1, 28, 28))


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))


def noise_image(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 11, 3), dtype=np.uint8))


def write_folder(root: Path, counts: dict[str, int], first: int = 0) -> Path:
    for label, count in counts.items():
        (root / label).mkdir(parents=True)
        for index in range(count):
            first += 1
            noise_image(first).save(root / label / f"{index}.png")
    return root


def hub_like(count: int, first: int = 0, classes: int = 3) -> datasets.Dataset:
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["ant", "bee", "cat"][:classes]),
        }
    )
    rows = {
        "image": [noise_image(first + index) for index in range(count)],
        "label": [index % classes for index in range(count)],
    }
    return datasets.Dataset.from_dict(rows, features=features)


def contents(split: Split) -> set[bytes]:
    return {
        split.batch(slice(index, index + 1))[0].numpy().tobytes() for index in range(len(split))
    }


def assert_no_overlap(data: DataSplits) -> None:
    train, val, test = contents(data.train), contents(data.val), contents(data.test)
    assert len(train) == len(data.train)
    assert not train & val
    assert not train & test
    assert not val & test


def test_quickstart_is_small_normalised_and_has_equal_classes(quickstart: DataSplits) -> None:
    assert (len(quickstart.train), len(quickstart.val), len(quickstart.test)) == (
        11_000,
        1_500,
        3_000,
    )
    assert quickstart.labels == fashion_mnist.LABELS
    assert ARCHIVE.stat().st_size <= 6 * 10**6
    assert "Zalando SE" in ARCHIVE.with_name("LICENSE.fashion-mnist").read_text(encoding="utf-8")
    for split in (quickstart.train, quickstart.val, quickstart.test):
        assert np.bincount(split.targets).tolist() == [len(split) // 10] * 10
        # The first images are of all classes.
        assert len(set(split.targets[:100].tolist())) == 10
        images, labels = split.batch(np.array([0, len(split) - 1]))
        assert images.shape == (2, 1, 28, 28)
        assert labels.shape == (2,)
    mean, std = quickstart.train.floats().mean(), quickstart.train.floats().std()
    assert abs(float(mean)) < 0.02
    assert abs(float(std) - 1) < 0.02


def test_quickstart_is_part_of_the_baselines_division(quickstart: DataSplits) -> None:
    if fashion_mnist.installed_folder() is None:
        pytest.skip("dataset-fashion-mnist is not installed")
    whole = open_dataset("fashion_mnist", image=(1, 28, 28))
    assert (len(whole.train), len(whole.val), len(whole.test)) == (55_000, 5_000, 10_000)
    for part in ("train", "val", "test"):
        few: Split = getattr(quickstart, part)
        images, labels = getattr(whole, part).batch(slice(None))
        known = {
            image.tobytes(): int(label) for image, label in zip(images.numpy(), labels, strict=True)
        }
        few_images, few_labels = few.batch(slice(None))
        assert all(known.get(image.tobytes()) is not None for image in few_images.numpy())
        assert (
            np.mean(
                [
                    known[image.tobytes()] == int(label)
                    for image, label in zip(few_images.numpy(), few_labels, strict=True)
                ]
            )
            > 0.999
        )


def test_quickstart_at_another_size() -> None:
    data = open_dataset("quickstart", image=(3, 16, 20), limit=50)
    assert len(data.train) == 50
    images, _ = data.train.batch(slice(0, 4))
    assert images.shape == (4, 3, 16, 20)
    # Grey on three channels.
    assert bool((images[:, 0] == images[:, 2]).all())


def test_a_folder_of_classes_is_divided_without_overlap(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "images", {"ant": 30, "bee": 20})
    data = open_dataset(f"imagefolder:{root}", image=SMALL)
    assert data.labels == ("ant", "bee")
    assert (len(data.train), len(data.val), len(data.test)) == (36, 4, 10)
    assert_no_overlap(data)
    again = open_dataset(f"imagefolder:{root}", image=SMALL)
    assert contents(again.val) == contents(data.val)
    assert contents(open_dataset(f"imagefolder:{root}", image=SMALL, seed=5).val) != contents(
        data.val
    )


def test_official_splits_are_kept(tmp_path: Path) -> None:
    for part, count, first in (("train", 20, 0), ("val", 5, 100), ("test", 6, 200)):
        write_folder(tmp_path / part, {"ant": count, "bee": count}, first)
    data = open_dataset(f"imagefolder:{tmp_path}", image=SMALL)
    assert (len(data.train), len(data.val), len(data.test)) == (40, 10, 12)
    assert_no_overlap(data)


def test_the_official_validation_split_is_test_where_there_is_no_test(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"ant": 20, "bee": 20})
    write_folder(tmp_path / "val", {"ant": 5, "bee": 5}, 100)
    data = open_dataset(f"imagefolder:{tmp_path}", image=SMALL)
    assert (len(data.train), len(data.val), len(data.test)) == (36, 4, 10)
    assert_no_overlap(data)


@pytest.mark.parametrize("kind", ["parquet", "arrow", "disk"])
def test_local_files_of_the_datasets_library(tmp_path: Path, kind: str) -> None:
    train, test = hub_like(30), hub_like(9, first=100)
    path = tmp_path / "set"
    if kind == "parquet":
        path.mkdir()
        train.to_parquet(str(path / "train-0.parquet"))
        test.to_parquet(str(path / "test-0.parquet"))
    elif kind == "arrow":
        train.save_to_disk(str(tmp_path / "a"))
        test.save_to_disk(str(tmp_path / "b"))
        path.mkdir()
        (tmp_path / "a/data-00000-of-00001.arrow").rename(path / "train-0.arrow")
        (tmp_path / "b/data-00000-of-00001.arrow").rename(path / "test-0.arrow")
    else:
        datasets.DatasetDict({"train": train, "test": test}).save_to_disk(str(path))
    data = open_dataset(f"{kind}:{path}", image=SMALL)
    assert data.labels == ("ant", "bee", "cat")
    assert (len(data.train), len(data.val), len(data.test)) == (27, 3, 9)
    assert_no_overlap(data)
    pixels, labels = data.test.batch(slice(0, 1))
    assert labels.tolist() == [0]
    assert np.array_equal(pixels[0].numpy(), data.preprocessing.pixels(noise_image(100)))


def test_a_split_without_labels_is_ignored(tmp_path: Path) -> None:
    hidden = hub_like(6, first=300).map(lambda row: {"label": -1})
    sets = datasets.DatasetDict(
        {"train": hub_like(30), "validation": hub_like(9, first=100), "test": hidden}
    )
    sets.save_to_disk(str(tmp_path / "set"))
    data = open_dataset(f"disk:{tmp_path}/set", image=SMALL)
    assert (len(data.train), len(data.val), len(data.test)) == (27, 3, 9)


def test_labels_may_be_words(tmp_path: Path) -> None:
    rows = {"img": [noise_image(index) for index in range(20)], "target": ["dog", "ape"] * 10}
    features = datasets.Features({"img": datasets.Image(), "target": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "set.parquet"))
    data = open_dataset(f"parquet:{tmp_path}/set.parquet", image=SMALL)
    assert data.labels == ("ape", "dog")


def test_decoded_images_are_cached_on_disk(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "images", {"ant": 20, "bee": 20})
    cache = tmp_path / "decoded"
    data = open_dataset(f"imagefolder:{root}", image=SMALL, cache=cache)
    assert isinstance(data.train.pixels, np.memmap)
    (file,) = cache.iterdir()
    stamp = file.stat().st_mtime_ns
    again = open_dataset(f"imagefolder:{root}", image=SMALL, cache=cache)
    assert file.stat().st_mtime_ns == stamp
    assert (
        contents(again.test)
        == contents(data.test)
        == contents(open_dataset(f"imagefolder:{root}", image=SMALL).test)
    )
    # A changed image makes another data set; a truncated file is no cache.
    noise_image(999).save(root / "ant" / "0.png")
    changed = open_dataset(f"imagefolder:{root}", image=SMALL, cache=cache)
    assert len(list(cache.iterdir())) == 2
    assert data.preprocessing.pixels(noise_image(999)).tobytes() in contents(
        changed.train
    ) | contents(changed.val) | contents(changed.test)
    file.write_bytes(file.read_bytes()[:100])
    noise_image(1).save(root / "ant" / "0.png")
    assert len(open_dataset(f"imagefolder:{root}", image=SMALL, cache=cache).train) == len(
        data.train
    )


def test_large_data_sets_are_cached_in_the_users_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitrim.compress.data.decoding.MEMORY_LIMIT_BYTES", 1000)
    root = write_folder(tmp_path / "images", {"ant": 20, "bee": 20})
    assert isinstance(open_dataset(f"imagefolder:{root}", image=SMALL).train.pixels, np.memmap)
    assert len(list(cache_folder().iterdir())) == 1


def test_a_corrupt_image_is_named(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "images", {"ant": 20, "bee": 20})
    whole = root / "bee" / "7.png"
    whole.write_bytes(whole.read_bytes()[:80])
    with pytest.raises(
        InputError, match=rf"^{re.escape(str(whole))}: not a readable image"
    ) as error:
        open_dataset(f"imagefolder:{root}", image=SMALL, cache=tmp_path / "decoded")
    assert "\n" not in str(error.value)
    # Nothing half-written.
    assert not list((tmp_path / "decoded").iterdir())
    whole.write_text("no image at all", encoding="utf-8")
    with pytest.raises(InputError, match=r"7\.png: not a readable image"):
        open_dataset(f"imagefolder:{root}", image=SMALL)


def test_a_corrupt_row_is_named(tmp_path: Path) -> None:
    good = hub_like(20).cast_column("image", datasets.Image(decode=False))
    bad = good.map(
        lambda row, index: (
            {"image": {"bytes": b"\x89PNG\r\n", "path": None}} if index == 13 else row
        ),
        with_indices=True,
    )
    bad.cast_column("image", datasets.Image()).to_parquet(str(tmp_path / "set.parquet"))
    with pytest.raises(
        InputError, match=r"set\.parquet, split train, row 13: not a readable image"
    ):
        open_dataset(f"parquet:{tmp_path}/set.parquet", image=SMALL)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"ant": 10}, r"all training images are of one class \(ant\)"),
        ({"ant": 10, "bee": 0}, "bee: no images in this class"),
        ({}, "no class folders in it"),
        ({"ant": 1, "bee": 1}, "too few for a held-out split"),
    ],
)
def test_folders_that_cannot_be_learned_from_are_refused(
    tmp_path: Path, counts: dict[str, int], message: str
) -> None:
    root = tmp_path / "images"
    root.mkdir()
    write_folder(root, counts)
    with pytest.raises(InputError, match=message):
        open_dataset(f"imagefolder:{root}", image=SMALL)


def test_a_class_that_train_does_not_have_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"ant": 10, "bee": 10})
    write_folder(tmp_path / "test", {"ant": 3, "wasp": 3}, 100)
    with pytest.raises(InputError, match="wasp: a class that the training split does not have"):
        open_dataset(f"imagefolder:{tmp_path}", image=SMALL)


def test_an_empty_data_set_is_refused(tmp_path: Path) -> None:
    hub_like(0).to_parquet(str(tmp_path / "set.parquet"))
    with pytest.raises(InputError, match="the data set is empty"):
        open_dataset(f"parquet:{tmp_path}/set.parquet", image=SMALL)


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (b"PAR1 not really PAR1", "parquet", "not readable as parquet"),
        (b"nothing", "arrow", "not readable as arrow"),
    ],
)
def test_a_file_of_another_format_is_refused(
    tmp_path: Path, content: bytes, kind: str, message: str
) -> None:
    path = tmp_path / f"train.{kind}"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        open_dataset(f"{kind}:{path}", image=SMALL)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["imagefolder", "parquet", "arrow", "disk"])
def test_a_missing_path_is_named(tmp_path: Path, kind: str) -> None:
    with pytest.raises(InputError, match=f"{re.escape(str(tmp_path))}/nowhere: no such"):
        open_dataset(f"{kind}:{tmp_path}/nowhere", image=SMALL)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cifar1", "did you mean 'cifar10'"),
        ("fashionmnist", "did you mean 'fashion-mnist'"),
        ("zzz", "known are quickstart"),
        ("pictures:/data", "'pictures' is not a kind of source; choose one of imagefolder"),
        ("images:/data", "images without labels, and this needs labels; use imagefolder:PATH"),
        ("imagefolder:", "missing after imagefolder"),
    ],
)
def test_an_unknown_name_gets_the_nearest(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_dataset(spec, image=SMALL)


def test_names_have_one_canonical_spelling() -> None:
    assert canonical_name("Fashion_MNIST") == "fashion-mnist"
    assert canonical_name("imagenet") == "imagenet-1k"
    assert canonical_name("someone/something") == "hub:someone/something"


def test_an_unreachable_hub_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    # With this switch the library fails at once, exactly as without a network.
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        InputError, match=r"^nobody/nothing: not available from the hub.*imagefolder:PATH"
    ) as error:
        open_dataset("nobody/nothing", image=SMALL)
    assert "\n" not in str(error.value)


def test_the_number_of_outputs_must_fit(quickstart: DataSplits) -> None:
    require_classes(quickstart, 10, "vit_tiny")
    with pytest.raises(
        InputError,
        match="quickstart has 10 classes, but vit_tiny has 1000 outputs; set num_classes = 10",
    ):
        require_classes(quickstart, 1000, "vit_tiny")


def test_a_sample_is_of_its_split_and_no_other_image_is_decoded(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "images", {"ant": 12, "bee": 6})
    spec = f"imagefolder:{root}"
    preprocessing = default_preprocessing(spec, SMALL)
    whole = open_dataset(spec, image=SMALL, seed=4, validation=0.2)
    parts: tuple[Literal["train", "val", "test"], ...] = ("train", "val", "test")
    for part in parts:
        drawn = open_sample(
            spec, part, 3, preprocessing=preprocessing, classes=2, seed=4, validation=0.2
        )
        assert len(drawn) == min(3, len(getattr(whole, part)))
        assert contents(drawn) <= contents(getattr(whole, part))
    drawn = open_sample(spec, "train", 6, preprocessing=preprocessing, classes=2)
    assert sorted(drawn.targets.tolist()) == [0, 0, 0, 0, 1, 1]
    one, same, other = (
        contents(
            open_sample(spec, "train", 6, preprocessing=preprocessing, classes=2, draw_seed=seed)
        )
        for seed in (1, 1, 2)
    )
    assert one == same
    assert one != other
    # Images that are not drawn may be damaged.
    kept = {bytes(image) for image in one}
    for file in root.rglob("*.png"):
        with Image.open(file) as image:
            pixels = preprocessing.pixels(image)
        if pixels.tobytes() not in kept:
            file.write_bytes(file.read_bytes()[:50] + bytes(file.stat().st_size - 50))
    assert (
        contents(open_sample(spec, "train", 6, preprocessing=preprocessing, classes=2, draw_seed=1))
        == one
    )
    with pytest.raises(InputError, match=f"{spec} has 2 classes, but the model has 7 outputs"):
        open_sample(spec, "train", 6, preprocessing=preprocessing, classes=7)
