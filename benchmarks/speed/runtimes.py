"""Every runtime on the same models, in turns, in one table: `python -m benchmarks.speed.runtimes`.

DeiT-Tiny and DeiT-Small, dense and cut to half of their multiply-adds (whole heads, FFN widths in
multiples of the target's round_to), at batch 1. Each row is an artifact in a process of its own;
the rows of a model and of its half take turns in random order, so that other work on the machine
slows all of them. Artifacts and finished sessions stay under runs/benchmark-runtimes: an
interrupted run continues. A runtime that is not installed gets a line with what to install.

    python -m benchmarks.speed.runtimes [--model deit_tiny_patch16_224 ...] [--threads 1 2]
        [--row WORD ...] [--limit-s 60] [--pin 0] [--note TEXT]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import vitrim
from vitrim.bench.local.environment import read_machine
from vitrim.bench.local.measure import measure_interleaved
from vitrim.bench.results.measurement import Measurement
from vitrim.compress.network.modules.model import CompactModel
from vitrim.core.storage import replace_file
from vitrim.export.artifact import Artifact
from vitrim.export.exporter import export
from vitrim.export.forms import Form
from vitrim.targets.catalog import load_target

from ..models import calibration_noise, computed_macs, lifted, randomly_cut
from ..results_file import RESULTS, markdown_head, markdown_row, save_result

TARGET = "host"
MODELS = ("deit_tiny_patch16_224", "deit_small_patch16_224")
KINDS = ("dense", "half")
OURS, INT8, KERNELS = "ours, ONNX Runtime", "ours, ONNX Runtime int8", "TVM, our schedule"
# TVM's ONNX front end does not take Attention with a scale of its own (0.27).
PORTABLE = Form(rows="batch", attention="split", norm="layer", stem="matrix").name
SLOW_LIMIT_S = 15.0
SCHEMA = "vitrim.benchmark-runtimes/1"


@dataclass(frozen=True)
class Variant:
    """One row: how the model is written.

    Attributes:
        slow: Seconds an inference, so that it gets a session of its own with ours.
    """

    name: str
    runtime: str
    precision: str = "fp32"
    form: str | None = None
    options: tuple[tuple[str, str], ...] = ()
    slow: bool = False

    def folder(self, threads: int) -> str:
        """Name of the artifact's folder.

        TVM compiles the number of threads into an artifact; for ONNX Runtime the best known form
        depends on it.
        """
        form = [self.form.replace("/", "_")] if self.form else []
        parts = [self.runtime, self.precision, *form, *(value for _, value in self.options)]
        if self.runtime in ("tvm", "onnxruntime"):
            parts.append(f"{threads}-threads")
        return "-".join(parts)


VARIANTS = (
    Variant(OURS, "onnxruntime"),
    Variant("torch, eager", "torch"),
    Variant("torch.compile", "torch", options=(("compile", "1"),)),
    Variant("torch's own export, ONNX Runtime", "onnxruntime", form="plain"),
    Variant(KERNELS, "tvm"),
    Variant(
        "TVM, its default", "tvm", form=PORTABLE, options=(("schedule", "default"),), slow=True
    ),
    Variant("OpenVINO", "openvino"),
    Variant("ncnn", "ncnn"),
    Variant("ExecuTorch", "executorch"),
    Variant("LiteRT", "litert"),
    Variant(INT8, "onnxruntime", "int8"),
    Variant(f"{KERNELS} int8", "tvm", "int8"),
    Variant("OpenVINO int8", "openvino", "int8"),
    Variant("ExecuTorch int8", "executorch", "int8"),
    Variant("LiteRT int8", "litert", "int8"),
    Variant("ours, ONNX Runtime int8-static", "onnxruntime", "int8-static"),
    Variant(f"{KERNELS} int8-static", "tvm", "int8-static"),
    Variant("OpenVINO int8-static", "openvino", "int8-static"),
)


def half_of(dense: CompactModel, round_to: int) -> CompactModel:
    """A cut to about half of the multiply-adds.

    Half of the heads stay (rounded up), and as many FFN units, in multiples of `round_to`, as bring
    the multiply-adds nearest to half.
    """
    attention, ffn = dense.architecture.steps[0][0].core, dense.architecture.steps[1][0].core
    heads, hidden = attention.heads, ffn.hidden  # type: ignore[union-attr]
    kept_heads = (heads + 1) // 2
    wanted = computed_macs(dense) / 2

    def cut(units: int) -> CompactModel:
        return randomly_cut(dense, {"head": kept_heads / heads, "ffn": units / hidden})

    few, many = computed_macs(cut(round_to)), computed_macs(cut(hidden))
    # Multiply-adds are linear in the FFN's width.
    units = round_to + (wanted - few) / (many - few) * (hidden - round_to)
    return cut(round_to * round(units / round_to))


class Artifacts:
    """The artifacts of one model and of its half, written unless the work folder has them.

    Attributes:
        found: {kind: {row: artifact}}.
        absent: {row: why there is none}.
        macs: {kind: multiply-adds}.
    """

    def __init__(self, name: str, threads: int, options: argparse.Namespace) -> None:
        self.name, self.threads, self.options = name, threads, options
        dense = lifted(name)
        self.models = {"dense": dense, "half": half_of(dense, load_target(TARGET).round_to)}
        self.images = calibration_noise(dense, 16)
        self.found: dict[str, dict[str, Artifact]] = {kind: {} for kind in KINDS}
        self.absent: dict[str, str] = {}
        self.macs = {kind: computed_macs(model) for kind, model in self.models.items()}

    def add(self, variant: Variant) -> None:
        """Find or write the artifacts of a row."""
        for kind in KINDS:
            folder = self.options.work / self.name / kind / variant.folder(self.threads)
            refused, written = folder.with_suffix(".txt"), (folder / "manifest.json").is_file()
            if refused.is_file():
                self.absent[variant.name] = refused.read_text().strip()
                continue
            if self.options.ready and not written:
                row = f"{variant.name}, {self.name} {kind}, {self.threads} thread(s)"
                self.absent[row] = "was not written for this run"
                continue
            try:
                if not written:
                    self._write(variant, kind, folder)
                self.found[kind][variant.name] = Artifact.load(folder)
            except vitrim.InputError as error:
                self.absent[variant.name] = str(error)
                if "install" not in str(error):
                    # A conversion that failed fails again; a missing package may be installed.
                    replace_file(refused, f"{error}\n")
                print(f"{self.name}, {kind}: no {variant.name}: {error}", flush=True)

    def _write(self, variant: Variant, kind: str, folder: Path) -> None:
        print(f"{self.name}, {kind}: writing {variant.name}", flush=True)
        export(
            self.models[kind],
            folder,
            target=TARGET,
            runtime=variant.runtime,
            precision=variant.precision,  # type: ignore[arg-type]
            form=variant.form,
            options=dict(variant.options),
            threads=self.threads,
            name=f"{self.name}-{kind}",
            images=self.images if variant.precision == "int8-static" else None,
            overwrite=True,
        )


def measure_all(
    artifacts: Artifacts, variants: Sequence[Variant], options: argparse.Namespace
) -> dict[str, Measurement]:
    """Measure one model at one number of threads: {"kind/row": Measurement}.

    All fast rows share a session; each slow one has a session with ours.
    """
    slow = [variant.name for variant in variants if variant.slow]
    fast = [variant.name for variant in variants if not variant.slow]
    place = options.work / artifacts.name / f"measured-{artifacts.threads}"
    # The pair that shows how much of the removed arithmetic became time has a session of its own,
    # with nothing else in the caches.
    sessions = [("pair", [OURS], 20, options.limit_s), ("quick", fast, 10, options.limit_s)]
    sessions += [(f"slow-{n}", [OURS, name], 5, SLOW_LIMIT_S) for n, name in enumerate(slow)]
    found: dict[str, Measurement] = {}
    for title, names, rounds, limit_s in sessions:
        present = {
            f"{kind}/{name}": rows[name]
            for kind, rows in artifacts.found.items()
            for name in names
            if name in rows
        }
        if title.startswith("slow") and not any(key.endswith(names[-1]) for key in present):
            continue
        pins = tuple(options.pin[: artifacts.threads]) if options.pin else None
        measured = _measured_once(
            place / title,
            present,
            threads=artifacts.threads,
            time_limit_s=limit_s,
            least_rounds=rounds,
            most_rounds=40,
            pinning=pins,
        )
        if title == "pair":
            found |= {f"pair/{name}": value for name, value in measured.items()}
            continue
        # In the table, ours is the row of the main session.
        found |= {name: value for name, value in measured.items() if name not in found}
    return found


def _measured_once(
    folder: Path, artifacts: Mapping[str, Artifact], **options: Any
) -> dict[str, Measurement]:
    """Measure a session, or load it where the folder has it of the same artifacts."""
    digests, seal = {name: one.sha256 for name, one in artifacts.items()}, folder / "seals.json"
    if seal.is_file() and json.loads(seal.read_text()) == digests:
        return {
            name: Measurement.load(folder / f"{number}.json")
            for number, name in enumerate(artifacts)
        }
    measured = measure_interleaved(artifacts, **options)
    for number, measurement in enumerate(measured.values()):
        measurement.save(folder / f"{number}.json")
    replace_file(seal, json.dumps(digests) + "\n")
    return measured


def speed_up(found: dict[str, Measurement]) -> list[float]:
    """Quartiles over turns of the dense model's fastest call over its half's, the pair alone."""
    dense, half = (fastest_of_turns(found[f"pair/{kind}/{OURS}"]) for kind in KINDS)
    return statistics.quantiles([a / b for a, b in zip(dense, half, strict=False)], n=4)


def fastest_of_turns(measured: Measurement) -> list[float]:
    """The fastest call of each turn, in seconds: calls that another program interrupts drop out."""
    fastest, first = [], 0
    for count in measured.samples_per_turn:
        fastest.append(min(measured.latency_s[first : first + count]))
        first += count
    return fastest


def row_of(artifact: Artifact, measured: Measurement, **where: str) -> dict[str, Any]:
    """One line of the table, in plain numbers with their units."""
    p50_s = measured.summary().p50_s
    few = len(measured.latency_s) < 2
    low, _, high = (p50_s,) * 3 if few else statistics.quantiles(measured.latency_s, n=4)
    parity = artifact.manifest.parity[-1]
    return {
        **where,
        "runtime": measured.runtime,
        "runtime_version": measured.runtime_version,
        "precision": artifact.manifest.precision,
        "threads": measured.threads,
        "p50_s": p50_s,
        "quartiles_s": [low, high],
        "undisturbed_s": statistics.median(fastest_of_turns(measured)),
        "samples": len(measured.latency_s),
        "session": measured.session,
        "beyond_floor_rss_bytes": measured.beyond_floor_rss_bytes,
        "floor_rss_bytes": measured.floor_rss_bytes,
        "bytes": artifact.bytes,
        "parity_stage": parity.stage,
        "max_relative_error": parity.max_relative_error,
        "form": artifact.manifest.form,
        "sha256": artifact.sha256,
    }


def verdicts(
    rows: list[dict[str, Any]], macs: dict[str, dict[str, int]], pairs: list[dict[str, Any]]
) -> list[str]:
    """The fastest row of each precision, and how much of the removed arithmetic became time."""
    groups: dict[tuple[str, int, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        key = (row["model"], row["threads"], row["kind"], row["precision"])
        groups.setdefault(key, []).append(row)
    names = list(dict.fromkeys(row["model"] for row in rows))
    order = sorted(groups, key=lambda key: (names.index(key[0]), key[1], KINDS.index(key[2])))
    lines = []
    for name, threads, kind, precision in order:
        lead = f"{name} {kind}, {precision}, {threads} thread(s): "
        lines += _fastest(lead, groups[name, threads, kind, precision])
    for pair in pairs:
        reduction = macs[pair["model"]]["dense"] / macs[pair["model"]]["half"]
        low, middle, high = (value / reduction for value in pair["speed_up"])
        lines.append(
            f"{pair['model']}, ONNX Runtime fp32, {pair['threads']} thread(s), the two alone in "
            f"turns: {pair['speed_up'][1]:.3f}x faster for {reduction:.3f}x fewer MACs = "
            f"{middle:.3f} (quartiles {low:.3f} - {high:.3f})"
        )
    return lines


def _fastest(lead: str, rows: list[dict[str, Any]]) -> list[str]:
    """Our fastest row and the fastest of the others, of one model and precision."""
    ranked = sorted(rows, key=lambda row: float(row["undisturbed_s"]))
    ours = [row for row in ranked if row["row"].startswith(("ours", KERNELS))]
    others = [row for row in ranked if row not in ours]
    if not ours:
        return []
    best = ours[0]["row"]
    if not others:
        return [f"{lead}no other runtime has a row to compare {best} with"]
    other, ratio = others[0]["row"], others[0]["undisturbed_s"] / ours[0]["undisturbed_s"]
    if ratio >= 1:
        return [f"{lead}{best} is the fastest row; {other} takes {ratio:.2f} times as long"]
    return [f"{lead}**{other} beats {best}** by {1 / ratio:.2f}x; the next work"]


def markdown(result: dict[str, Any]) -> str:
    """The tables."""
    machine = result["machine"]
    virtual = machine.get("virtual_machine")
    lines = [
        "# Runtimes",
        "",
        f"`python -m benchmarks.speed.runtimes` on {machine['cpu_model']}, "
        f"{machine['cores']} cores{f' of a virtual machine ({virtual})' if virtual else ''}, "
        f"{machine['os']}; batch 1, rows in turns of random order. p50 with its quartiles; "
        "undisturbed: the median over turns of each turn's quickest call, by which rows are "
        f"compared.{' ' + result['note'] if result['note'] else ''}",
        "",
        "Memory is the peak beyond the process with the runtime imported and no model; parity the "
        "largest error against torch, relative to the largest logit.",
    ]
    for name in dict.fromkeys(row["model"] for row in result["rows"]):
        for threads in sorted({row["threads"] for row in result["rows"] if row["model"] == name}):
            lines += ["", f"## {name}, {threads} thread{'s' if threads > 1 else ''}", ""]
            titles = ("row", "precision", "model", "undisturbed ms", "p50 ms", "memory MB")
            lines += markdown_head(*titles, "file MB", "parity", numbers=5)
            lines += [
                _line(row)
                for row in result["rows"]
                if (row["model"], row["threads"]) == (name, threads)
            ]
    lines += ["", "## Findings", "", *(f"- {line}" for line in result["verdicts"])]
    if result["absent"]:
        lines += ["", "## Absent", ""]
        lines += [f"- {name}: {reason}" for name, reason in result["absent"].items()]
    return "\n".join(lines) + "\n"


def _line(row: dict[str, Any]) -> str:
    low, high = (1e3 * value for value in row["quartiles_s"])
    memory = row["beyond_floor_rss_bytes"]
    return markdown_row(
        f"{row['row']} ({row['runtime_version']})",
        row["precision"],
        row["kind"],
        f"{1e3 * row['undisturbed_s']:.2f}",
        f"{1e3 * row['p50_s']:.2f} ({low:.2f} - {high:.2f})",
        "" if memory is None else f"{memory / 1e6:.1f}",
        f"{row['bytes'] / 1e6:.2f}",
        f"{row['max_relative_error']:.1e}",
    )


def arguments() -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", nargs="+", default=list(MODELS), help="timm names")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument(
        "--row",
        nargs="+",
        help="only rows whose name contains one of these words (ours on ONNX Runtime always)",
    )
    parser.add_argument("--limit-s", type=float, default=60.0, help="of each session")
    parser.add_argument("--pin", nargs="+", type=int, help="CPUs, the first for one thread")
    parser.add_argument("--prepare", action="store_true", help="only write the artifacts")
    parser.add_argument(
        "--ready", action="store_true", help="only measure the artifacts in the work folder"
    )
    parser.add_argument("--note", default="", help="what else the machine did, for the file")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-runtimes"))
    parser.add_argument("--out", type=Path, default=RESULTS / "runtimes")
    return parser.parse_args()


def main() -> int:
    """Write what is missing, measure, and write both files."""
    options = arguments()
    torch.set_num_threads(1)
    variants = [
        variant
        for variant in VARIANTS
        if variant.name == OURS
        or not options.row
        or any(word in variant.name for word in options.row)
    ]
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "machine": {**read_machine(), "cores": os.cpu_count()},
        "note": options.note,
        "target": TARGET,
        "macs": {},
        "rows": [],
        "pairs": [],
        "absent": {},
        "verdicts": [],
    }
    rows, macs, pairs = result["rows"], result["macs"], result["pairs"]
    for name, threads in ((name, count) for name in options.model for count in options.threads):
        artifacts = Artifacts(name, threads, options)
        for variant in variants:
            artifacts.add(variant)
        macs[name] = artifacts.macs
        result["absent"] |= artifacts.absent
        if options.prepare:
            continue
        count = sum(map(len, artifacts.found.values()))
        print(f"{name}, {threads} thread(s): measuring {count} rows in turns", flush=True)
        found = measure_all(artifacts, variants, options)
        pairs.append({"model": name, "threads": threads, "speed_up": speed_up(found)})
        rows += [
            row_of(
                artifacts.found[kind][variant.name],
                found[f"{kind}/{variant.name}"],
                model=name,
                kind=kind,
                row=variant.name,
            )
            for variant in variants
            for kind in KINDS
            if f"{kind}/{variant.name}" in found
        ]
        # After each session, so that an interrupted run leaves what it has.
        result["verdicts"] = verdicts(rows, macs, pairs)
        save_result(options.out, result, markdown(result))
    if not options.prepare:
        print(markdown(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
