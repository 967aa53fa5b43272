"""The fields of a manifest that callers give, validated before the work of an export."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from ..core.errors import InputError
from .manifest import FileEntry, Manifest, TensorSpec
from .request import ManifestOptions, preprocessing_of

# The fields that `_draft` fills, in place of what an export produces.
_UNUSED_SHA256 = "0" * 64


def description_of(
    name: str | None = None,
    preprocessing: Any = None,
    labels: Sequence[str] | None = None,
    provenance: Mapping[str, str] | None = None,
) -> ManifestOptions:
    """Return the given fields of a manifest, each valid by itself.

    Args:
        name: Name of the model. None: the source's own.
        preprocessing: A `Preprocessing`, or a mapping of its fields. None: the manifest has none.
        labels: One for each class. None: the manifest has none.
        provenance: Further entries for the manifest.

    Raises:
        InputError: A field has the wrong type, is out of range, or two labels are equal.
    """
    options = ManifestOptions(
        name, preprocessing_of(preprocessing), _labels(labels), dict(provenance or {})
    )
    _draft(options)
    return options


def require_description(
    options: ManifestOptions, image: tuple[int, int, int], classes: int | None
) -> None:
    """Validate the given fields of a manifest against the model.

    Args:
        options: The fields.
        image: (channels, height, width) of the model's input.
        classes: Number of its outputs; None if it is not known yet.

    Raises:
        InputError: Preprocessing or labels do not fit; the message has both sizes.
    """
    spec, labels = options.preprocessing, options.labels
    if spec is not None and (spec.channels, spec.height, spec.width) != tuple(image):
        found = f"{spec.channels} x {spec.height} x {spec.width}"
        raise InputError(
            f"preprocessing: it produces images of {found} (channels x height x width), but the "
            f"model takes {' x '.join(map(str, image))}; change channels, height and width"
        )
    if labels is not None and classes is not None and len(labels) != classes:
        raise InputError(
            f"labels: {len(labels)} for a model with {classes} outputs; give one for each output, "
            "in their order, or none"
        )


def _labels(given: Any) -> tuple[str, ...] | None:
    if given is None:
        return None
    if isinstance(given, str | bytes | Mapping) or not hasattr(given, "__iter__"):
        raise InputError(
            f"labels: a {type(given).__name__}; give a list of strings, one for each class"
        )
    labels = tuple(given)
    for number, label in enumerate(labels):
        if not isinstance(label, str) or not label.strip():
            raise InputError(
                f"labels: number {number} is {label!r}; give each class a name, as a string"
            )
    (label, count), *_ = Counter(labels).most_common(1) or [("", 0)]
    if count > 1:
        first, second, *_ = (number for number, other in enumerate(labels) if other == label)
        raise InputError(
            f"labels: numbers {first} and {second} are both {label!r}; give each class its own name"
        )
    # Subclasses of strings, such as numpy's, are written as plain ones.
    return tuple(map(str, labels))


def _draft(options: ManifestOptions) -> None:
    """Build a manifest of these fields, which the export does in the end."""
    try:
        Manifest(
            name=options.name if options.name is not None else "model",
            inputs=(TensorSpec(name="images", shape=("batch",), layout="NCHW"),),
            outputs=(TensorSpec(name="logits", shape=("batch", "classes"), layout="NC"),),
            preprocessing=options.preprocessing,
            labels=options.labels,
            target="target",
            runtime="runtime",
            precision="fp32",
            form="form",
            files=(FileEntry(path="model", role="model", bytes=0, sha256=_UNUSED_SHA256),),
        )
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(map(str, problem["loc"]))
        raise InputError(f"{field}: {problem['msg']}; change or leave out {field}") from None
