"""The line that shows the stage of an export and its time, on a terminal only."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import vitrim
from tiny_models import tiny_vit
from vitrim.export import export, stage_line
from vitrim.export.forms import Form, write_network
from vitrim.export.graphs.imported_graph import export_graph

pty = pytest.importorskip("pty", reason="needs a terminal of its own (a Unix)")

SCRIPT = """
import sys, time
from vitrim.export.stage_line import stage, stages_hidden, stages_shown
with stages_shown(delay_s={delay_s}):
    stage("tracing")
    time.sleep(0.5)
    with stages_shown(delay_s=0):
        stage("compiling the network")
        time.sleep(0.5)
    print("the result")
    with stages_hidden():
        print("another bar", file=sys.stderr)
        time.sleep(0.3)
    stage("parity")
    time.sleep(0.5)
print("saved", file=sys.stderr)
"""


def outputs(delay_s: float, code: str = SCRIPT, kind: str = "xterm") -> tuple[str, str]:
    """Run a script, and return what a terminal received as standard error, and standard output."""
    terminal, end = pty.openpty()
    environment = {**os.environ, "TERM": kind, "COLUMNS": "120"}
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "CI"):
        environment.pop(name, None)
    code = code.format(delay_s=delay_s)
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=end, text=True, env=environment
    )
    os.close(end)
    received = b""
    while True:
        try:
            piece = os.read(terminal, 65536)
        except OSError:  # raised by Linux when the other end is closed
            break
        if not piece:
            break
        received += piece
    os.close(terminal)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, received
    return received.decode(), out


def test_a_long_stage_is_shown_with_its_time_and_erased_afterwards() -> None:
    received, out = outputs(0.1)
    texts = ("tracing", "compiling the network", "another bar", "parity", "saved")
    positions = [received.index(text) for text in texts]
    assert positions == sorted(positions)
    assert "0:00:00" in received
    # While another bar is shown, and after the end, the line is erased, and the result goes to
    # standard output.
    before = received[: received.index("another bar")]
    assert before.rindex("\x1b[2K") > before.rindex("compiling the network")
    between = received[received.index("another bar") : received.index("parity")]
    assert "tracing" not in between
    last = received[: received.index("saved")]
    assert last.rindex("\x1b[2K") > last.rindex("parity")
    assert out == "the result\n"


def test_a_terminal_that_cannot_move_its_cursor_gets_no_line() -> None:
    assert outputs(0.1, kind="dumb") == ("another bar\r\nsaved\r\n", "the result\n")


def test_short_work_shows_nothing() -> None:
    assert outputs(60.0) == ("another bar\r\nsaved\r\n", "the result\n")


def test_a_quiet_command_shows_nothing() -> None:
    code = SCRIPT.replace(
        "with stages_shown(delay_s={delay_s}):", "with stages_shown(quiet=True):"
    ).replace("0.5", "0.2")
    assert outputs(0.0, code) == ("another bar\r\nsaved\r\n", "the result\n")


def test_without_a_terminal_nothing_is_shown() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(delay_s=0)], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("the result\n", "another bar\nsaved\n")


class RecordedLine(stage_line.StageLine):
    """Records the stages that it was updated with."""

    def __init__(self) -> None:
        super().__init__(delay_s=3600.0)
        self.names: list[str] = []

    def update(self, name: str) -> None:
        self.names.append(name)
        super().update(name)


@pytest.fixture
def shown() -> object:
    line = RecordedLine()
    token = stage_line._shown.set(line)
    yield line.names
    stage_line._shown.reset(token)
    line.hide()


IMAGES = np.random.default_rng(6).standard_normal((4, 3, 16, 16), dtype=np.float32)


def test_every_stage_of_an_export_is_shown(tmp_path: Path, shown: list[str]) -> None:
    export(tiny_vit(), tmp_path / "a", images=IMAGES, precision="int8-static", form=Form())
    form = Form().name
    assert shown == [
        "reference outputs",
        f"parity of form {form}",
        f"calibrating {form}",
        "parity of int8-static",
        "writing model.onnx",
    ]
    shown.clear()
    export(tiny_vit(), tmp_path / "b", form="plain")
    assert shown == [
        "reference outputs",
        "tracing",
        "parity of the traced graph",
        "simplifying",
        "parity of the simplified graph",
        "parity of form plain",
        "writing model.onnx",
    ]


def test_every_stage_of_an_imported_graph_is_shown(tmp_path: Path, shown: list[str]) -> None:
    onnx.save(
        write_network(vitrim.lift(tiny_vit()), Form(rows="batch", norm="layer", last_keys=False)),
        str(tmp_path / "given.onnx"),
    )
    export_graph(tmp_path / "given.onnx", tmp_path / "a", precision="int8")
    assert shown == [
        "reading given.onnx",
        "reference outputs",
        "parity of the imported graph",
        "simplifying",
        "parity of the simplified graph",
        "quantizing",
        "parity of int8",
        "writing model.onnx",
    ]
