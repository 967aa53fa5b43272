"""The vector unit follows from the features; TVM accepts every profile's target."""

from __future__ import annotations

from pathlib import Path

import pytest
from vitrim.core.errors import InputError
from vitrim.targets.catalog import list_targets, load_target
from vitrim.targets.vector import vector_unit


@pytest.mark.parametrize(
    ("architecture", "features", "kind", "lanes", "registers", "fused", "dot"),
    [
        ("x86_64", ["avx2", "fma", "avx512f", "avx512_vnni"], "avx512", 16, 32, True, True),
        ("x86_64", ["avx", "avx2", "fma"], "avx2", 8, 16, True, False),
        ("x86_64", ["avx2", "fma", "avx_vnni"], "avx2", 8, 16, True, True),
        ("x86_64", ["avx"], "avx", 8, 16, False, False),
        ("x86_64", [], "sse", 4, 16, False, False),
        ("aarch64", ["asimd"], "neon", 4, 32, True, False),
        ("aarch64", ["asimd", "asimddp"], "neon", 4, 32, True, True),
        ("armv7e-m", ["fpu", "dsp"], "scalar", 1, 16, True, False),
    ],
)
def test_the_widest_unit_is_selected(
    architecture: str,
    features: list[str],
    kind: str,
    lanes: int,
    registers: int,
    fused: bool,
    dot: bool,
) -> None:
    unit = vector_unit(architecture, features)
    assert (unit.kind, unit.lanes, unit.registers, unit.fused, unit.int8_dot) == (
        kind,
        lanes,
        registers,
        fused,
        dot,
    )


def test_a_profile_has_a_vector_unit() -> None:
    assert load_target("rpi4").vector.kind == "neon"
    assert load_target("x86-64-v4-vnni").vector.bits == 512


@pytest.mark.parametrize("name", [*list_targets(), "host"])
def test_tvm_accepts_the_target_of_every_profile(name: str) -> None:
    tvm = pytest.importorskip("tvm")
    target = load_target(name).tvm_target
    assert target is not None
    assert tvm.target.Target(target).kind.name == target["kind"]


def mine(tmp_path: Path, line: str) -> Path:
    text = (
        Path(str(__import__("vitrim.targets", fromlist=["x"]).__path__[0])) / "rpi5.toml"
    ).read_text()
    lines = [line if old.startswith("tvm_target") else old for old in text.splitlines()]
    path = tmp_path / "mine.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_command_line_form_of_older_profiles_is_accepted(tmp_path: Path) -> None:
    path = mine(
        tmp_path,
        "tvm_target = 'llvm -mtriple=aarch64-linux-gnu -mcpu=cortex-a76 -mattr=+dotprod,+fullfp16'",
    )
    assert load_target(path).tvm_target == {
        "kind": "llvm",
        "mtriple": "aarch64-linux-gnu",
        "mcpu": "cortex-a76",
        "mattr": ["+dotprod", "+fullfp16"],
    }


def test_an_invalid_tvm_target_is_refused_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"mine\.toml:\d+: tvm_target: '-mcpu' is no option of a TVM target"
    ):
        load_target(mine(tmp_path, "tvm_target = 'llvm -mcpu cortex-a76'"))
