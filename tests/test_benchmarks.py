"""The benchmarks: every module imports, and every command that a page names exists."""

from __future__ import annotations

import importlib
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import timm
import torch
import vitrim
from source_tree import ROOT
from tiny_models import tiny_vit
from vitrim.core.errors import InputError

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "benchmarks").rglob("*.py"))
    if path.name != "__init__.py"
}
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_benchmark_imports(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if str(error.name).split(".")[0] in ("vitrim", "benchmarks"):
            raise
        pytest.skip(f"{error.name} is not installed: pip install 'vitrim[benchmarks]'")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_exist(page: Path) -> None:
    names = re.findall(r"python -m (benchmarks[\w.]+)", page.read_text(encoding="utf-8"))
    known = {*MODULES, *(name.removesuffix(".__main__") for name in MODULES)}
    assert [name for name in names if name.rstrip(".") not in known] == []


def test_published_figures_are_of_known_models_at_their_image_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    pytest.importorskip("fvcore", reason="pip install 'vitrim[benchmarks]'")
    from benchmarks.speed import other_models

    table = tomllib.loads(other_models.PUBLISHED.read_text(encoding="utf-8"))
    for name, figure in table["models"].items():
        source = other_models._parsed(name)[1]
        config = timm.get_pretrained_cfg(source)
        assert config is not None
        assert config.input_size[-1] == figure["image"]
        assert figure["weights"].startswith(source) == (name == source)
        assert 50 < figure["top1_percent"] < 90
        found = other_models.published(name, config.input_size, table)
        assert found is not None
        assert found["source"] == table["sources"][figure["source"]]
    small = "mobilevitv2_050"
    assert other_models.published(f"{small}.cvnets_in1k", (3, 256, 256), table) is not None
    assert other_models.published(small, (3, 224, 224), table) is None


def test_a_row_of_other_models_is_read_from_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    pytest.importorskip("fvcore", reason="pip install 'vitrim[benchmarks]'")
    from benchmarks.speed.other_models import _parsed

    assert _parsed("mobilevitv2_050.cvnets_in1k") == (None, "mobilevitv2_050.cvnets_in1k", None)
    assert _parsed("tome:deit_tiny_patch16_224:8") == ("tome", "deit_tiny_patch16_224", 8)
    assert _parsed("hvt:deit_tiny_patch16_224") == ("hvt", "deit_tiny_patch16_224", None)
    assert _parsed("evit:deit_tiny_patch16_224:0.7") == ("evit", "deit_tiny_patch16_224", 0.7)
    for wrong in ("sort:deit_tiny_patch16_224:8", "deit_tiny_patch16_224:8", "a b"):
        with pytest.raises(InputError, match="no row; give a timm name"):
            _parsed(wrong)


CPUID_SOURCE = """
#include <cpuid.h>
unsigned leaf7(unsigned subleaf, int which) {
    unsigned found[4];
    __cpuid_count(7, subleaf, found[0], found[1], found[2], found[3]);
    return found[which];
}
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="CPUID is an instruction of x86-64")
def test_a_limited_package_sees_avx2_and_nothing_newer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (shutil.which("cc") and shutil.which("objdump")):
        pytest.skip("no C compiler or no objdump here: apt-get install gcc binutils")
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.speed.limited_cpu import limited_environment

    package = tmp_path / "reads_cpuid"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "leaf7.c").write_text(CPUID_SOURCE)
    library = package / "leaf7.so"
    build = ["cc", "-shared", "-fPIC", str(package / "leaf7.c"), "-o", str(library)]
    subprocess.run(build, check=True)
    before = library.read_bytes()
    monkeypatch.syspath_prepend(str(tmp_path))
    script = (
        "import reads_cpuid, ctypes, pathlib\n"
        "path = pathlib.Path(reads_cpuid.__file__).with_name('leaf7.so')\n"
        "leaf7 = ctypes.CDLL(str(path)).leaf7\n"
        "leaf7.restype = ctypes.c_uint\n"
        "print(leaf7(0, 1), leaf7(0, 2), leaf7(1, 0))"
    )
    with limited_environment(["reads_cpuid"]) as environment:
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=environment,
            cwd=tmp_path / "reads_cpuid",
            capture_output=True,
            text=True,
            check=True,
        )
    basic, vnni, newer = map(int, done.stdout.split())
    avx512 = 1 << 16 | 1 << 17 | 1 << 30 | 1 << 31
    assert (basic & avx512, vnni & 1 << 11, newer) == (0, 0, 0)
    assert library.read_bytes() == before


def test_the_trained_model_is_small_and_has_the_shape_that_its_page_states() -> None:
    folder = ROOT / "benchmarks" / "checkpoints" / "cifar10_small"
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 6_000_000
    model = vitrim.load(folder)
    assert sum(parameter.numel() for parameter in model.parameters()) == 2_693_194
    assert "2.69 million parameters" in (ROOT / "docs" / "models.md").read_text(encoding="utf-8")


def test_the_steps_of_a_waterfall_end_with_the_compact_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.speed.waterfall import cut_steps, random_model

    dense = vitrim.lift(tiny_vit(depth=3, img_size=32))
    shares = {"embed": 0.7, "ffn": 0.5, "head": 0.7, "token": 0.6}
    widths = vitrim.StructuredMask.random(dense, shares, seed=1)
    gone = {"block": {"blocks.1.attn": torch.zeros(1, dtype=torch.bool)}}
    mask = vitrim.StructuredMask({**widths.kept, **gone})
    small = vitrim.compact(dense, mask, last_queries=True).architecture
    steps = cut_steps(dense.architecture, small)
    assert list(steps) == ["widths", "depth", "tokens"]
    assert steps["tokens"] is small
    assert {step.embed for step in steps.values()} == {small.embed}
    counts = [len(step.branches) for step in steps.values()]
    assert counts == [6, 5, 5]
    assert steps["depth"].step_tokens()[0] == dense.architecture.tokens > small.step_tokens()[0]
    images = torch.randn(1, *small.image)
    for step in steps.values():
        assert random_model(step)(images).shape == (1, 5)
    alone = vitrim.compact(dense, vitrim.StructuredMask({"ffn": widths.kept["ffn"]}))
    assert list(cut_steps(dense.architecture, alone.architecture)) == ["widths"]
    with pytest.raises(InputError, match="has the sizes of the dense one"):
        cut_steps(dense.architecture, dense.architecture)


def test_a_coverage_command_resumes_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.coverage.result_rows import Row, coverage_rows

    examined: list[str] = []

    def examine(name: str) -> Row:
        examined.append(name)
        row = Row(name)
        row.add_error("tokens", float("nan") if name == "b" else 1e-7)
        return row

    out = tmp_path / "rows.json"
    assert len(coverage_rows(["a", "b", "c"], examine, out, {"masks": 1}, until=0.0)) == 0
    coverage_rows(["a", "b"], examine, out, {"masks": 1})
    found = coverage_rows(["a", "b", "c"], examine, out, {"masks": 1})
    assert examined == ["a", "b", "c"]
    assert [row.error for row in found] == [1e-7, float("inf"), 1e-7]
    # Other masks are other rows.
    coverage_rows(["a"], examine, out, {"masks": 2})
    coverage_rows(["a"], examine, out, {"masks": 2}, again=True)
    assert examined == ["a", "b", "c", "a", "a"]
