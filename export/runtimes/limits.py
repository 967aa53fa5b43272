"""What runtimes cannot do: checked before an export starts, and listed in the documentation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...compress.network.architecture import Architecture
from ...core.errors import InputError
from ..forms import Form
from ..manifest import Batch


@dataclass(frozen=True)
class Planned:
    """What an export is about to do, as far as limits depend on it.

    Attributes:
        precision: The number format.
        batch: Images in a batch, or "dynamic".
        form: The requested graph form; "plain" for torch's graph, None for the runtime's own.
        architecture: The network; None where it is not known yet, or vitrim cannot read the model.
        unread: Why vitrim cannot read the model.
    """

    precision: str = "fp32"
    batch: Batch = 1
    form: Form | str | None = None
    architecture: Architecture | None = None
    unread: str | None = None


@dataclass(frozen=True)
class Limit:
    """Something that a runtime cannot do.

    Attributes:
        what: It, in words, for the documentation.
        instead: What to do instead.
        found: Why an export is beyond the limit; None if it is not.
    """

    what: str
    instead: str
    found: Callable[[Planned], str | None]


def require_within_limits(name: str, limits: Sequence[Limit], planned: Planned) -> None:
    """Raise InputError for the first limit that an export is beyond.

    Args:
        name: The runtime.
        limits: Its limits.
        planned: The export.
    """
    for limit in limits:
        found = limit.found(planned)
        if found is not None:
            raise InputError(f"runtime {name}: {found}; {limit.instead}")


def only_precisions(precisions: Sequence[str]) -> Limit:
    """The limit to some precisions."""
    listed = ", ".join(precisions)

    def found(planned: Planned) -> str | None:
        if planned.precision in precisions:
            return None
        return f"precision {planned.precision!r} was requested, and it has {listed}"

    return Limit(f"precisions other than {listed}", "use one of these", found)


FIXED_BATCH = Limit(
    "any number of images in one file",
    "export with batch 1 or another number, or for another runtime",
    lambda planned: "a file holds one batch size" if planned.batch == "dynamic" else None,
)
ONE_IMAGE = Limit(
    "more than one image in a batch",
    "export with batch 1",
    lambda planned: (
        None
        if planned.batch == 1
        else f"runs one image at a time, and batch {planned.batch} was requested"
    ),
)


def _selections(planned: Planned) -> str | None:
    selects = () if planned.architecture is None else planned.architecture.selects
    dynamic = [select.name for select in selects if select.scorer != "random"]
    if not dynamic:
        return None
    return f"selects no tokens by content, as {dynamic[0]} of this network does"


SELECTIONS = Limit(
    "tokens that are selected by content",
    "export for onnxruntime, openvino or tvm, or use a token mask, which all runtimes run",
    _selections,
)
UNREAD_MODELS = Limit(
    "modules that vitrim cannot read as a Vision Transformer",
    "export for onnxruntime or openvino",
    lambda planned: planned.unread and f"converts models that vitrim can lift: {planned.unread}",
)
