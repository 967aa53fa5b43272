"""Data sets of the Hugging Face `datasets` library: from the hub, or local files.

Local files are parquet, arrow, or folders written by `save_to_disk`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...core.errors import InputError
from .decoding import RawDataset, RawSplit
from .sealed_index import seal_of
from .splits import SPLIT_NAMES, PartName, split_of

LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "cls", "target", "category", "answer")
NOT_ON_HUB = (
    "not available from the hub; check the name and the network (HF_TOKEN for gated sets), "
    "or download the files and use imagefolder:PATH or parquet:PATH"
)
IMAGE_COLUMNS = ("image", "img", "picture", "pixel_values", "jpg", "png")


def read_hub(name: str) -> RawDataset:
    """Open a data set by its hub name, from the local cache if it is there.

    Raises:
        InputError: It cannot be reached or read.
    """
    import datasets

    return _load(lambda: datasets.load_dataset(name), name, NOT_ON_HUB)


def read_parquet(path: Path) -> RawDataset:
    """Open a parquet file, or a folder of files (or folders) named train*, validation*, test*.

    Raises:
        InputError: A file is missing or cannot be read.
    """
    import datasets

    files = files_by_split(path, "parquet")
    return _load(
        lambda: datasets.load_dataset("parquet", data_files=files),
        str(path),
        "not readable as parquet",
        files,
    )


def read_arrow(path: Path) -> RawDataset:
    """Open an arrow file of `datasets`, or a folder of files named as for `read_parquet`.

    Raises:
        InputError: A file is missing or cannot be read.
    """
    import datasets

    files = files_by_split(path, "arrow")

    def load() -> Any:
        return {
            split: datasets.concatenate_datasets(
                [datasets.Dataset.from_file(file) for file in part]
            )
            for split, part in files.items()
        }

    return _load(load, str(path), "not readable as arrow", files)


def read_disk(path: Path) -> RawDataset:
    """Open a folder written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`.

    Raises:
        InputError: The folder is missing or cannot be read.
    """
    import datasets

    if not path.is_dir():
        raise InputError(f"{path}: no such folder; disk: names a folder written by save_to_disk")
    return _load(
        lambda: datasets.load_from_disk(str(path)),
        str(path),
        "not a folder written by save_to_disk",
    )


def files_by_split(path: Path, ending: str) -> dict[str, list[str]]:
    """The files of each split: `path` itself, or those in it named train*, validation*, test*.

    Raises:
        InputError: There is no file for training, or one belongs to no split.
    """
    if path.is_file():
        return {"train": [str(path)]}
    if not path.is_dir():
        raise InputError(f"{path}: no such file or folder")
    found: dict[str, list[str]] = {}
    unnamed: list[str] = []
    for file in sorted(path.rglob(f"*.{ending}")):
        part = _part_of(file.relative_to(path))
        (unnamed if part is None else found.setdefault(part, [])).append(str(file))
    if unnamed and "train" in found:
        raise InputError(
            f"{unnamed[0]}: is it train, validation or test? Rename it (train*.{ending}, "
            f"validation*.{ending}, test*.{ending}), or move it elsewhere"
        )
    if unnamed:
        found["train"] = unnamed
    if "train" not in found:
        raise InputError(
            f"{path}: no .{ending} file for training in it; "
            f"name the files train*.{ending}, validation*.{ending}, test*.{ending}"
        )
    return found


def _part_of(file: Path) -> PartName | None:
    """The split of a file by the beginning of its name, else by the folder that it lies in."""
    name = file.name.lower()
    for part, names in SPLIT_NAMES.items():
        if name.startswith(names):
            return part
    found = (split_of(folder.name) for folder in file.parents)
    return next((part for part in found if part), None)


def _load(
    load: Callable[[], Any],
    where: str,
    problem: str,
    files: Mapping[str, list[str]] | None = None,
) -> RawDataset:
    """Call a loader of the library, and find images and labels in what it returns.

    Args:
        load: Returns a data set or its splits.
        where: The source, for messages.
        problem: The text of errors of the library.
        files: The files of each split, from which its fingerprint follows (default: that of the
            library, which depends on where the files lie).

    Returns:
        The splits.

    Raises:
        InputError: The library raised an error, or a column is missing.
    """
    with reading_errors(where, problem):
        loaded = load()
    return _raw_dataset(loaded, where, files or {})


@contextlib.contextmanager
def reading_errors(where: str, problem: str) -> Iterator[None]:
    """Turn the errors of `datasets` into an InputError of one line.

    Args:
        where: The source, with which the line begins.
        problem: What is wrong with it, and the way out.
    """
    import datasets

    bars = datasets.utils.logging.is_progress_bar_enabled()
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        # Downloads and parsers raise errors of many libraries: requests, httpx, pyarrow, zlib, ...
        if "corresponds to no data" in str(error):
            raise InputError(
                f"{where}: the data set is empty; give it images, or choose another data set"
            ) from error
        reason = (str(error).strip().splitlines() or [""])[0][:160]
        raise InputError(f"{where}: {problem} ({type(error).__name__}: {reason})") from error
    finally:
        (datasets.enable_progress_bars if bars else datasets.disable_progress_bars)()


def _raw_dataset(loaded: Any, where: str, files: Mapping[str, list[str]]) -> RawDataset:
    splits: Mapping[str, Any] = loaded if isinstance(loaded, Mapping) else {"train": loaded}
    by_name = {name.lower(): name for name in reversed(list(splits))}
    parts = {
        part: next((by_name[name] for name in names if name in by_name), None)
        for part, names in SPLIT_NAMES.items()
    }
    if parts["train"] is None:
        raise InputError(f"{where}: it has the splits {', '.join(splits)} but no train split")
    train = splits[parts["train"]]
    features = train.features
    image, label = image_column(features, where), label_column(features, where)
    labels, number = _classes(train, label, where)

    def read(name: str) -> RawSplit:
        targets = _targets(splits[name], label, number, where)
        seals = [(Path(file).name, seal_of(file)) for file in files.get(name, ())]
        version = repr(seals) if seals else f"{splits[name]._fingerprint} {where}"
        stamp = hashlib.sha256(f"{version} {name} {len(targets)}".encode()).hexdigest()
        return _raw_split(splits[name], image, targets, f"{where}, split {name}", stamp)

    def read_labelled(name: str | None) -> RawSplit | None:
        if name is None or label not in splits[name].features:
            return None
        found = read(name)
        # Many test splits, such as ImageNet's, are published without labels (-1).
        return None if len(found) and found.targets.min() < 0 else found

    return RawDataset(
        labels, read(parts["train"]), read_labelled(parts["val"]), read_labelled(parts["test"])
    )


def image_column(features: Mapping[str, Any], where: str) -> str:
    """The column of images; InputError if there is none."""
    import datasets

    typed = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    named = [name for name in IMAGE_COLUMNS if name in features]
    if not typed and not named:
        raise InputError(f"{where}: no image column among {', '.join(features)}; name it `image`")
    return (typed or named)[0]


def label_column(features: Mapping[str, Any], where: str) -> str:
    """The column of class labels; InputError if there is none."""
    import datasets

    named = [name for name in LABEL_COLUMNS if name in features]
    typed = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if not typed and not named:
        raise InputError(f"{where}: no label column among {', '.join(features)}; name it `label`")
    # CIFAR-100 has two label columns; `fine_label` comes first in both lists.
    return (named or typed)[0]


def _classes(dataset: Any, label: str, where: str) -> tuple[tuple[str, ...], dict[Any, int] | None]:
    feature = dataset.features[label]
    if hasattr(feature, "names") and feature.names:
        return tuple(feature.names), None
    values = sorted(set(dataset[label][:]))
    if not values:
        raise InputError(f"{where}: it holds no images")
    if any(isinstance(value, float | list | dict) or value is None for value in values):
        raise InputError(
            f"{where}: column {label} holds {type(values[0]).__name__} values; "
            "class labels are integers or words"
        )
    return tuple(str(value) for value in values), {
        value: position for position, value in enumerate(values)
    }


def _targets(
    dataset: Any, label: str, number: dict[Any, int] | None, where: str
) -> NDArray[np.int64]:
    values = dataset[label][:]
    if number is not None:
        unknown = next((value for value in values if value not in number), None)
        if unknown is not None:
            raise InputError(f"{where}: class {unknown!r} occurs outside the training split only")
        values = [number[value] for value in values]
    return np.array(values, dtype=np.int64)


def _raw_split(
    dataset: Any, image: str, targets: NDArray[np.int64], where: str, stamp: str
) -> RawSplit:
    import datasets

    # Undecoded, so that our error can name a corrupt image.
    raw = dataset.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    rows = _Rows(raw, image, where)
    return RawSplit(targets, rows.open, rows.where, stamp)


@dataclass(frozen=True)
class _Rows:
    """The images of a split; a class, since closures cannot be pickled."""

    dataset: Any
    column: str
    name: str

    def open(self, index: int) -> Image.Image:
        return open_cell(self.dataset[index][self.column])

    def where(self, index: int) -> str:
        return f"{self.name}, row {index}"


def open_cell(cell: Mapping[str, Any] | None) -> Image.Image:
    """Decode a cell of an image column: its `bytes`, or the file at its `path`.

    Raises:
        ValueError: The cell is empty.
        OSError: The image cannot be decoded; Pillow raises other errors too.
    """
    if cell is None or (cell.get("bytes") is None and not cell.get("path")):
        raise ValueError("no image in this row")
    with Image.open(
        io.BytesIO(cell["bytes"]) if cell.get("bytes") is not None else cell["path"]
    ) as file:
        file.load()
        return file
