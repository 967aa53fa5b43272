"""Time and memory for data sets of ImageNet's size: `python -m benchmarks.data.size`.

    python -m benchmarks.data.size --parquet FOLDER [--names 1281167] [--images 20000]

1. A folder of 1,000 classes with `--names` hard links to a few small JPEGs is listed twice, the
   second time from its index, and one epoch of it is read by two workers: seconds, and the peak
   memory of all processes together (proportional set size, sampled twice a second).
2. A folder of `--images` JPEGs of CIFAR-10 (JPEG), which `--parquet` holds, is read at 224 x 224
   with 0, 1 and 2 workers: images/s, resized only and with the augmentation `imagenet`.

Both folders are temporary. Writes `results/data_size.json` and `.md`. Needs psutil.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image
from vitrim.bench.local.environment import read_machine, read_state

from ..results_file import RESULTS, markdown_head, markdown_row, save_result

CLASSES = 1000
# ext4 allows 65,000 links to a file.
LINKS_EACH = 50_000
SIZE = 224
LIMIT_BYTES = 2 * 10**9


class PeakMemory:
    """The largest memory of this process and its children, in bytes, while it is entered."""

    def __enter__(self) -> PeakMemory:
        self.bytes, self._ended = self._now(), threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self.bytes = max(self.bytes, self._now())

    def _sample(self) -> None:
        while not self._ended.wait(0.5):
            self.bytes = max(self.bytes, self._now())

    @staticmethod
    def _now() -> int:
        total = 0
        own = psutil.Process()
        for process in (own, *own.children(recursive=True)):
            try:
                # Pages that several processes share are divided among them.
                total += process.memory_full_info().pss
            except psutil.Error:
                continue
        return total


def write_names(root: Path, count: int) -> None:
    """A folder of hard links to small JPEGs, in 1,000 classes, as ImageNet's names are."""
    noise = np.random.default_rng(0)
    sources = []
    for number in range(-(-count // LINKS_EACH)):
        buffer = io.BytesIO()
        pixels = noise.integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, "JPEG")
        sources.append(root / f"source{number}.jpg")
        sources[-1].write_bytes(buffer.getvalue())
    for label in range(CLASSES):
        folder = root / "train" / f"n{label:08}"
        folder.mkdir(parents=True)
        for number in range(label, count, CLASSES):
            os.link(sources[number // LINKS_EACH], folder / f"n{label:08}_{number}.JPEG")


def write_images(root: Path, parquet: Path, count: int) -> None:
    """A folder of JPEG files from the rows of a parquet file."""
    from datasets import Image as ImageColumn
    from datasets import load_dataset

    (file,) = sorted(parquet.glob("train*.parquet"))
    rows = load_dataset("parquet", data_files=str(file), streaming=True)["train"]
    for number, row in enumerate(rows.cast_column("image", ImageColumn(decode=False)).take(count)):
        folder = root / "train" / str(row["label"])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jpg").write_bytes(row["image"]["bytes"])


def listing(root: Path) -> dict[str, Any]:
    """Seconds and memory of opening the folder."""
    from vitrim.compress.data.loading import open_dataset

    with PeakMemory() as memory:
        before, started = memory.bytes, time.perf_counter()
        data = open_dataset(f"imagefolder:{root}", image=(3, SIZE, SIZE), cache_gb=0)
        seconds = time.perf_counter() - started
    counts = {part: len(getattr(data, part)) for part in ("train", "val", "test")}
    return {"seconds": seconds, "before_bytes": before, "peak_bytes": memory.bytes, **counts}


def epoch(root: Path, workers: int, augmentation: str, size: int, batch: int) -> dict[str, Any]:
    """Images/s and memory of one epoch."""
    from vitrim.compress.data.batch_loader import BatchLoader
    from vitrim.compress.data.loading import open_dataset
    from vitrim.compress.train.augment import Augmentation

    data = open_dataset(f"imagefolder:{root}", image=(3, size, size), cache_gb=0)
    augment = Augmentation(augmentation, data.preprocessing, data.classes)  # type: ignore[arg-type]
    loader = BatchLoader(
        data.train, batch, workers=workers, transform=augment.image_transform, seed=1
    )
    count = 0
    with PeakMemory() as memory:
        started = time.perf_counter()
        for images, _ in loader.epoch(1):
            count += len(images)
        seconds = time.perf_counter() - started
    loader.close()
    return {
        "workers": workers,
        "augmentation": augmentation,
        "images": count,
        "seconds": seconds,
        "images_per_s": count / seconds,
        "peak_bytes": memory.bytes,
    }


def measured(what: str, root: Path, **options: Any) -> dict[str, Any]:
    """The result of a measurement in a process of its own, with its cache beside the folder."""
    command = [sys.executable, "-m", "benchmarks.data.size", "--parquet", "."]
    command += ["--measure", what, "--root", str(root)]
    environment = {**os.environ, "XDG_CACHE_HOME": str(root.parent / "cache")}
    done = subprocess.run(
        [*command, "--options", json.dumps(options)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        cwd=Path(__file__).parents[2],
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(what, options, found, flush=True)
    return found


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    first, second, whole = result["first_start"], result["second_start"], result["epoch"]
    lines = [
        "# Data of any size",
        "",
        f"`python -m benchmarks.data.size` on {result['cpu']}, {result['cores']} cores, of which "
        f"other work kept {result['busy_cores']:.1f} busy at the start: a folder "
        f"of {result['names']:,} names in {CLASSES:,} classes (hard links to small JPEGs). Memory "
        "is that of all processes together, torch and its libraries included.",
        "",
        *markdown_head("", "seconds", "peak memory", numbers=2),
        markdown_row("listing, first start", *_figures(first)),
        markdown_row("listing, from the index", *_figures(second)),
        markdown_row(
            f"an epoch of {whole['images']:,} images, {whole['workers']} workers", *_figures(whole)
        ),
        "",
        f"{result['images']:,} JPEG files of CIFAR-10 (JPEG), read at {SIZE} x {SIZE}:",
        "",
        *markdown_head("workers", "resized: images/s", "`imagenet`: images/s", numbers=2),
    ]
    for plain, augmented in zip(result["none"], result["imagenet"], strict=True):
        speeds = (f"{row['images_per_s']:.0f}" for row in (plain, augmented))
        lines.append(markdown_row(plain["workers"], *speeds))
    if result["busy_cores"] > result["cores"] / 2:
        lines += ["", "Workers add no speed where other work keeps the cores busy."]
    return "\n".join(lines) + "\n"


def _figures(row: dict[str, Any]) -> tuple[str, str]:
    return f"{row['seconds']:.1f}", f"{row['peak_bytes'] / 1e6:.0f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--names", type=int, default=1_281_167)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--parquet", type=Path, required=True, help="folder with train*.parquet")
    parser.add_argument("--out", type=Path, default=RESULTS / "data_size.json")
    parser.add_argument("--measure", choices=("listing", "epoch"), help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--options", type=json.loads, default={}, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        calls: dict[str, Callable[..., dict[str, Any]]] = {"listing": listing, "epoch": epoch}
        print(json.dumps(calls[options.measure](options.root, **options.options)))
        return
    result: dict[str, Any] = {"cpu": read_machine()["cpu_model"], "cores": os.cpu_count()}
    result["busy_cores"] = read_state(1.0).get("busy_cores")
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) / "names"
        root.mkdir()
        write_names(root, options.names)
        # An index is kept only of folders that no longer change.
        time.sleep(3)
        small = {"workers": 2, "augmentation": "none", "size": 32, "batch": 256}
        result |= {
            "names": options.names,
            "first_start": measured("listing", root),
            "second_start": measured("listing", root),
            "epoch": measured("epoch", root, **small),
        }
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) / "images"
        write_images(root, options.parquet, options.images)
        result["images"] = options.images
        for augmentation in ("none", "imagenet"):
            result[augmentation] = [
                measured(
                    "epoch", root, workers=workers, augmentation=augmentation, size=SIZE, batch=128
                )
                for workers in (0, 1, 2)
            ]
    peaks = [result[key]["peak_bytes"] for key in ("first_start", "second_start", "epoch")]
    result["under_2_gb"] = max(peaks) < LIMIT_BYTES
    save_result(options.out, result, table(result))
    print(table(result))


if __name__ == "__main__":
    main()
