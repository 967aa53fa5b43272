"""Measure on a device without Python: the C++ runner is sent, and the conductor here controls it.

The run ends with the link, since nothing on the device could conduct it alone.
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
from ...core.progress import Progress
from ..local.artifact_facts import ArtifactFacts
from ..local.conductor import ConductorError, RunnerProcess, conduct
from ..local.options import CPU, DeviceOptions, MeasureOptions
from .device_link import DeviceLink, LinkLost, quote
from .device_snapshot import device_environment
from .native_build import LIBRARY, PROGRAM, native_runner
from .python_run import Probe, model_files, remove_run, require_space


class LinkExecutor:
    """Starts native runners in a folder on a device, for `conduct`."""

    def __init__(self, link: DeviceLink, folder: str) -> None:
        self.link, self.folder = link, folder

    def start_runner(self, name: str, job: dict[str, Any], reply_limit_s: float) -> RunnerProcess:
        """Start a runner on the device and wait until its model is loaded."""
        script = f"cd {quote(self.folder)} && exec ./{PROGRAM} ./{LIBRARY} -"
        return RunnerProcess(name, job, reply_limit_s, self.link.interactive(script))

    def environment(self) -> dict[str, Any]:
        """Return the device and its present state."""
        return device_environment(self.link)

    def energy_j(self) -> float | None:
        """Return None: a reading over the link would take longer than a turn."""
        return None


def require_native(name: str, facts: ArtifactFacts, options: MeasureOptions) -> None:
    """Raise InputError for an artifact or options that the native runner does not support."""
    if facts.runtime != "onnxruntime":
        raise InputError(
            f"{name}: the native runner measures onnxruntime artifacts, not {facts.runtime}; "
            "put Python and that runtime on the device"
        )
    if set(options.providers) != {CPU}:
        raise InputError(
            f"{name}: the native runner measures {CPU} only, not {options.providers[0]}; "
            "put Python and onnxruntime on the device"
        )


def run_native(
    link: DeviceLink,
    parent: str,
    found: Probe,
    plan: dict[str, Any],
    facts: Mapping[str, ArtifactFacts],
    options: DeviceOptions,
    progress: Progress,
) -> dict[str, Any]:
    """Run a plan with native runners on the device.

    Args:
        link: The link to the device.
        parent: The folder for runs on the device.
        found: The state of the device.
        plan: The plan; its paths become those on the device.
        facts: The facts of the plan's artifacts, by name.
        options: A runner or a library to send in place of those built here.
        progress: Called with the share done (0 to 1) and a text.

    Returns:
        The conductor's raw result.

    Raises:
        InputError: The runner cannot be built, or it failed.
        LinkLost: The link was lost, which ends the run.
    """
    built = native_runner(
        found.machine,
        program=options.runner_file,
        library=options.runtime_library,
        android=found.android,
    )
    folder = f"{parent}/native-{uuid.uuid4().hex[:12]}"
    files: dict[str, Path | bytes] = {PROGRAM: built.program, LIBRARY: built.library}
    files |= model_files(plan, facts)
    if plan["dataset"]:
        files |= dataset_files(Path(plan["dataset"]), plan["dataset_limit"])
        plan["dataset"] = "dataset"
    require_space(link, found, files)
    progress(0.0, f"sending the runner to {link.label}")
    try:
        link.copy(files, folder)
        link.run(f"cd {quote(folder)} && chmod 700 {shlex.quote(PROGRAM)}")
        try:
            return conduct(plan, progress, LinkExecutor(link, folder))
        except ConductorError as error:
            # Raises LinkLost where the link failed and not the runner.
            link.run("true")
            raise InputError(f"{link.label}: {error}") from None
    except LinkLost as error:
        raise LinkLost(
            f"{error}; without Python there the run ended with the link: measure again"
        ) from None
    finally:
        _clean(link, folder)


def dataset_files(dataset: Path, limit: int | None) -> dict[str, Path | bytes]:
    """Return a data set as two plain arrays, which the native runner reads.

    Raises InputError for a file that is no data set.
    """
    try:
        if dataset.is_dir():
            images = np.load(dataset / "images.npy", mmap_mode="r")
            labels = np.load(dataset / "labels.npy")
        else:
            with np.load(dataset) as archive:
                images, labels = archive["images"], archive["labels"]
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise InputError(
            f"{dataset}: not a data set ({error}); "
            "give an .npz with the arrays `images` and `labels`"
        ) from None
    found: dict[str, Path | bytes] = {}
    for name, array in (("images", images[:limit]), ("labels", labels[:limit])):
        stream = io.BytesIO()
        np.save(stream, np.ascontiguousarray(array), allow_pickle=False)
        found[f"dataset/{name}.npy"] = stream.getvalue()
    return found


def _clean(link: DeviceLink, folder: str) -> None:
    try:
        remove_run(link, folder)
    except InputError:
        # The lost link was reported already; the folder is small and has a random name.
        return
