"""Every runtime on the same models, in turns, in one table: `python -m benchmarks.speed.runtimes`.

DeiT-Tiny and DeiT-Small, dense and cut to half of their multiply-adds (whole heads, FFN widths in
multiples of the target's round_to), at batch 1. Each row is an artifact in a process of its own;
the rows of a model and of its half take turns in random order, so that a busy machine slows them
all. Artifacts and finished sessions stay under runs/benchmark-runtimes: what was killed goes on
where it was. A runtime that is not installed is a line that says what to install.

    python -m benchmarks.speed.runtimes [--model deit_tiny_patch16_224 ...] [--threads 1 2] [--row WORD
    ...] [--limit-s 60] [--pin 0] [--note TEXT] [--out benchmarks/results/runtimes]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import vitrim
from vitrim.bench.local.environment import read_machine
from vitrim.bench.local.measure import measure_interleaved
from vitrim.bench.results.measurement import Measurement
from vitrim.compress.network.count import count_macs
from vitrim.compress.network.modules.model import CompactModel
from vitrim.core.storage import replace_file
from vitrim.export.artifact import Artifact
from vitrim.export.exporter import export
from vitrim.export.forms import Form
from vitrim.targets.catalog import load_target

from ..result_files import save_result

TARGET = "x86-64"
MODELS = ("deit_tiny_patch16_224", "deit_small_patch16_224")
OURS, INT8, KERNELS = "ours, ONNX Runtime", "ours, ONNX Runtime int8", "TVM, our schedule"
# TVM's ONNX front end does not take Attention with a scale of its own (0.27).
PORTABLE = Form(rows="batch", attention="split", norm="layer", stem="matrix").name
SLOW_LIMIT_S = 15.0
SCHEMA = "vitrim.benchmark-runtimes/1"


@dataclass(frozen=True)
class Way:
    """One row: how the model is written. slow: seconds an inference, so it gets a session of its
    own beside ours.
    """

    name: str
    runtime: str
    precision: str = "fp32"
    form: str | None = None
    options: tuple[tuple[str, str], ...] = ()
    slow: bool = False

    def folder(self, threads: int) -> str:
        """Where its artifact lies. TVM compiles the number of threads into it; for ONNX Runtime the
        best known form depends on it.
        """
        parts = [
            self.runtime,
            self.precision,
            *([self.form.replace("/", "_")] if self.form else []),
            *(value for _, value in self.options),
        ]
        return "-".join(
            [*parts, f"{threads}-threads"] if self.runtime in ("tvm", "onnxruntime") else parts
        )


WAYS = (
    Way(OURS, "onnxruntime"),
    Way("torch, eager", "torch"),
    Way("torch.compile", "torch", options=(("compile", "1"),)),
    Way("torch's own export, ONNX Runtime", "onnxruntime", form="plain"),
    Way(KERNELS, "tvm"),
    Way("TVM, its default", "tvm", form=PORTABLE, options=(("schedule", "default"),), slow=True),
    Way("OpenVINO", "openvino"),
    Way("ncnn", "ncnn"),
    Way("ExecuTorch", "executorch"),
    Way("LiteRT", "litert"),
    Way(INT8, "onnxruntime", "int8"),
    Way(f"{KERNELS} int8", "tvm", "int8"),
    Way("OpenVINO int8", "openvino", "int8"),
    Way("ExecuTorch int8", "executorch", "int8"),
    Way("LiteRT int8", "litert", "int8"),
    Way("ours, ONNX Runtime int8-static", "onnxruntime", "int8-static"),
    Way(f"{KERNELS} int8-static", "tvm", "int8-static"),
    Way("OpenVINO int8-static", "openvino", "int8-static"),
)


def computed_macs(model: CompactModel) -> int:
    """Multiply-adds as the forms compute them: the last block's queries only for the tokens that
    the head reads.
    """
    return count_macs(model.architecture.model_copy(update={"last_queries": True}))


def half_of(dense: CompactModel, round_to: int) -> CompactModel:
    """Half of the heads (rounded up), and as many FFN units, in multiples of round_to, as bring the
    multiply-adds nearest to half.
    """
    heads, hidden = (
        dense.architecture.steps[0][0].core.heads,
        dense.architecture.steps[1][0].core.hidden,
    )  # type: ignore[union-attr]
    kept_heads = (heads + 1) // 2
    wanted = computed_macs(dense) / 2

    def cut(units: int) -> CompactModel:
        keep = {"head": kept_heads / heads, "ffn": units / hidden}
        model: CompactModel = vitrim.compact(
            dense, vitrim.StructuredMask.random(dense, keep_ratio=keep)
        ).eval()
        return model

    few, many = computed_macs(cut(round_to)), computed_macs(cut(hidden))
    # Multiply-adds are linear in the FFN's width.
    units = round_to + (wanted - few) / (many - few) * (hidden - round_to)
    return cut(round_to * round(units / round_to))


def prepare(
    name: str, ways: Sequence[Way], threads: int, work: Path, ready: bool
) -> tuple[dict[str, dict[str, Artifact]], dict[str, str], dict[str, int]]:
    """(artifacts by row for `dense` and `half`, why a row is absent, multiply-adds); what lies in
    the work folder already is taken.
    """
    torch.manual_seed(0)
    dense = vitrim.lift(timm.create_model(name).eval())
    models = {"dense": dense, "half": half_of(dense, load_target(TARGET).round_to)}
    images = torch.randn(
        16, *dense.architecture.image, generator=torch.Generator().manual_seed(1)
    ).numpy()
    found: dict[str, dict[str, Artifact]] = {kind: {} for kind in models}
    absent: dict[str, str] = {}
    for way in ways:
        for kind, model in models.items():
            folder = work / name / kind / way.folder(threads)
            refused = folder.with_suffix(".txt")
            if refused.is_file():
                absent[way.name] = refused.read_text().strip()
                continue
            if ready and not (folder / "manifest.json").is_file():
                absent[f"{way.name}, {name} {kind}, {threads} thread(s)"] = (
                    "was not written for this run"
                )
                continue
            try:
                if not (folder / "manifest.json").is_file():
                    print(f"{name}, {kind}: writing {way.name}", flush=True)
                    export(
                        model, folder, target=TARGET, runtime=way.runtime, precision=way.precision, form=way.form, options=dict(way.options),  # type: ignore[arg-type]
                        threads=threads, name=f"{name}-{kind}", images=images if way.precision == "int8-static" else None, overwrite=True,
                    )  # fmt: skip
                found[kind][way.name] = Artifact.load(folder)
            except vitrim.InputError as error:
                absent[way.name] = str(error)
                if "install" not in str(error):
                    # A conversion that failed would fail again; what is only not installed may be
                    # there the next time.
                    replace_file(refused, f"{error}\n")
                print(f"{name}, {kind}: no {way.name}: {error}", flush=True)
    return found, absent, {kind: computed_macs(model) for kind, model in models.items()}


def measure_group(
    artifacts: dict[str, dict[str, Artifact]],
    ways: Sequence[Way],
    threads: int,
    limit_s: float,
    pins: list[int] | None,
    place: Path,
) -> dict[str, Measurement]:
    """{"kind/row": Measurement} of one model at one number of threads: all quick rows in one
    session, each slow one beside ours.
    """
    quick = [way.name for way in ways if not way.slow]
    slow = [way.name for way in ways if way.slow]
    found: dict[str, Measurement] = {}
    # The pair that tells what of the removed arithmetic became time has a session of its own, with
    # nothing else in the caches.
    sessions = [("pair", [OURS], 20, limit_s), ("quick", quick, 10, limit_s)]
    sessions += [
        (f"slow-{number}", [OURS, name], 5, SLOW_LIMIT_S) for number, name in enumerate(slow)
    ]
    for title, names, rounds, limit in sessions:
        there = {
            f"{kind}/{name}": rows[name]
            for kind, rows in artifacts.items()
            for name in names
            if name in rows
        }
        if title.startswith("slow") and not any(
            key.endswith(slow_name) for key in there for slow_name in slow
        ):
            continue
        folder = place / title
        seals = {name: artifact.sha256 for name, artifact in there.items()}
        if (folder / "seals.json").is_file() and json.loads(
            (folder / "seals.json").read_text()
        ) == seals:
            measured = {
                name: Measurement.load(folder / f"{number}.json")
                for number, name in enumerate(there)
            }
        else:
            measured = measure_interleaved(
                there,
                threads,
                time_limit_s=limit,
                least_rounds=rounds,
                most_rounds=40,
                pinning=pins[:threads] if pins else None,
            )
            for number, measurement in enumerate(measured.values()):
                measurement.save(folder / f"{number}.json")
            replace_file(folder / "seals.json", json.dumps(seals) + "\n")
        if title == "pair":
            found |= {f"pair/{name}": value for name, value in measured.items()}
            continue
        # Ours of the main session is the one in the table.
        found |= {name: value for name, value in measured.items() if name not in found}
    return found


def speed_up(found: dict[str, Measurement]) -> list[float]:
    """[lower quartile, median, upper quartile] over turns of the dense model's quickest call over
    its half's, from the session of the two alone.
    """
    dense, half = (quickest_of_turns(found[f"pair/{kind}/{OURS}"]) for kind in ("dense", "half"))
    return statistics.quantiles([a / b for a, b in zip(dense, half, strict=False)], n=4)


def quickest_of_turns(measured: Measurement) -> list[float]:
    """Each turn's quickest call, in seconds: other work that takes a time slice in the middle of a
    call does not count.
    """
    fastest, first = [], 0
    for count in measured.samples_per_turn:
        fastest.append(min(measured.latency_s[first : first + count]))
        first += count
    return fastest


def row_of(
    name: str, kind: str, way: Way, artifact: Artifact, measured: Measurement
) -> dict[str, Any]:
    """One line of the table, in plain numbers with their units."""
    summary = measured.summary()
    few = len(measured.latency_s) < 2
    low, _, high = (summary.p50_s,) * 3 if few else statistics.quantiles(measured.latency_s, n=4)
    parity = artifact.manifest.parity[-1]
    return {
        "model": name, "kind": kind, "row": way.name, "runtime": measured.runtime, "runtime_version": measured.runtime_version,
        "precision": artifact.manifest.precision,
        "threads": measured.threads, "p50_s": summary.p50_s, "quartiles_s": [low, high],
        "undisturbed_s": statistics.median(quickest_of_turns(measured)),
        "samples": len(measured.latency_s), "session": measured.session,
        "beyond_floor_rss_bytes": measured.beyond_floor_rss_bytes,
        "floor_rss_bytes": measured.floor_rss_bytes, "bytes": artifact.bytes, "parity_stage": parity.stage,
        "max_relative_error": parity.max_relative_error, "form": artifact.manifest.form, "sha256": artifact.sha256,
    }  # fmt: skip


def verdicts(
    rows: list[dict[str, Any]], macs: dict[str, dict[str, int]], pairs: list[dict[str, Any]]
) -> list[str]:
    """Which row is fastest at each precision, and what of the removed arithmetic became time."""
    told = []
    for name in dict.fromkeys(row["model"] for row in rows):
        for threads in sorted({row["threads"] for row in rows}):
            for kind in ("dense", "half"):
                here = [
                    row
                    for row in rows
                    if (row["model"], row["threads"], row["kind"]) == (name, threads, kind)
                ]
                for precision in dict.fromkeys(row["precision"] for row in here):
                    told += _fastest(
                        f"{name} {kind}, {precision}, {threads} thread(s): ",
                        [row for row in here if row["precision"] == precision],
                    )
    for pair in pairs:
        reduction = macs[pair["model"]]["dense"] / macs[pair["model"]]["half"]
        low, middle, high = (value / reduction for value in pair["speed_up"])
        lead = f"{pair['model']}, ONNX Runtime fp32, {pair['threads']} thread(s), the two alone in turns: "
        told.append(
            f"{lead}{pair['speed_up'][1]:.3f}x faster for {reduction:.3f}x fewer MACs = {middle:.3f} (quartiles {low:.3f} - {high:.3f})"
        )
    return told


def _fastest(lead: str, rows: list[dict[str, Any]]) -> list[str]:
    """Our quickest row and the quickest of the others, of one model and precision."""
    quickest = sorted(rows, key=lambda row: float(row["undisturbed_s"]))
    ours = next((row for row in quickest if row["row"].startswith(("ours", KERNELS))), None)
    rival = next((row for row in quickest if not row["row"].startswith(("ours", KERNELS))), None)
    if ours is None:
        return []
    if rival is None:
        return [f"{lead}no other runtime has a row to hold {ours['row']} against"]
    ratio = rival["undisturbed_s"] / ours["undisturbed_s"]
    if ratio >= 1:
        return [
            f"{lead}{ours['row']} is the fastest row; {rival['row']} takes {ratio:.2f} times as long"
        ]
    return [f"{lead}**{rival['row']} beats {ours['row']}** by {1 / ratio:.2f}x; the next work"]


def markdown(result: dict[str, Any]) -> str:
    """The table for people."""
    machine = result["machine"]
    lines = [
        "# Runtimes",
        "",
        f"`python -m benchmarks.speed.runtimes` on {machine['cpu_model']}, {machine['cores']} cores"
        + (
            f" of a virtual machine ({machine['virtual_machine']})"
            if machine.get("virtual_machine")
            else ""
        )
        + f", {machine['os']}; batch 1, rows in turns of random order. p50 with its quartiles; undisturbed: the median over turns of each turn's "
        "quickest call, by which rows are compared."
        + (f" {result['note']}" if result["note"] else ""),
        "",
        "Memory is the peak beyond the process with the runtime imported and no model; parity the largest error against torch, relative to the largest logit.",
    ]
    for name in dict.fromkeys(row["model"] for row in result["rows"]):
        for threads in sorted({row["threads"] for row in result["rows"] if row["model"] == name}):
            title = f"{name}, {threads} thread{'s' if threads > 1 else ''}"
            lines += ["", f"## {title}", ""]
            lines += [
                "| row | precision | model | undisturbed ms | p50 ms | memory MB | file MB | parity |",
                "|---|---|---|--:|--:|--:|--:|--:|",
            ]
            for row in result["rows"]:
                if (row["model"], row["threads"]) == (name, threads):
                    low, high = (1e3 * value for value in row["quartiles_s"])
                    memory = row["beyond_floor_rss_bytes"]
                    lines.append(
                        f"| {row['row']} ({row['runtime_version']}) | {row['precision']} | {row['kind']} | {1e3 * row['undisturbed_s']:.2f} | "
                        f"{1e3 * row['p50_s']:.2f} ({low:.2f} - {high:.2f}) | "
                        f"{'' if memory is None else f'{memory / 1e6:.1f}'} | {row['bytes'] / 1e6:.2f} | {row['max_relative_error']:.1e} |"
                    )
    lines += ["", "## What it says", "", *(f"- {line}" for line in result["verdicts"])]
    if result["absent"]:
        lines += [
            "",
            "## Not there",
            "",
            *(f"- {name}: {why}" for name, why in result["absent"].items()),
        ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", nargs="+", default=list(MODELS), help="timm names")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument(
        "--row",
        nargs="+",
        help="only rows whose name holds one of these words (ours on ONNX Runtime is always there)",
    )
    parser.add_argument("--limit-s", type=float, default=60.0, help="of each session")
    parser.add_argument("--pin", nargs="+", type=int, help="CPUs, the first for one thread")
    parser.add_argument(
        "--prepare", action="store_true", help="write the artifacts and measure nothing"
    )
    parser.add_argument(
        "--ready",
        action="store_true",
        help="measure the artifacts that lie in the work folder and write no others",
    )
    parser.add_argument("--note", default="", help="what else the machine did, for the file")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-runtimes"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "runtimes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ways = [
        way
        for way in WAYS
        if way.name == OURS or not options.row or any(word in way.name for word in options.row)
    ]
    rows: list[dict[str, Any]] = []
    absent: dict[str, str] = {}
    macs: dict[str, dict[str, int]] = {}
    pairs: list[dict[str, Any]] = []
    for name in options.model:
        for threads in options.threads:
            artifacts, missing, macs[name] = prepare(
                name, ways, threads, options.work, options.ready
            )
            absent |= missing
            if options.prepare:
                continue
            print(
                f"{name}, {threads} thread(s): measuring {sum(map(len, artifacts.values()))} rows in turns",
                flush=True,
            )
            found = measure_group(
                artifacts,
                ways,
                threads,
                options.limit_s,
                options.pin,
                options.work / name / f"measured-{threads}",
            )
            pairs.append({"model": name, "threads": threads, "speed_up": speed_up(found)})
            rows += [
                row_of(name, kind, way, artifacts[kind][way.name], found[f"{kind}/{way.name}"])
                for way in ways
                for kind in ("dense", "half")
                if f"{kind}/{way.name}" in found
            ]
            # After each session, so that a killed run leaves what it has.
            result = {
                "schema": SCHEMA, "machine": {**read_machine(), "cores": os.cpu_count()},
                "note": options.note, "target": TARGET, "macs": macs, "rows": rows, "pairs": pairs, "absent": absent,
                "verdicts": verdicts(rows, macs, pairs),
            }  # fmt: skip
            save_result(options.out, result, markdown(result))
    if not options.prepare:
        print(markdown(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
