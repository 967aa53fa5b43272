"""`vitrim targets`: the catalog, whether a model fits, and a labelled estimate of its latency."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import vitrim

    torch.manual_seed(0)
    source = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=96, depth=3, num_heads=3, num_classes=5
    )
    folder = tmp_path_factory.mktemp("saved") / "model"
    vitrim.save(vitrim.lift(source.eval()), folder)
    return folder


@pytest.fixture
def large(tmp_path: Path) -> Path:
    import vitrim

    source = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=192, depth=4, num_heads=3, num_classes=5
    )
    vitrim.save(vitrim.lift(source.eval()), tmp_path / "large")
    return tmp_path / "large"


def call(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    from vitrim.cli import main

    with pytest.raises(SystemExit) as exited:
        main(["targets", *arguments])
    found = capsys.readouterr()
    return int(exited.value.code or 0), found.out, found.err


def test_check_of_one_target(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(["check", str(saved), "--target", "rpi4"], capsys)
    assert code == 0
    line = next(line for line in out.splitlines() if line.startswith("time of one inference"))
    assert line.startswith("time of one inference, estimate: ")
    assert "in onnxruntime, fp32, 4 threads" in line
    assert line.endswith("measure it on the device")
    assert out.rstrip().endswith("it fits")


def test_the_target_may_come_first(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        call(["check", "rpi4", str(saved)], capsys)[1]
        == call(["check", str(saved), "--target", "rpi4"], capsys)[1]
    )
    code, _, err = call(["check", "rpi4", str(saved), "--target", "rpi5"], capsys)
    assert (code, "two targets" in err) == (2, True)


def test_runtime_and_threads_set_the_estimate(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = call(
        [
            "check",
            str(saved),
            "--target",
            "rpi5",
            "--runtime",
            "ncnn",
            "--threads",
            "1",
            "--precision",
            "fp16",
        ],
        capsys,
    )
    assert "in ncnn, fp16, 1 thread; " in out
    assert "rests on ncnn on aarch64" in out
    code, _, err = call(["check", str(saved), "--target", "rpi5", "--threads", "9"], capsys)
    assert (code, "rpi5: 9 threads, but the profile has 4 cores; give 1 to 4" in err) == (2, True)


def test_an_unknown_runtime_is_refused_with_the_nearest(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = call(
        ["check", str(saved), "--target", "rpi5", "--runtime", "onxruntime"], capsys
    )
    assert code == 2
    assert "--runtime 'onxruntime': no such runtime; did you mean 'onnxruntime'?" in err


def test_check_without_a_target_has_a_line_for_each(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from vitrim.targets.catalog import list_targets

    code, out, _ = call(["check", str(saved)], capsys)
    assert code == 0
    for name in [*list_targets(), "host"]:
        assert any(line.strip().startswith(name) for line in out.splitlines()), name
    assert "estimates, not measurements" in " ".join(out.split())


def test_a_model_that_does_not_fit_is_reported_with_its_excess(
    large: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call(["check", str(large), "--target", "stm32h7"], capsys)
    assert code == 1
    assert "times too large" in out
    assert "time: no estimate; no microcontroller was measured to calibrate one with" in out
    assert out.rstrip().endswith("choose a larger device")


def test_a_gpu_has_no_estimate_but_a_reason(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call(["check", str(saved), "--target", "cuda"], capsys)
    assert code == 0
    assert "no GPU was measured to calibrate one with" in out


def test_show_prints_vectors_and_the_tvm_target(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(["show", "rpi5"], capsys)
    assert code == 0
    assert "vectors: neon, 32 registers of 128 bits, int8 dot products" in out
    assert '"mcpu": "cortex-a76"' in out
