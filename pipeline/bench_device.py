"""The device of `[bench] on`: how it is reached, whether it responds, what is measured there."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path

from ..bench.local.measure import Measurable
from ..bench.local.options import DeviceOptions, MeasureOptions
from ..bench.remote.measure import measure_at
from ..bench.remote.reach import HERE, require_reachable
from ..bench.results.measurement import Measurement
from ..core.console import status
from ..core.progress import Progress
from .recipe import Recipe
from .recipe_sections import BenchSection
from .run_folder import RunFolder

MeasureFiles = Callable[[dict[str, Path], MeasureOptions, Progress], dict[str, Measurement]]


def device_options(bench: BenchSection) -> DeviceOptions:
    """How the device of `[bench]` is reached, and what runs there."""
    library, options = bench.runtime_library, bench.ssh_options or ()
    return DeviceOptions(
        python=bench.python or DeviceOptions.python,
        runtime_library=None if library is None else Path(library),
        ssh_options=tuple(word for text in options for word in shlex.split(text)),
    )


def measured_artifacts(
    artifacts: Mapping[str, Measurable],
    bench: BenchSection,
    dataset: Path | None = None,
    *,
    target: str = HERE,
    quiet: bool = False,
) -> dict[str, Measurement]:
    """Measure artifacts interleaved, on this machine or on the device of `[bench] on`.

    Args:
        artifacts: {name: an `Artifact`, its folder, or an .onnx file}.
        bench: Threads, the time limit of all together, and the device.
        dataset: Test images for top-1.
        target: The target of the artifacts, which names the device.
        quiet: Show no progress bar.

    Returns:
        {name: measurement}.

    Raises:
        InputError: An artifact cannot be measured there.
        LinkLost: The device does not respond.
    """
    options = MeasureOptions(
        threads=bench.threads, dataset=dataset, time_limit_s=bench.time_limit_s
    )
    return measure_at(
        bench.on or HERE,
        artifacts,
        options,
        device_options(bench),
        target=HERE if bench.on is None else target,
        quiet=quiet,
    )


def measure_at_device(bench: BenchSection, target: str) -> MeasureFiles | None:
    """What measures single files on the device of `[bench] on`; None: this machine does.

    Args:
        bench: The device.
        target: The target of the files.
    """
    address = bench.on
    if address is None:
        return None

    def measure(
        files: dict[str, Path], options: MeasureOptions, progress: Progress
    ) -> dict[str, Measurement]:
        device = device_options(bench)
        return measure_at(address, files, options, device, target=target, progress=progress)

    return measure


def measured_steps(recipe: Recipe, until: str) -> set[str]:
    """The steps of a run that measure something: the files of the masks, the artifacts."""
    found = {"bench"} if until in ("bench", "report") else set()
    masks = recipe.masks.has_latency and recipe.masks.latency_rounds > 0
    return found | ({"masks"} if masks and until != "baseline" else set())


def require_device(
    recipe: Recipe,
    until: str,
    resumed: Path | None = None,
    marks: Mapping[str, str] | None = None,
    *,
    quiet: bool = False,
) -> None:
    """Check, before any training, that the device of `[bench] on` responds, where it is needed.

    Args:
        recipe: The recipe.
        until: The last step of the run.
        resumed: The run folder that continues; what it has measured is not measured again.
        marks: The fingerprints of its steps.
        quiet: Print nothing.

    Raises:
        InputError: The device refuses the login, or lacks what the artifacts need.
        LinkLost: It does not respond.
    """
    bench = recipe.bench
    if bench.on is None:
        return
    steps = measured_steps(recipe, until)
    if resumed is not None and marks is not None:
        folder = RunFolder(resumed)
        steps = {step for step in steps if not folder.is_done(step, marks[step])}
    if steps:
        status("looking for the device of bench.on", quiet=quiet)
        require_reachable(bench.on, recipe.export.runtimes, device_options(bench))
