"""The ledger of a run folder: a step is repeated only if its files or its recipe changed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from vitrim.core.errors import InputError
from vitrim.core.staging import only_writer
from vitrim.pipeline.recipe import load_recipe
from vitrim.pipeline.run import run
from vitrim.pipeline.run_folder import RunFolder


def opened(path: Path, **flags: bool) -> RunFolder:
    return RunFolder.open(
        path, resume=flags.get("resume", False), overwrite=flags.get("overwrite", False)
    )


def write_value(folder: RunFolder, text: str = "value") -> str:
    (folder / "value.txt").write_text(text)
    return text


def test_a_step_is_made_once(tmp_path: Path) -> None:
    folder = opened(tmp_path / "run")
    assert folder.step(
        "one", "a", ["value.txt"], lambda _: write_value(folder), lambda: "loaded"
    ) == ("value", True)
    again = opened(tmp_path / "run", resume=True)
    assert again.step(
        "one", "a", ["value.txt"], lambda _: pytest.fail("made again"), lambda: "loaded"
    ) == ("loaded", False)


def test_a_step_with_a_damaged_file_is_repeated(tmp_path: Path) -> None:
    folder = opened(tmp_path / "run")
    folder.step("one", "a", ["value.txt"], lambda _: write_value(folder), lambda: "loaded")
    (folder / "value.txt").write_text("valu")
    assert folder.step(
        "one", "a", ["value.txt"], lambda _: write_value(folder), lambda: "loaded"
    ) == ("value", True)
    (folder / "value.txt").unlink()
    assert folder.step(
        "one", "a", ["value.txt"], lambda _: write_value(folder), lambda: "loaded"
    ) == ("value", True)


def test_only_the_same_recipe_continues_a_step_that_was_begun(tmp_path: Path) -> None:
    folder = opened(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        folder.step(
            "one",
            "a",
            ["value.txt"],
            lambda _: (_ for _ in ()).throw(KeyboardInterrupt),
            lambda: "",
        )
    continued_flags: list[bool] = []

    def make(continued: bool) -> str:
        continued_flags.append(continued)
        raise KeyboardInterrupt

    for fingerprint in ("a", "b"):
        with pytest.raises(KeyboardInterrupt):
            opened(tmp_path / "run", resume=True).step(
                "one", fingerprint, ["value.txt"], make, lambda: ""
            )
    assert continued_flags == [True, False]


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"schema": "vitrim.steps/2", "steps": {}, "begun": {}}']
)
def test_a_damaged_ledger_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "steps.json").write_text(text)
    with pytest.raises(InputError, match=r"steps\.json: .*--overwrite"):
        opened(tmp_path, resume=True)


def test_overwrite_deletes_the_earlier_run(tmp_path: Path) -> None:
    folder = opened(tmp_path / "run")
    folder.step("one", "a", ["value.txt"], lambda _: write_value(folder), lambda: "loaded")
    assert not (opened(tmp_path / "run", overwrite=True) / "value.txt").exists()


def test_a_second_process_does_not_run_in_the_same_folder(tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    code = (
        "import pathlib, sys\n"
        "from vitrim.core.staging import only_writer\n"
        "with only_writer(pathlib.Path(sys.argv[1])):\n"
        "    print('ready', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(out)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "ready\n"
    with pytest.raises(InputError, match="another vitrim process writes to this folder"):
        run(load_recipe("quickstart"), out, quiet=True)
    assert list(out.iterdir()) == []
    other.kill()
    other.wait()
    with only_writer(out):
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_a_child_does_not_keep_the_folder_of_a_parent_that_has_ended(tmp_path: Path) -> None:
    started, starting = os.pipe()
    with only_writer(tmp_path):
        child = os.fork()
        if child == 0:
            os.write(starting, b"1")
            time.sleep(60)
            os._exit(0)
        # The child gives up its copy of the lock as soon as it runs.
        assert os.read(started, 1) == b"1"
    try:
        with only_writer(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for end in (started, starting):
            os.close(end)
