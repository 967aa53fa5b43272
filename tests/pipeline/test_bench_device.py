"""Runs that measure on a device: its address, its absence, and the loop of a latency there."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from latency_tables import latency_table
from loopback_ssh import Server, free_port, needs_sshd, ssh_server
from photo_folder import write_photos, write_recipe
from vitrim.bench.remote.measure import measure_at
from vitrim.bench.report.model import Report
from vitrim.bench.report.run import load_run, without_address
from vitrim.bench.results.measurement import Measurement
from vitrim.cli import call
from vitrim.core.errors import InputError
from vitrim.pipeline import bench_device, latency_loop
from vitrim.pipeline.bench_device import device_options, measured_steps, require_device
from vitrim.pipeline.latency_table import is_measured, recipe_table, table_mark
from vitrim.pipeline.recipe import Recipe, load_recipe
from vitrim.pipeline.run import fingerprints, prepare, run

QUICK = (
    '[export]\nprecisions = ["fp32"]\n[bench]\ntime_limit_s = 0.3\n[report]\nestimate_for = []\n'
)
LATENCY = ("masks.latency=0.7", "masks.latency_rounds=1", "masks.cost_table=costs.json")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("device")
    write_photos(folder / "photos")
    write_recipe(folder / "tiny.toml", folder / "photos", QUICK, masks_epochs=1)
    latency_table().save(folder / "costs.json")
    latency_table(target="rpi4").save(folder / "rpi4.json")
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with ssh_server(tmp_path_factory.mktemp("sshd")) as running:
        yield running


def recipe_at(place: Path, *sets: str) -> Recipe:
    return load_recipe(place / "tiny.toml", sets)


def on_server(place: Path, server: Server, *sets: str) -> Recipe:
    device = (
        f"bench.on={server.url}",
        f"bench.python={sys.executable}",
        f"bench.ssh_options={json.dumps([shlex.join(server.options)])}",
    )
    return recipe_at(place, *device, *sets)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["bench.on=pi@board"], "on = 'pi@board': not a known kind of address; write host, ssh:"),
        (["bench.on=ssh://pi@"], "not an address; write ssh://user@host or ssh://user@host:port"),
        (["bench.on=ssh://pi:secret@board"], "a password does not belong in an address"),
        (["bench.on=tvm-rpc://tracker"], "write tvm-rpc://tracker:port/key"),
        (["bench.on=qemu-aarch64"], "is emulated, and has no latency"),
        (["bench.python=python3.11"], "python belongs to a device; add on, or leave python out"),
    ],
)
def test_an_invalid_address_is_one_line_with_exit_code_2(
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    sets: list[str],
    message: str,
) -> None:
    options = [word for each in sets for word in ("--set", each)]
    out = tmp_path / "run"
    assert call(["run", str(place / "tiny.toml"), "--out", str(out), *options]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert "secret" not in line.partition("[bench]: ")[2]
    assert not out.exists()


def test_this_machine_changes_no_fingerprint(place: Path) -> None:
    plain = recipe_at(place)
    assert recipe_at(place, "bench.on=host").plain() == plain.plain()
    marks = fingerprints(prepare(plain, quiet=True))
    device = fingerprints(prepare(recipe_at(place, "bench.on=ssh://board"), quiet=True))
    assert [step for step in marks if marks[step] != device[step]] == ["bench"]


@needs_sshd
def test_a_device_that_does_not_respond_is_found_before_training(
    place: Path, tmp_path: Path, server: Server
) -> None:
    gone = f"bench.on=ssh://127.0.0.1:{free_port()}"
    for recipe, message in (
        (recipe_at(place, gone), "no connection"),
        (on_server(place, server, "bench.python=/bin/false"), "has no onnxruntime and numpy"),
        (recipe_at(place, "bench.on=tvm-rpc://tracker/board"), "TVM's boards run TVM artifacts"),
    ):
        with pytest.raises(InputError, match=message):
            run(recipe, tmp_path / "run", quiet=True)
        assert not (tmp_path / "run").exists()
    # A dense training measures nothing.
    require_device(recipe_at(place, gone), "baseline")


def test_only_steps_that_measure_need_the_device(place: Path) -> None:
    plain, latency = recipe_at(place), recipe_at(place, *LATENCY)
    assert measured_steps(plain, "masks") == set()
    assert measured_steps(plain, "report") == {"bench"}
    assert measured_steps(latency, "baseline") == set()
    assert measured_steps(latency, "masks") == {"masks"}
    assert measured_steps(latency, "report") == {"masks", "bench"}


@needs_sshd
def test_a_run_measures_its_artifacts_on_the_device(
    place: Path, tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "run"
    recipe = on_server(place, server, "export.target=host")
    run(recipe, home)
    found = [Measurement.load(file) for file in sorted((home / "measurements").glob("*.json"))]
    assert [(each.name, each.device) for each in found] == [
        ("baseline-fp32", "ssh"),
        ("compact-fp32", "ssh"),
    ]
    assert all(each.total for each in found)
    report = Report.model_validate(json.loads((home / "report.json").read_text()))
    assert report.models["compact"].top1 == found[1].top1
    assert ", over ssh" in (home / "report.md").read_text()
    shown = " ".join(capsys.readouterr().out.split())
    assert "measured on " in shown
    assert ", over ssh" in shown
    # The report has neither the address nor the key; the recipe has, so that a run continues.
    for name in ("report.md", "report.html", "report.json"):
        text = (home / name).read_text()
        assert "127.0.0.1" not in text
        assert str(server.folder) not in text
    assert load_recipe(home / "recipe.toml") == recipe
    assert 'on = "ssh://…"' in (load_run(home).recipe_toml or "")
    study = """set = { "bench.on" = "ssh://pi@board" }\n"bench.python" = '/opt/python'\n"""
    assert without_address(study) == 'set = { "bench.on" = "ssh://…" }\n"bench.python" = "…"\n'
    # What is measured needs no device when the run continues.
    marks = fingerprints(prepare(recipe, quiet=True))
    away = recipe.model_copy(
        update={"bench": recipe.bench.model_copy(update={"on": f"ssh://127.0.0.1:{free_port()}"})}
    )
    require_device(away, "report", home, marks)


@needs_sshd
@pytest.mark.parametrize("method", ["closed-form", "learned"])
def test_a_latency_is_measured_and_corrected_on_the_device(
    place: Path, tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(latency_loop, "TIME_LIMIT_S", 0.2)
    places = list[str]()

    def recorded(address: str, *given: Any, **named: Any) -> dict[str, Measurement]:
        places.append(address)
        return measure_at(address, *given, **named)

    monkeypatch.setattr(bench_device, "measure_at", recorded)
    recipe = on_server(place, server, *LATENCY, f'masks.method="{method}"', "masks.round_to=2")
    run(recipe, tmp_path / "run", until="masks", quiet=True)
    record = json.loads((tmp_path / "run" / "latency.json").read_text())
    assert record["measured_ms"] > 0
    assert set(places) == {server.url}
    assert len(places) >= len(record["rounds"])


def test_a_table_of_a_board_is_measured_where_the_recipe_names_the_board(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    board = (*LATENCY[:2], "masks.cost_table=rpi4.json", "export.target=rpi4")
    here, there = recipe_at(place, *board), recipe_at(place, *board, "bench.on=ssh://board")
    dense = prepare(here, quiet=True).dense.architecture
    assert not is_measured(here, recipe_table(here, dense))
    assert is_measured(there, recipe_table(there, dense))
    assert table_mark(here) != table_mark(there)
    assert device_options(there.bench).python == "python3"
    with pytest.raises(InputError, match=r"is of this machine, not of the device; name"):
        recipe_table(recipe_at(place, "masks.latency=0.7", "bench.on=ssh://board"), dense)
