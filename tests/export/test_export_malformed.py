"""Tampered and malformed artifacts, kept as folders: each is refused with the reason.

The intact one must stay readable by every later version.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner
from vitrim.cli import app
from vitrim.core.errors import InputError
from vitrim.export.artifact import MAX_MANIFEST_BYTES, Artifact
from vitrim.export.manifest import MANIFEST

FOLDER = Path(__file__).with_name("malformed")
EXPECTED: dict[str, str | None] = json.loads((FOLDER / "expected.json").read_text())
BROKEN = sorted(name for name, reason in EXPECTED.items() if reason is not None)


def test_folders_and_expectations_match() -> None:
    assert {path.name for path in FOLDER.iterdir() if path.is_dir()} == set(EXPECTED)
    assert len(BROKEN) > 40


def test_the_intact_artifact_is_accepted() -> None:
    artifact = Artifact.load(FOLDER / "whole")
    assert (artifact.name, artifact.bytes) == ("sample", 256)


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_artifact_is_refused_in_one_line_that_names_the_reason(case: str) -> None:
    with pytest.raises(InputError) as caught:
        Artifact.load(FOLDER / case)
    message = str(caught.value)
    assert str(EXPECTED[case]) in message
    assert str(FOLDER / case) in message
    assert message.isprintable()
    assert len(message) < 700 + len(str(FOLDER))


@pytest.mark.parametrize("case", ["flipped-byte", "link-to-file", "path-parent", "nan"])
def test_the_command_reports_the_same_and_exits_with_two(case: str) -> None:
    ran = CliRunner().invoke(app, ["export", "--verify", str(FOLDER / case)])
    assert ran.exit_code == 2 or isinstance(ran.exception, InputError)
    output = ran.output + str(ran.exception or "")
    assert str(EXPECTED[case])[:40] in " ".join(output.split())


def test_a_manifest_that_would_fill_memory_is_not_read(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FOLDER / "whole", tmp_path / "artifact"))
    with (folder / MANIFEST).open("r+b") as stream:
        stream.truncate(MAX_MANIFEST_BYTES + 1)
    with pytest.raises(
        InputError, match=r"manifest\.json: 16777217 bytes are more than a manifest may have"
    ):
        Artifact.load(folder)


def test_a_pipe_in_the_folder_is_refused_without_blocking(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FOLDER / "whole", tmp_path / "artifact"))
    os.mkfifo(folder / "pipe")
    with pytest.raises(InputError, match="not a plain file"):
        Artifact.load(folder)
