"""The parts of the emulation without the network (archives, wheels, record), and a measurement."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from aarch64 import emulator
from bench_samples import measurement
from typer.testing import CliRunner
from vitrim.bench.local.emulated import for_target, measure_emulated
from vitrim.bench.local.options import MeasureOptions
from vitrim.bench.results.compare import compare
from vitrim.bench.results.measurement import Environment, Measurement
from vitrim.bench.results.warnings import warnings_for
from vitrim.cli import app
from vitrim.commands.measurement_table import measurement_table
from vitrim.core.errors import InputError
from vitrim.core.progress import step_lines
from vitrim.targets.catalog import load_target
from vitrim.targets.emulation import debian, preparation, prepare, ready, wheels
from vitrim.targets.emulation.emulator import (
    RECORD,
    Emulator,
    emulation_folder,
    read_record,
    record_text,
)
from vitrim.targets.emulation.preparation import locked

URI = "http://mirror.example/debian"
DEB822 = f"Types: deb\nURIs: {URI}\nSuites: bookworm\nSigned-By: /keys/debian.gpg\n"


# ---- Debian's packages ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("sources.list.d/debian.sources", DEB822, debian.Mirror(URI, "/keys/debian.gpg")),
        (
            "sources.list.d/two.sources",
            f"URIs: http://other.example/node\nSuites: x\n\n{DEB822}",
            debian.Mirror(URI, "/keys/debian.gpg"),
        ),
        ("sources.list", f"deb {URI}/ bookworm main\n", debian.Mirror(f"{URI}/", None)),
        (
            "sources.list.d/a.list",
            f"deb [arch=amd64 signed-by=/k.gpg] {URI} bookworm main\n",
            debian.Mirror(URI, "/k.gpg"),
        ),
        ("sources.list", f"deb [arch=amd64] {URI} bookworm main\n", debian.Mirror(URI, None)),
        ("sources.list", f"# deb {URI} bookworm main\n", None),
        ("sources.list", "deb http://mirror.example/ubuntu noble main\n", None),
    ],
)
def test_the_machines_own_archive_is_found_in_either_format(
    tmp_path: Path, name: str, text: str, found: debian.Mirror | None
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    assert debian.mirror(tmp_path) == found


def test_without_a_debian_archive_the_error_names_the_alternative(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda tool: f"/usr/bin/{tool}")
    with pytest.raises(
        InputError,
        match=r"apt sources name no Debian archive; on another system name an aarch64 root folder "
        r".* in VITRIM_",
    ):
        debian.require_debian(tmp_path)
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    with pytest.raises(InputError, match="apt-get and dpkg-deb are not here; on another system"):
        debian.require_debian(tmp_path)


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="no apt-get on this system")
def test_a_missing_network_is_reported_in_one_line_with_apts_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nothing listens at port 9 of this machine, as without a network.
    monkeypatch.setattr(
        debian, "require_debian", lambda: debian.Mirror("http://127.0.0.1:9/debian", None)
    )
    with pytest.raises(
        InputError,
        match=r"apt-get could not fetch what emulation needs: .*127\.0\.0\.1.*"
        r"check the network, then prepare again",
    ) as caught:
        debian.fetch(
            ["qemu-user"],
            "amd64",
            tmp_path / "apt",
            dependencies=False,
            what="qemu",
            progress=lambda share, text: None,
        )
    assert "\n" not in str(caught.value)


# ---- wheels --------------------------------------------------------------------------------------


def write_wheel(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, name)
    return path


def test_a_wheel_is_unpacked_whole_or_in_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = write_wheel(
        tmp_path / "thing-2.1-py3-none-any.whl",
        "thing/a.py",
        "thing/lib/b.so",
        "thing-2.1.dist-info/METADATA",
    )
    requested = []

    def download(distribution: str, version: str | None, python: str, folder: Path) -> Path:
        requested.append(version)
        if version is not None:
            raise InputError("no such version")
        return wheel

    monkeypatch.setattr(wheels, "_download", download)
    wheels.install("thing", "1.0", "3.13", tmp_path / "whole")
    assert requested == ["1.0", None]
    assert wheels.unpacked_version(tmp_path / "whole") == "2.1"
    wheels.install("thing", None, "3.13", tmp_path / "part", only=("thing/lib",))
    assert [path.name for path in (tmp_path / "part").rglob("*") if path.is_file()] == ["b.so"]


def test_a_wheel_with_a_path_outside_of_its_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = write_wheel(tmp_path / "evil-1-py3-none-any.whl", "../evil.py")
    monkeypatch.setattr(wheels, "_download", lambda *arguments: wheel)
    with pytest.raises(
        InputError,
        match=r"evil-1-py3-none-any\.whl: contains the path '\.\./evil\.py', which is outside of",
    ):
        wheels.install("evil", None, "3.13", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "evil.py").exists()


# ---- the record ----------------------------------------------------------------------------------


def write_emulation(folder: Path) -> Emulator:
    """Write the files of an emulation; none of them can run."""
    for name in ("qemu/qemu-aarch64", "root/usr/bin/python3.13"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("")
        (folder / name).chmod(0o755)
    (folder / "numpy").mkdir()
    return Emulator(
        folder / "qemu/qemu-aarch64",
        folder / "root",
        folder / "root/usr/bin/python3.13",
        (folder / "numpy",),
        {"qemu": "10.0.13", "python": "3.13"},
    )


def test_the_record_describes_the_emulation_and_moves_with_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulation = write_emulation(tmp_path / "one")
    (tmp_path / "one" / RECORD).write_text(record_text(tmp_path / "one", emulation))
    assert read_record(tmp_path / "one") == emulation
    (tmp_path / "one").rename(tmp_path / "two")
    monkeypatch.setenv("VITRIM_EMULATION", str(tmp_path / "two"))
    assert emulation_folder() == tmp_path / "two"
    found = ready()
    assert found is not None
    assert found.root == tmp_path / "two" / "root"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"schema": "vitrim.emulation/1"}',
        '{"schema": "vitrim.emulation/1", "qemu": 1, "root": 2, "python": 3, "packages": 4, '
        '"versions": 5}',
    ],
)
def test_a_broken_record_is_no_emulation(tmp_path: Path, text: str) -> None:
    (tmp_path / RECORD).write_text(text)
    assert read_record(tmp_path) is None


def test_a_record_with_missing_parts_is_no_emulation(tmp_path: Path) -> None:
    emulation = write_emulation(tmp_path)
    (tmp_path / RECORD).write_text(record_text(tmp_path, emulation))
    emulation.qemu.unlink()
    assert read_record(tmp_path) is None


def test_leftovers_of_an_interrupted_preparation_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".root.vitrim-new-abcdefgh").mkdir(parents=True)
    (tmp_path / "apt-root").mkdir()
    (tmp_path / ".ssh").mkdir()
    with locked(tmp_path):
        assert not (tmp_path / ".root.vitrim-new-abcdefgh").exists()
        # VITRIM_EMULATION may name a folder with other things in it.
        assert (tmp_path / ".ssh").is_dir()
        # apt's downloads are kept, since it can continue them.
        assert (tmp_path / "apt-root").is_dir()


# ---- preparation ---------------------------------------------------------------------------------


def test_invalid_named_parts_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        InputError, match="no aarch64 runtime called 'coreml'; take one of onnxruntime, tvm"
    ):
        prepare(runtimes=["coreml"], folder=tmp_path)
    monkeypatch.setenv("VITRIM_QEMU_AARCH64", sys.executable)
    with pytest.raises(InputError, match=r"VITRIM_QEMU_AARCH64=.*: not a qemu-aarch64 that runs"):
        prepare(folder=tmp_path)
    monkeypatch.setattr(preparation, "_qemu", lambda folder, progress: (tmp_path, "10.0"))
    monkeypatch.setenv("VITRIM_AARCH64_ROOT", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"VITRIM_AARCH64_ROOT=.*nowhere: no such folder"):
        prepare(folder=tmp_path)
    monkeypatch.setenv("VITRIM_AARCH64_ROOT", str(tmp_path))
    with pytest.raises(
        InputError, match=r"has no usr/bin/python3\.X; install python3 into that root folder"
    ):
        prepare(folder=tmp_path)


def test_a_user_land_that_does_not_start_is_reported(tmp_path: Path) -> None:
    emulation = write_emulation(tmp_path)
    emulation.qemu.write_text(
        "#!/bin/sh\necho 'qemu: uncaught target signal 4 (Illegal instruction)' >&2\nexit 132\n"
    )
    with pytest.raises(
        InputError,
        match=r"qemu-aarch64 10\.0\.13 cannot run the user land's python3: "
        r"qemu: uncaught target signal 4 .*; name a qemu 10",
    ):
        preparation._verify(emulation)


def test_each_step_is_a_line_and_a_long_step_few_lines(
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = step_lines(sys.stderr)
    for share in range(100):
        report(share / 200, f"downloading qemu: {share} of 100 MB")
    report(0.5, "unpacking the user land: tar")
    assert capsys.readouterr().err.splitlines() == [
        "  0 %  downloading qemu: 0 of 100 MB",
        " 50 %  unpacking the user land: tar",
    ]


# ---- emulated time is not a device's -------------------------------------------------------------


def emulated(name: str) -> Measurement:
    return measurement(
        name=name, environment=Environment(emulator="qemu-aarch64 10.0.13 (cortex-a72)")
    )


def test_emulated_time_is_marked_and_cannot_be_compared() -> None:
    real, other = measurement(name="real"), emulated("other")
    assert (real.emulated, other.emulated) == (False, True)
    for pair in ((real, other), (other, real), (other, other)):
        with pytest.raises(
            InputError,
            match=r"other: emulated by qemu-aarch64 .*, not a device's latency: "
            r"there is nothing to compare it with",
        ):
            compare(*pair)
    table = measurement_table({"real": real, "other": other})
    assert list(table.columns[0].cells) == ["real", "other (emulated)"]
    assert list(table.columns[5].cells) == ["", ""]
    assert table.caption == "emulated: not a device's latency"
    # There is no warning about samples or a busy machine, since the times have no meaning.
    assert warnings_for(other, stopped_by="time") == (
        "emulated by qemu-aarch64 10.0.13 (cortex-a72), not a device's latency; "
        "take only outputs, top-1 and counts from this run",
    )


def test_the_command_line_refuses_to_compare_emulated_times(tmp_path: Path) -> None:
    for name, found in (("real", measurement(name="real")), ("other", emulated("other"))):
        found.save(tmp_path / f"{name}.json")
    result = CliRunner().invoke(
        app, ["compare", str(tmp_path / "real.json"), str(tmp_path / "other.json")]
    )
    assert "not a device's latency" in str(result.exception)
    assert "p50" not in result.output


# ---- with the emulation --------------------------------------------------------------------------


def test_the_emulated_processor_is_the_targets() -> None:
    found = emulator()
    assert found.cpu == "max"
    names = {
        name: for_target(found, load_target(name)).cpu
        for name in ("rpi4", "rpi5", "rpi3", "jetson-orin-nano", "snapdragon-8-gen-2")
    }
    # qemu supports neither the Cortex-A78AE nor the Cortex-X3; these have the same instructions.
    assert names == {
        "rpi4": "cortex-a72",
        "rpi5": "cortex-a76",
        "rpi3": "cortex-a53",
        "jetson-orin-nano": "cortex-a76",
        "snapdragon-8-gen-2": "cortex-a710",
    }
    with pytest.raises(
        InputError, match="target 'x86-64' is x86_64, and qemu-aarch64 emulates aarch64"
    ):
        for_target(found, load_target("x86-64"))


def test_an_aarch64_program_runs_without_the_hosts_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = emulator("onnxruntime")
    monkeypatch.setenv("PYTHONHOME", "/nowhere")
    monkeypatch.setenv("LD_PRELOAD", "/nowhere.so")
    code = "import platform, sys; print(platform.machine(), sys.version_info[0])"
    done = subprocess.run(
        found.command(["python3", "-c", code]),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.stdout.split() == ["aarch64", "3"], done.stderr
    assert found.onnxruntime_library is not None


def test_an_artifact_is_measured_under_emulation(tmp_path: Path) -> None:
    emulator("onnxruntime")
    from bundle_sample import artifact_in

    artifact = artifact_in(tmp_path / "artifact")
    found = measure_emulated(
        {"tiny": artifact},
        MeasureOptions(time_limit_s=0.5, least_rounds=1),
        target="rpi4",
        quiet=True,
    )["tiny"]
    assert found.emulated
    assert (found.target, found.device, found.runtime) == ("rpi4", "qemu-aarch64", "onnxruntime")
    assert (found.environment.architecture, found.environment.cpu_model) == (
        "aarch64",
        "Cortex-A72",
    )
    assert found.environment.cpu_features == ("asimd",)
    assert found.environment.emulator is not None
    assert found.environment.emulator.endswith("(cortex-a72)")
    # The system would report the emulator's memory.
    assert (found.peak_rss_bytes, found.floor_rss_bytes, found.cpu_share) == (None, None, None)
    assert len(found.warnings) == 1
    assert Measurement.model_validate(found.to_dict()) == found


def test_without_emulation_the_error_names_the_command_that_prepares_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VITRIM_EMULATION", str(tmp_path))
    with pytest.raises(
        InputError, match="emulation is not prepared on this machine; run `vitrim targets emulate`"
    ):
        measure_emulated({"tiny": tmp_path / "tiny.onnx"}, MeasureOptions())
    result = CliRunner().invoke(app, ["doctor"])
    assert (
        "emulation: would enable running ARM artifacts without a board (vitrim targets emulate)"
        in result.output
    )
