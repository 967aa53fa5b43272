"""What OpenVINO would report of its users stays here."""

from __future__ import annotations

import subprocess
import sys

import pytest
from source_tree import ROOT

# The engine alone, then nncf, as an export imports them.
CODE = """
import sys
from vitrim.runtimes.openvino_engine import OpenVinoEngine
try:
    OpenVinoEngine({"runtime": "openvino", "model": "none.xml"})
except Exception as error:
    assert "openvino" not in str(error), error
assert "openvino" in sys.modules
import nncf
print(sys.modules["openvino_telemetry"])
"""


def test_openvino_is_imported_without_its_telemetry() -> None:
    pytest.importorskip("openvino", reason="pip install 'vitrim[openvino]'")
    pytest.importorskip("nncf", reason="pip install 'vitrim[openvino]'")
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, cwd=ROOT.parent, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "None"
