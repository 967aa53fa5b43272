"""Folders of images: which are splits, in any spelling, and which are classes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from vitrim.compress.data.decoding import RawDataset
from vitrim.compress.data.hf_datasets import read_disk, read_parquet
from vitrim.compress.data.image_folder import label_of, read_image_folder
from vitrim.core.errors import InputError


def write(root: Path, folders: Iterable[str], count: int = 2) -> Path:
    for name in folders:
        (root / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (4, 4), (index, 0, 0)).save(root / name / f"{index}.png")
    return root


def classes_in(*parts: str) -> list[str]:
    return [f"{part}/{label}" for part in parts for label in ("ant", "bee")]


def sizes(data: RawDataset) -> tuple[int | None, ...]:
    return tuple(None if part is None else len(part) for part in (data.train, data.val, data.test))


def refusal(root: Path) -> str:
    with pytest.raises(InputError) as refused:
        read_image_folder(root)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("train", ["Train", "TRAIN", "train", "Training", "tRaInInG"])
@pytest.mark.parametrize(
    ("name", "part"),
    [
        *[(name, "val") for name in ("Val", "VAL", "Valid", "validation", "VALIDATION", "Dev")],
        *[(name, "test") for name in ("Test", "TEST", "Testing")],
    ],
)
def test_a_split_is_recognised_in_any_case(
    tmp_path: Path, train: str, name: str, part: str
) -> None:
    data = read_image_folder(write(tmp_path, classes_in(train, name)))
    assert data.labels == ("ant", "bee")
    assert sizes(data) == ((4, 4, None) if part == "val" else (4, None, 4))


def test_three_splits(tmp_path: Path) -> None:
    data = read_image_folder(write(tmp_path, classes_in("TRAIN", "Valid", "test")))
    assert sizes(data) == (4, 4, 4)


@pytest.mark.parametrize("names", [("Train", "train"), ("train", "Training")])
def test_two_folders_of_one_split_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    line = refusal(write(tmp_path, classes_in(*names, "test")))
    assert re.search(r": Train(ing)? and train both hold the training images; keep one", line)


@pytest.mark.parametrize(
    "names",
    [
        ("training_set", "holdout"),
        ("training_set",),
        ("a_part", "another"),
        ("seg_train", "seg_test", "seg_pred"),
        ("train2017", "val2017"),
        ("TrainSet", "TestSet"),
        ("fold1", "fold2", "fold3", "fold4", "fold5", "fold6"),
    ],
)
def test_splits_under_other_names_are_not_read_as_classes(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    line = refusal(write(tmp_path, classes_in(*names)))
    assert line.startswith(f"{tmp_path}: are {sorted(names)[0]}" if names[1:] else f"{tmp_path}: ")
    assert all(name in line for name in names[:3])
    assert "rename" in line


def test_splits_under_other_names_with_different_classes(tmp_path: Path) -> None:
    folders = ["training_set/ant", "training_set/bee", "holdout/cat"]
    assert "are holdout and training_set splits" in refusal(write(tmp_path, folders))


def test_a_folder_around_the_classes_is_named(tmp_path: Path) -> None:
    assert f"name {tmp_path / 'photos'} if it holds the classes" in refusal(
        write(tmp_path, classes_in("photos"))
    )


@pytest.mark.parametrize(
    "folders",
    [
        ("train", "bus", "test"),
        ("ship/images", "bus/images", "car/images"),
        ("animals/cat", "animals/dog", "vehicles/car", "vehicles/bus"),
        tuple(f"class{number}/{side}" for number in range(6) for side in ("left", "right")),
    ],
)
def test_classes_of_any_name_and_depth_stay_classes(
    tmp_path: Path, folders: tuple[str, ...]
) -> None:
    data = read_image_folder(write(tmp_path, folders))
    assert data.labels == tuple(sorted({folder.partition("/")[0] for folder in folders}))


def test_labels_are_utf8_also_where_the_file_system_encoding_is_ascii() -> None:
    # The name that Python returns for café in such a locale.
    name = "café".encode().decode("ascii", "surrogateescape")
    assert label_of(Path(name)) == label_of(Path("café")) == "café"


# ---- files of the datasets library ----


def table(count: int = 4) -> datasets.Dataset:
    pixels = np.zeros((4, 4, 3), np.uint8)
    rows = {
        "image": [Image.fromarray(pixels)] * count,
        "label": [index % 2 for index in range(count)],
    }
    names = datasets.ClassLabel(names=["ant", "bee"])
    features = datasets.Features({"image": datasets.Image(), "label": names})
    return datasets.Dataset.from_dict(rows, features=features)


def write_tables(root: Path, counts: dict[str, int]) -> Path:
    for name, count in counts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        table(count).to_parquet(root / name)
    return root


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("hf")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder))


@pytest.mark.parametrize(
    "names",
    [
        ("train/0000.parquet", "validation/0000.parquet", "test/0000.parquet"),
        ("Train/0000.parquet", "VAL/0000.parquet", "Testing/0000.parquet"),
        ("Train-0.parquet", "Valid-0.parquet", "TEST-0.parquet"),
        ("0000.parquet", "dev/0000.parquet", "test.parquet"),
    ],
)
def test_the_split_of_a_file_is_its_name_or_its_folder(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    root = write_tables(tmp_path, dict(zip(names, (8, 4, 6), strict=True)))
    assert sizes(read_parquet(root)) == (8, 4, 6)


def test_a_file_that_is_of_no_split_beside_training_files_is_refused(tmp_path: Path) -> None:
    write_tables(tmp_path, {"train-0.parquet": 4, "holdout-0.parquet": 4})
    with pytest.raises(InputError, match=r"holdout-0\.parquet: is it train, validation or test\?"):
        read_parquet(tmp_path)


def test_saved_splits_are_recognised_in_any_case(tmp_path: Path) -> None:
    splits = {"Train": table(8), "Validation": table(4), "TEST": table(6)}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert sizes(read_disk(tmp_path / "saved")) == (8, 4, 6)
