"""What a person sees while an export lasts: its stage and the time, on a terminal only, and gone
afterwards.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_models import tiny_vit
from vitrim.export import export, stage_line
from vitrim.export.forms import Form, write_network
from vitrim.export.graphs.given_graph import export_graph

pty = pytest.importorskip("pty", reason="needs a terminal of its own (a Unix)")

LASTING = """
import sys, time
from vitrim.export.stage_line import stage, stages_hidden, stages_shown
with stages_shown(patience_s={patience_s}):
    stage("tracing")
    time.sleep(0.5)
    with stages_shown(patience_s=0):
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


def seen(patience_s: float, code: str = LASTING, kind: str = "xterm") -> tuple[str, str]:
    """(what a terminal got on standard error, standard output)."""
    terminal, end = pty.openpty()
    environment = {**os.environ, "TERM": kind, "COLUMNS": "120"}
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "CI"):
        environment.pop(name, None)
    code = code.format(patience_s=patience_s)
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=end, text=True, env=environment
    )
    os.close(end)
    told = b""
    while True:
        try:
            piece = os.read(terminal, 65536)
        except OSError:  # Linux says so when the other end is closed
            break
        if not piece:
            break
        told += piece
    os.close(terminal)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, told
    return told.decode(), out


def test_a_stage_that_lasts_is_named_with_its_time_and_leaves_no_trace() -> None:
    told, out = seen(0.1)
    assert (
        told.index("tracing")
        < told.index("compiling the network")
        < told.index("another bar")
        < told.index("parity")
        < told.index("saved")
    )
    assert "0:00:00" in told
    # While another bar is shown, and after the end, the line is taken away (erase line), and the
    # result goes where it belongs.
    before = told[: told.index("another bar")]
    assert before.rindex("\x1b[2K") > before.rindex("compiling the network")
    between = told[told.index("another bar") : told.index("parity")]
    assert "tracing" not in between
    last = told[: told.index("saved")]
    assert last.rindex("\x1b[2K") > last.rindex("parity")
    assert out == "the result\n"


def test_a_terminal_that_cannot_move_its_cursor_gets_no_line() -> None:
    assert seen(0.1, kind="dumb") == ("another bar\r\nsaved\r\n", "the result\n")


def test_short_work_shows_nothing() -> None:
    assert seen(60.0) == ("another bar\r\nsaved\r\n", "the result\n")


def test_a_quiet_command_shows_nothing() -> None:
    code = LASTING.replace(
        "with stages_shown(patience_s={patience_s}):", "with stages_shown(quiet=True):"
    ).replace("0.5", "0.2")
    assert seen(0.0, code) == ("another bar\r\nsaved\r\n", "the result\n")


def test_where_nobody_looks_nothing_is_written() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LASTING.format(patience_s=0)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("the result\n", "another bar\nsaved\n")


class Told(stage_line.StageLine):
    """Remembers what it was told."""

    def __init__(self) -> None:
        super().__init__(patience_s=3600.0)
        self.names: list[str] = []

    def tell(self, name: str) -> None:
        self.names.append(name)
        super().tell(name)


@pytest.fixture
def told() -> object:
    line = Told()
    token = stage_line._shown.set(line)
    yield line.names
    stage_line._shown.reset(token)
    line.hide()


IMAGES = np.random.default_rng(6).standard_normal((4, 3, 16, 16), dtype=np.float32)


def test_every_stage_of_an_export_is_told(tmp_path: Path, told: list[str]) -> None:
    export(tiny_vit(), tmp_path / "a", images=IMAGES, precision="int8-static", form=Form())
    form = Form().name
    assert told == [
        "reference outputs", "tracing", "parity of the traced graph", "simplifying", "parity of the simplified graph",
        f"parity of form {form}", f"calibrating {form}", "parity of int8-static", "writing model.onnx",
    ]  # fmt: skip


def test_every_stage_of_a_given_graph_is_told(tmp_path: Path, told: list[str]) -> None:
    import onnx
    import vitrim

    onnx.save(
        write_network(vitrim.lift(tiny_vit()), Form(rows="batch", norm="layer", last_keys=False)),
        str(tmp_path / "given.onnx"),
    )
    export_graph(tmp_path / "given.onnx", tmp_path / "a", precision="int8")
    assert told == [
        "reading given.onnx", "parity of the given graph", "simplifying", "parity of the simplified graph", "quantizing", "parity of int8",
        "writing model.onnx",
    ]  # fmt: skip
