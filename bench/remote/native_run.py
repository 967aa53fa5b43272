"""Measure on a device that has no Python: the C++ runner goes there, and the conductor here speaks
to it through the link.

The run lives as long as the link: the device has nothing that could conduct it alone.
"""

from __future__ import annotations

import io
import shlex
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...core.errors import InputError
from ..local.artifact_facts import ArtifactFacts
from ..local.conductor import RunnerProcess, ConductorError, conduct
from ..local.options import CPU, DeviceOptions
from ..local.progress import Progress
from .device_link import DeviceLink, LinkLost, quote
from .device_snapshot import device_environment
from .native_build import LIBRARY, PROGRAM, native_runner
from .python_run import Probe, models, remove, require_space


class There:
    """The place of a conductor's runners: a folder on a device, with the runner and the runtime in
    it.
    """

    def __init__(self, link: DeviceLink, folder: str) -> None:
        self.link, self.folder = link, folder

    def start_runner(self, name: str, job: dict[str, Any], reply_limit_s: float) -> RunnerProcess:
        """A runner there that has loaded its model, spoken to through the link."""
        return RunnerProcess(
            name,
            job,
            reply_limit_s,
            self.link.talk(f"cd {quote(self.folder)} && exec ./{PROGRAM} ./{LIBRARY} -"),
        )

    def environment(self) -> dict[str, Any]:
        """The device's, not this machine's."""
        return device_environment(self.link)

    def energy_j(self) -> float | None:
        """Not asked: a question over the link would take longer than a turn."""
        return None


def require_native(name: str, subject: ArtifactFacts, providers: tuple[str, ...]) -> None:
    """Errors: InputError for what the native runner does not measure."""
    if subject.runtime != "onnxruntime":
        raise InputError(
            f"{name}: the native runner measures onnxruntime artifacts, not {subject.runtime}; put Python and that runtime on the device"
        )
    if set(providers) != {CPU}:
        raise InputError(
            f"{name}: the native runner measures {CPU} only, not {providers[0]}; put Python and onnxruntime on the device"
        )


def run_native(
    link: DeviceLink,
    parent: str,
    found: Probe,
    plan: dict[str, Any],
    subjects: Mapping[str, ArtifactFacts],
    options: DeviceOptions,
    tell: Progress,
) -> dict[str, Any]:
    """The conductor's raw result, with the runners behind the link. Errors: InputError, one line;
    LinkLost ends the run.
    """
    made = native_runner(
        found.machine,
        program=options.runner_file,
        library=options.runtime_library,
        android=found.android,
    )
    place = f"{parent}/native-{uuid.uuid4().hex[:12]}"
    files: dict[str, Path | bytes] = {
        PROGRAM: made.program,
        LIBRARY: made.library,
        **models(plan, subjects),
    }
    if plan["dataset"]:
        files |= arrays(Path(plan["dataset"]), plan["dataset_limit"])
        plan["dataset"] = "dataset"
    require_space(link, found, files)
    tell(0.0, f"sending the runner to {link.shown}")
    try:
        link.copy(files, place)
        # A missing library or an older C library there shows itself before the models are opened.
        link.run(f"cd {quote(place)} && chmod 700 {shlex.quote(PROGRAM)}")
        try:
            return conduct(plan, tell, There(link, place))
        except ConductorError as error:
            # Was it the runner, or the link below it?
            link.run("true")
            raise InputError(f"{link.shown}: {error}") from None
    except LinkLost as error:
        raise LinkLost(
            f"{error}; without Python there the run ended with the link: measure again"
        ) from None
    finally:
        _clean(link, place)


def arrays(dataset: Path, limit: int | None) -> dict[str, Path | bytes]:
    """A data set as the native runner reads it, two plain arrays. Errors: InputError for what is no
    data set.
    """
    try:
        if dataset.is_dir():
            images, labels = (
                np.load(dataset / "images.npy", mmap_mode="r"),
                np.load(dataset / "labels.npy"),
            )
        else:
            with np.load(dataset) as archive:
                images, labels = archive["images"], archive["labels"]
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise InputError(
            f"{dataset}: not a data set ({error}); give an .npz with the arrays `images` and `labels`"
        ) from None
    found: dict[str, Path | bytes] = {}
    for name, array in (("images", images[:limit]), ("labels", labels[:limit])):
        stream = io.BytesIO()
        np.save(stream, np.ascontiguousarray(array), allow_pickle=False)
        found[f"dataset/{name}.npy"] = stream.getvalue()
    return found


def _clean(link: DeviceLink, place: str) -> None:
    try:
        remove(link, place)
    except InputError:
        # The link is gone, and its loss has been told; the folder is small and named by chance.
        return
