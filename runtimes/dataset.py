"""Data sets that a model is scored on, arranged as its input requires."""

from __future__ import annotations

import os
from typing import Any

from .engine import EngineError, Json, one_line


class DatasetError(EngineError):
    """Why a model cannot be scored on a data set, in one line."""


def open_dataset(numpy: Any, path: str) -> tuple[Any, Any]:
    """Open the images and labels of an .npz file, or of a folder of images.npy and labels.npy.

    The images of a folder are memory-mapped. Raises DatasetError for anything else.
    """
    name = os.path.basename(path.rstrip("/"))
    try:
        if os.path.isdir(path):
            images = numpy.load(os.path.join(path, "images.npy"), mmap_mode="r", allow_pickle=False)
            labels = numpy.load(os.path.join(path, "labels.npy"), allow_pickle=False)
        else:
            with numpy.load(path, allow_pickle=False) as archive:
                images, labels = archive["images"], archive["labels"]
    except (OSError, ValueError, KeyError, EOFError, AttributeError, TypeError) as error:
        raise DatasetError(
            f"{name}: not a data set ({one_line(error)}); "
            "give an .npz with the arrays `images` and `labels`"
        ) from None
    one_each = labels.ndim == 1 and labels.dtype.kind in "iu" and len(labels) == len(images)
    if not one_each or len(labels) == 0:
        raise DatasetError(
            f"{name}: {len(images)} images and labels of shape {labels.shape} {labels.dtype}; "
            "give one integer label for each image"
        )
    return images, labels


def prepare_images(
    numpy: Any,
    images: Any,
    shape: list[int],
    kind: str,
    preprocessing: Json | None,
    layout: str | None = None,
) -> Any:
    """Return images in the model's layout, type and normalisation.

    Args:
        numpy: The module, which is imported only once the runtime is.
        images: Floats (N, C, H, W), which are not normalised, or uint8 (N, C, H, W), (N, H, W, C)
            or, for one channel, (N, H, W). Floats may be (N, H, W, C) if the model's input is.
        shape: The model's input, (batch, C, H, W) or (batch, H, W, C).
        kind: The type of the model's input.
        preprocessing: `mean` and `std` of each channel, applied to uint8 images.
        layout: NCHW or NHWC. None: the last size is the channels where it alone could be.

    Returns:
        Images of the model's shape and type `kind`.

    Raises:
        DatasetError: The size differs, or uint8 images come without mean and std.
    """
    last = channels_are_last(shape, layout)
    first, second, third = shape[1:4]
    channels, height, width = (third, first, second) if last else (first, second, third)
    is_bytes = images.dtype == numpy.uint8
    if images.ndim == 3 and channels == 1:
        images = images[:, None]
    elif (is_bytes or last) and images.ndim == 4 and images.shape[1] != channels == images.shape[3]:
        images = images.transpose(0, 3, 1, 2)
    if list(images.shape[1:]) != [channels, height, width]:
        raise DatasetError(
            f"the data set's images are {list(images.shape[1:])}, "
            f"the model takes {[channels, height, width]}; prepare them at that size"
        )
    if not is_bytes and images.dtype.kind != "f":
        raise DatasetError(
            f"the data set's images are {images.dtype}; give pixels as uint8, or float32 as the "
            "model expects them: (pixels / 255 - mean) / std"
        )
    if is_bytes and kind != "uint8":
        if not preprocessing:
            raise DatasetError(
                "the data set holds bytes, and no mean and std are known to normalise them; "
                "give prepared float32 images, or an artifact"
            )
        mean = numpy.asarray(preprocessing["mean"], dtype=numpy.float32).reshape(1, -1, 1, 1)
        std = numpy.asarray(preprocessing["std"], dtype=numpy.float32).reshape(1, -1, 1, 1)
        images = (images.astype(numpy.float32) / 255 - mean) / std
    images = images.astype(kind, copy=False)
    return images.transpose(0, 2, 3, 1) if last else images


def channels_are_last(shape: list[int], layout: str | None) -> bool:
    """Return whether an input is (batch, H, W, C), by its layout or else by its sizes."""
    if layout is not None:
        return layout == "NHWC"
    return len(shape) == 4 and shape[3] in (1, 3) and shape[1] not in (1, 3)
