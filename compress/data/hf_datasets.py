"""Data sets of the Hugging Face `datasets` library: from the hub by name, or local parquet, arrow
and saved-to-disk files.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...core.errors import InputError
from .decoding import Pictures, Sources

_LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target", "category", "answer")
_IMAGE_COLUMNS = ("image", "img", "picture", "pixel_values", "jpg", "png")
_VAL, _TEST = ("validation", "valid", "val", "dev"), ("test",)


def read_hub(name: str) -> Sources:
    """Load a data set by its hub name, from the local cache if it is there. Errors: InputError when
    it cannot be reached or read.
    """
    import datasets

    def load() -> Any:
        return datasets.load_dataset(name)

    return _sources(
        _guarded(
            load,
            name,
            f"the hub has no answer for it; check the name and the network (HF_TOKEN for closed sets), {_WAY_OUT}",
        ),
        name,
    )


_WAY_OUT = "or fetch the files by hand and name imagefolder:PATH or parquet:PATH"


def read_parquet(path: Path) -> Sources:
    """A parquet file, or a folder of them whose names begin with train, validation or test."""
    import datasets

    files = _files(path, "parquet")
    return _sources(
        _guarded(
            lambda: datasets.load_dataset("parquet", data_files=files),
            str(path),
            "not readable as parquet",
        ),
        str(path),
    )


def read_arrow(path: Path) -> Sources:
    """An arrow file as `datasets` writes them, or a folder of them whose names begin with train,
    validation or test.
    """
    import datasets

    def load() -> Any:
        return {
            split: datasets.concatenate_datasets(
                [datasets.Dataset.from_file(name) for name in names]
            )
            for split, names in _files(path, "arrow").items()
        }

    return _sources(_guarded(load, str(path), "not readable as arrow"), str(path))


def read_disk(path: Path) -> Sources:
    """A folder written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    import datasets

    if not path.is_dir():
        raise InputError(f"{path}: no such folder; disk: names a folder written by save_to_disk")
    return _sources(
        _guarded(
            lambda: datasets.load_from_disk(str(path)),
            str(path),
            "not a folder written by save_to_disk",
        ),
        str(path),
    )


def _files(path: Path, ending: str) -> dict[str, list[str]]:
    if path.is_file():
        return {"train": [str(path)]}
    if not path.is_dir():
        raise InputError(f"{path}: no such file or folder")
    found: dict[str, list[str]] = {}
    for file in sorted(path.rglob(f"*.{ending}")):
        kind = next(
            (
                split
                for split, names in (("validation", _VAL), ("test", _TEST))
                if file.name.lower().startswith(names)
            ),
            "train",
        )
        found.setdefault(kind, []).append(str(file))
    if "train" not in found:
        raise InputError(
            f"{path}: no .{ending} file for training in it; name them train*.{ending}, validation*.{ending}, test*.{ending}"
        )
    return found


def _guarded(load: Callable[[], Any], where: str, what: str) -> Any:
    import datasets

    bars = datasets.utils.logging.is_progress_bar_enabled()
    try:
        return load()
    except InputError:
        raise
    except Exception as error:
        # Anything may come out of a download and its parsers: requests, urllib3, httpx, pyarrow,
        # zlib, ...
        if "corresponds to no data" in str(error):
            raise InputError(
                f"{where}: the data set is empty; give it images, or choose another data set"
            ) from error
        reason = (str(error).strip().splitlines() or [""])[0][:160]
        raise InputError(f"{where}: {what} ({type(error).__name__}: {reason})") from error
    finally:
        (datasets.enable_progress_bars if bars else datasets.disable_progress_bars)()


def _sources(loaded: Any, where: str) -> Sources:
    splits: Mapping[str, Any] = loaded if isinstance(loaded, Mapping) else {"train": loaded}
    if "train" not in splits:
        raise InputError(f"{where}: it has the splits {', '.join(splits)} but no train split")
    features = splits["train"].features
    image, label = _image_column(features, where), _label_column(features, where)
    labels, number = _classes(splits["train"], label, where)
    parts = {
        kind: _labelled(splits, names, image, label, number, where)
        for kind, names in (("val", _VAL), ("test", _TEST))
    }
    train = _pictures(
        splits["train"],
        image,
        _targets(splits["train"], label, number, where),
        f"{where}, split train",
    )
    return Sources(labels, train, parts["val"], parts["test"])


def _labelled(
    splits: Mapping[str, Any],
    names: tuple[str, ...],
    image: str,
    label: str,
    number: Any,
    where: str,
) -> Pictures | None:
    name = next((name for name in names if name in splits), None)
    if name is None or label not in splits[name].features:
        return None
    targets = _targets(splits[name], label, number, where)
    # ImageNet's test split, like many, is published without its labels (-1).
    if len(targets) and targets.min() < 0:
        return None
    return _pictures(splits[name], image, targets, f"{where}, split {name}")


def _image_column(features: Mapping[str, Any], where: str) -> str:
    import datasets

    typed = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    named = [name for name in _IMAGE_COLUMNS if name in features]
    if not typed and not named:
        raise InputError(f"{where}: no image column among {', '.join(features)}; name it `image`")
    return (typed or named)[0]


def _label_column(features: Mapping[str, Any], where: str) -> str:
    import datasets

    named = [name for name in _LABEL_COLUMNS if name in features]
    typed = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if not typed and not named:
        raise InputError(f"{where}: no label column among {', '.join(features)}; name it `label`")
    # Of CIFAR-100's two label columns the usual one is `fine_label`, which both lists agree on.
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
            f"{where}: column {label} holds {type(values[0]).__name__} values; class labels are integers or words"
        )
    return tuple(str(value) for value in values), {
        value: position for position, value in enumerate(values)
    }


def _targets(
    dataset: Any, label: str, number: dict[Any, int] | None, where: str
) -> NDArray[np.int64]:
    values = dataset[label][:]
    if number is not None:
        strange = next((value for value in values if value not in number), None)
        if strange is not None:
            raise InputError(f"{where}: class {strange!r} occurs outside the training split only")
        values = [number[value] for value in values]
    return np.array(values, dtype=np.int64)


def _pictures(dataset: Any, image: str, targets: NDArray[np.int64], where: str) -> Pictures:
    import datasets

    # Undecoded, so that a corrupt picture can be named by us.
    raw = dataset.select_columns([image]).cast_column(image, datasets.Image(decode=False))

    def open_row(index: int) -> Image.Image:
        cell = raw[index][image]
        if cell is None or (cell.get("bytes") is None and not cell.get("path")):
            raise ValueError("no picture in this row")
        with Image.open(
            io.BytesIO(cell["bytes"]) if cell.get("bytes") is not None else cell["path"]
        ) as picture:
            picture.load()
            return picture

    stamp = hashlib.sha256(f"{dataset._fingerprint}\0{where}\0{len(dataset)}".encode()).hexdigest()
    return Pictures(targets, open_row, lambda index: f"{where}, row {index}", stamp)
