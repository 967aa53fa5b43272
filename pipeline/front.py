"""Many sizes from one pass over the images: cut, checked, saved, and compared in one table."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import Tensor

from ..bench.report.front import Front, Size, front_csv, front_markdown, front_picture
from ..bench.report.writing import PICTURE
from ..compress.latency.shapes import network_shape
from ..compress.masks.mask import StructuredMask
from ..compress.network.architecture import Architecture
from ..compress.network.count import count_macs, count_params
from ..compress.network.files import MASK_FILE, MODEL, TRIM_FILE, WEIGHTS, save
from ..compress.network.modules.model import CompactModel
from ..compress.oneshot.budgets import Kind, Precision, read_budget
from ..compress.oneshot.choice import priced
from ..compress.oneshot.saved_state import fingerprint_of
from ..compress.oneshot.trim import Trimmed
from ..core.errors import InputError
from ..core.storage import replace_file, replace_folder
from ..core.written_kinds import Contents, FolderKind, has_schema, json_object, within
from ..targets.cost_table import CostTable
from .quality import LabelledImages, Quality, measure_quality, predicted_classes
from .trim_step import trim_record

FRONT_FILE, SCHEMA = "front.json", "vitrim.front/1"
TABLE_FILE, CSV_FILE, PICTURE_FILE = "front.md", "front.csv", "front.svg"
# Names of the kinds of budgets in the folders of sizes.
FOLDERS = {"macs": "macs", "params": "params", "file": "file", "cost": "latency"}


def _contents(folder: Path) -> Contents | None:
    if not has_schema(json_object(folder / FRONT_FILE), SCHEMA):
        return None
    found = {FRONT_FILE: None, TABLE_FILE: None, CSV_FILE: None, PICTURE_FILE: PICTURE}
    for path in folder.iterdir():
        found |= within(path.name, MODEL.contents(path))
    return found


FRONT = FolderKind("a front of sizes", FRONT_FILE, _contents)


@dataclass(frozen=True)
class FrontRequest:
    """What a front consists of.

    Attributes:
        kind: The kind of the budget.
        amounts: The budgets in the unit of `trim`, falling.
        shares: The same as shares of the dense network.
        model_name: Title of the table and the picture.
        data_name: The data set of the images.
        note: Entries for the notes of the masks.
        table: The cost table by which latency is predicted, for the kind "cost".
    """

    kind: Kind
    amounts: tuple[float, ...]
    shares: tuple[float, ...]
    model_name: str
    data_name: str
    note: dict[str, str]
    table: CostTable | None = None

    @property
    def estimated(self) -> bool:
        """Whether latencies are estimates, of a table that was not measured."""
        return self.table is not None and self.table.estimated is not None

    def folders(self) -> list[str]:
        """The folder of each size, e.g. macs-70."""
        digits = 0
        while True:
            names = [f"{FOLDERS[self.kind]}-{100 * share:.{digits}f}" for share in self.shares]
            if len(set(names)) == len(names):
                return names
            digits += 1


@dataclass(frozen=True)
class FrontCut:
    """A cut of a front.

    Attributes:
        trimmed: The cut of the widths.
        mask: What was kept, with the dropped tokens.
        measured_ms: The p50 of its exported file; None if it was not measured.
    """

    trimmed: Trimmed
    mask: StructuredMask
    measured_ms: float | None = None


# From a budget in the unit of `trim` to a cut.
Cutter = Callable[[float], FrontCut]


def front_amounts(
    dense: CompactModel,
    kind: Kind,
    smallest: float,
    count: int,
    largest: float,
    table: CostTable | None = None,
    precision: Precision = "fp32",
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The budgets of a front, evenly spaced, and their shares of the dense network.

    Args:
        dense: The dense network.
        kind: The kind of the budget.
        smallest: The smallest budget, in the unit of `trim`.
        count: Number of sizes, at least 2.
        largest: The largest size, as a share of the dense network.
        table: The cost table, for the kind "cost".
        precision: Of the weights in a file, for the kind "file".

    Returns:
        The budgets and the shares, both falling.

    Raises:
        InputError: The smallest budget is not below the largest size.
    """
    if table is not None:
        whole = table.latency_ms(network_shape(dense.architecture))
        share = smallest / whole
    else:
        given = {"macs": None, "params": None, "budget": smallest}
        budget = read_budget(given, kind, None, precision)
        whole = budget.network(priced(dense.architecture))
        share = budget.limit(whole) / whole
    if share >= largest:
        raise InputError(
            f"the smallest size is {share:.2f} of the dense network; a front goes down from "
            f"{largest:g}: give a smaller budget"
        )
    shares = tuple(largest + (share - largest) * step / (count - 1) for step in range(count))
    unit = 1.0 if kind in ("macs", "params") else whole
    return tuple(unit * each for each in shares), shares


def make_front(
    cutter: Callable[[], Cutter],
    request: FrontRequest,
    out: Path,
    *,
    dense: CompactModel,
    fingerprint: str,
    labelled: LabelledImages | None,
    dense_ms: float | None = None,
    show: Callable[[Size], None],
) -> Front:
    """Cut all sizes that the folder does not have yet, and write the table and the picture.

    The folder has `front.json` from the start, and a folder of each size once it is complete, so
    that an interrupted front continues.

    Args:
        cutter: Takes or loads the statistics, and returns what cuts to a budget; called only if a
            size is missing.
        request: The sizes.
        out: The folder.
        dense: The dense network.
        fingerprint: Identifies everything that a size depends on.
        labelled: Images for accuracies.
        dense_ms: The measured latency of the dense network; None if it was not measured.
        show: Called with each size, the dense network first.

    Returns:
        All sizes.

    Raises:
        InputError: The folder has the front of another request, or a budget is out of reach.
    """
    sizes = _read(out, fingerprint)
    if not sizes:
        sizes = [replace(_dense_size(dense, request, labelled), measured_ms=dense_ms)]
        _write(out, request, sizes, fingerprint)
    for size in sizes:
        show(size)
    known = {size.folder for size in sizes}
    cut_to: Cutter | None = None
    classes: Tensor | None = None
    names = request.folders()
    for name, amount, share in zip(names, request.amounts, request.shares, strict=True):
        if name in known:
            continue
        cut_to = cutter() if cut_to is None else cut_to
        if classes is None and labelled is not None and dense.head is not None:
            classes = predicted_classes(dense, labelled)
        found = cut_to(amount)
        quality = None
        if labelled is not None:
            quality = measure_quality(
                found.trimmed.model, labelled, title=f"checking {name}", dense_classes=classes
            )
        size = _save_size(found, request, out / name, share, quality)
        sizes.append(size)
        _write(out, request, sizes, fingerprint)
        show(size)
    front = Front(request.kind, request.model_name, tuple(sizes), request.estimated)
    replace_file(out / TABLE_FILE, front_markdown(front))
    replace_file(out / CSV_FILE, front_csv(front))
    replace_file(out / PICTURE_FILE, front_picture(front), PICTURE)
    return front


def front_fingerprint(
    dense: CompactModel, prediction_images: Tensor, request: FrontRequest, parts: Sequence[object]
) -> str:
    """Identify everything that the sizes of a front depend on.

    Args:
        dense: The dense network.
        prediction_images: The images of the cut.
        request: The sizes.
        parts: Options of the cut and of the check.

    Returns:
        A hash in hexadecimal.
    """
    wanted = (request.kind, request.amounts, request.data_name, *parts)
    return fingerprint_of(dense, prediction_images, wanted)


def _dense_size(
    dense: CompactModel, request: FrontRequest, labelled: LabelledImages | None
) -> Size:
    quality = None
    if labelled is not None:
        quality = measure_quality(dense, labelled, title="checking the dense model")
    architecture = priced(dense.architecture)
    params = count_params(architecture)
    return Size(
        folder="",
        share=1.0,
        params=params,
        macs=count_macs(architecture),
        file_bytes=4 * params,
        predicted_error=0.0,
        cosine=1.0,
        patch_cosine=1.0,
        latency_ms=_latency_ms(architecture, request),
        **{"agreement": None if dense.head is None else 1.0, **_accuracies(quality)},
    )


def _save_size(
    cut: FrontCut, request: FrontRequest, folder: Path, share: float, quality: Quality | None
) -> Size:
    found = cut.trimmed
    measured = {} if quality is None else {"quality": asdict(quality)}
    with replace_folder(folder, MODEL, overwrite=True) as temporary:
        save(found.model, temporary)
        mask = replace(cut.mask, note={**cut.mask.note, **request.note})
        mask.save(temporary / MASK_FILE)
        replace_file(temporary / TRIM_FILE, trim_record(found, **measured))
    architecture = priced(found.model.architecture)
    return Size(
        folder=folder.name,
        share=share,
        params=count_params(architecture),
        macs=count_macs(architecture),
        file_bytes=(folder / WEIGHTS).stat().st_size,
        predicted_error=found.predicted_error,
        cosine=found.check.cosine,
        patch_cosine=found.check.patch_cosine,
        latency_ms=_latency_ms(architecture, request),
        measured_ms=cut.measured_ms,
        **{"agreement": found.check.agreement, **_accuracies(quality)},
    )


def _latency_ms(architecture: Architecture, request: FrontRequest) -> float | None:
    return None if request.table is None else request.table.latency_ms(network_shape(architecture))


def _accuracies(quality: Quality | None) -> dict[str, float | None]:
    if quality is None:
        return {}
    names = ("top1", "agreement", "knn", "linear")
    return {name: getattr(quality, name) for name in names}


def _write(out: Path, request: FrontRequest, sizes: Sequence[Size], fingerprint: str) -> None:
    record = {
        "schema": SCHEMA,
        "model": request.model_name,
        "data": request.data_name,
        "kind": request.kind,
        "estimated": request.estimated,
        "fingerprint": fingerprint,
        "sizes": [asdict(size) for size in sizes],
    }
    replace_file(out / FRONT_FILE, json.dumps(record, indent=1) + "\n")


def _read(out: Path, fingerprint: str) -> list[Size]:
    """The sizes that are complete; [] without a front."""
    path = out / FRONT_FILE
    if not path.is_file():
        return []
    record = json_object(path)
    if record is None or not has_schema(record, SCHEMA) or record.get("fingerprint") != fingerprint:
        raise InputError(
            f"{out}: the front of another model, other images or another request; name another "
            "folder, or start again with --overwrite"
        )
    try:
        sizes = [Size(**size) for size in record["sizes"]]
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged ({error}); start again with --overwrite") from None
    return [size for size in sizes if not size.folder or (out / size.folder / WEIGHTS).is_file()]
