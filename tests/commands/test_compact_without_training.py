"""`vitrim compact --without-training`: from a folder of images, or from a data set of `--data`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import vitrim
from latency_tables import latency_table
from photo_folder import write_photos
from tiny_models import tiny_vit
from typer.testing import CliRunner
from vitrim.cli import app, call
from vitrim.compress.latency.shapes import network_shape
from vitrim.compress.network.count import count_macs, count_params
from vitrim.compress.oneshot.trim import trim_to
from vitrim.pipeline import latency_loop
from vitrim.targets.catalog import FOLDER
from vitrim.targets.cost_table import MeasuredNetwork


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("untrained")
    write_photos(folder / "photos")
    vitrim.save(tiny_vit(depth=3), folder / "model")
    vitrim.save(tiny_vit(depth=3, num_classes=0), folder / "backbone")
    vitrim.save(tiny_vit(depth=3, num_classes=3), folder / "classifier")
    return folder


@pytest.mark.parametrize(
    ("model", "data", "budget"),
    [
        ("model", "images:photos", ["--macs", "0.8"]),
        ("model", "imagefolder:photos", ["--params", "0.7"]),
        ("backbone", "images:photos/train/ant", ["--macs", "0.8"]),
    ],
)
def test_a_budget_is_met_from_images_without_labels(
    place: Path, monkeypatch: pytest.MonkeyPatch, model: str, data: str, budget: list[str]
) -> None:
    monkeypatch.chdir(place)
    out = f"small-{model}-{budget[0].strip('-')}-{len(data)}"
    arguments = ["compact", model, "--without-training", "--data", data, *budget]
    result = CliRunner().invoke(app, [*arguments, "--round-to", "4", "--out", out, "--explain"])
    assert result.exit_code == 0, result.output
    dense, small = vitrim.load(model).architecture, vitrim.load(out).architecture
    count = count_macs if budget[0] == "--macs" else count_params
    exported = dense.model_copy(update={"last_queries": True})
    assert count(small) <= float(budget[1]) * count(exported)
    for words in ("without labels", "cosine to the dense features", "-> ", "ridge"):
        assert words in result.output
    record = json.loads(Path(out, "trim.json").read_text())
    assert record["schema"] == "vitrim.trim/1"
    assert vitrim.StructuredMask.load(Path(out, "mask.safetensors")).note["data"] == data
    assert ("same class" in result.output) == (model == "model")


def _compact(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["compact", *arguments, "--round-to", "4"])
    assert result.exit_code == 0, result.output
    return result.output


def test_few_images_are_reported_and_one_is_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    data = ["--data", "images:photos", "--macs", "0.8"]
    assert "these are few: predicted errors are too low" in _compact("model", *data)
    assert call(["compact", "model", *data, "--samples", "1"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "images:photos: one image, and a cut without training needs 256 or more" in line


def test_labels_give_accuracies_of_answers_and_features(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    data = ["--data", "imagefolder:photos", "--without-training", "--macs", "0.8"]
    shown = _compact("classifier", *data, "--out", "labelled")
    for words in ("top-1", "nearest neighbours", "linear probe", "same class on"):
        assert words in shown
    quality = json.loads(Path("labelled", "trim.json").read_text())["quality"]
    assert set(quality) == {"dense", "compact"}
    assert quality["dense"]["agreement"] == 1.0
    backbone = _compact("backbone", *data)
    assert "nearest neighbours" in backbone
    assert "top-1" not in backbone
    assert "nearest neighbours" not in _compact("classifier", *data, "--check-images", "0")


def test_a_file_size_is_a_budget(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    dense = 4 * count_params(vitrim.load("model").architecture)
    wanted = 0.8 * dense + 15_000  # Names and shapes in the file count, too.
    data = ["--data", "images:photos"]
    _compact("model", *data, "--file-mb", str(wanted / 1e6), "--out", "small-file")
    assert Path("small-file", "model.safetensors").stat().st_size <= wanted


def test_a_latency_by_a_cost_table_is_a_budget(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    table = latency_table()
    table.save("costs.json")
    dense = table.latency_ms(network_shape(vitrim.load("model").architecture))
    data = ["--data", "images:photos", "--cost-table", "costs.json"]
    shown = _compact("model", *data, "--latency-ms", str(0.7 * dense), "--out", "fast")
    assert "by the table of onnxruntime fp32 on host, 1 thread" in shown
    assert "not measured" in shown
    assert table.latency_ms(network_shape(vitrim.load("fast").architecture)) <= 0.7 * dense
    record = json.loads(Path("fast", "trim.json").read_text())["latency"]
    assert record["schema"] == "vitrim.latency/1"
    assert record["met"] is None
    limit = ["--latency-ms", str(0.6 * dense), "--front", "2", "--out", "fronts", "--keep-tokens"]
    assert "latency (ms)" in _compact("model", *data, *limit)
    sizes = json.loads(Path("fronts", "front.json").read_text())["sizes"]
    assert [size["folder"] for size in sizes] == ["", "latency-90", "latency-60"]
    assert sizes[2]["latency_ms"] <= 0.6 * dense
    arguments = ["compact", "model", "--data", "images:photos", "--latency-ms", "1"]
    assert call([*arguments, "--cost-table", "absent.json"]) == 2
    assert "absent.json" in capsys.readouterr().err
    assert call([*arguments, "--cost-table", "costs.json", "--target", "rpi4"]) == 2
    assert "--target rpi4 names another device than costs.json" in capsys.readouterr().err
    assert call([*arguments, "--target", "rpi4", "--verify"]) == 2
    assert "the files are for rpi4, not for this machine" in capsys.readouterr().err
    shown = _compact(*arguments[1:], "--target", "rpi4", "--out", "estimated")
    assert "the latency is an estimate: onnxruntime fp32 on rpi4, 1 thread, estimated:" in shown
    assert "estimated budget 1 ms" in shown
    assert json.loads(Path("estimated", "trim.json").read_text())["latency"]["estimated"]
    arguments = ["compact", "model", *data, "--latency-ms", "1e-5"]
    assert call(arguments) == 2
    assert "the smallest latency that can be reached is" in capsys.readouterr().err


def test_a_table_of_a_device_without_a_profile_is_not_measured_here(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    text = (FOLDER / "rpi4.toml").read_text().replace('name = "rpi4"', 'name = "phone"')
    Path("phone.toml").write_text(text)
    latency_table(target="phone").save("phone.json")
    dense = latency_table().latency_ms(network_shape(vitrim.load("model").architecture))
    arguments = ["compact", "model", "--data", "images:photos", "--cost-table", "phone.json"]
    arguments += ["--latency-ms", str(0.7 * dense)]
    shown = _compact(*arguments[1:], "--target", "phone.toml")
    assert "by the table of onnxruntime fp32 on phone, 1 thread" in shown
    for more, message in (
        (["--verify"], "--verify: the cost table is of phone, which is no name of `vitrim targets"),
        (["--verify", "--verify-on", "ssh://phone"], "give its profile with --target FILE.toml"),
        (["--verify", "--target", "phone.toml"], "the files are for phone, not for this machine"),
        (
            ["--verify", "--target", "phone.toml", "--verify-on", "pi@phone"],
            "--on 'pi@phone': not a known kind of address; write host, ssh://user@host",
        ),
        (["--target", "rpi4"], "--target rpi4 names another device than phone.json, which is of"),
    ):
        assert call([*arguments, *more]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert message in line


def test_costs_are_extrapolated_only_to_a_cut_that_is_measured(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(latency_loop, "TIME_LIMIT_S", 0.3)
    shape = network_shape(vitrim.load("model").architecture)
    small = shape.model_copy(update={"embed": shape.embed // 2})
    table = latency_table(points=[MeasuredNetwork(network=small, latency_ms=1.0)])
    table.save("small.json")
    arguments = ["model", "--data", "images:photos", "--cost-table", "small.json"]
    arguments += ["--latency-ms", str(0.8 * table.latency_ms(shape))]
    assert call(["compact", *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"--cost-table small.json extrapolates to {shape.embed} channels of the stream" in line
    assert line.endswith("--like MODEL`, or measure the cut with --verify")
    shown = _compact(*arguments, "--verify")
    assert "--like MODEL`; the cut is measured" in shown
    assert "ms by the table, measured" in shown


def test_a_measured_latency_is_recorded(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(latency_loop, "TIME_LIMIT_S", 0.3)
    latency_table().save("costs.json")
    dense = latency_table().latency_ms(network_shape(vitrim.load("model").architecture))
    shown = _compact(
        *("model", "--data", "images:photos", "--cost-table", "costs.json", "--verify"),
        *("--latency-ms", str(0.8 * dense), "--candidates", "1", "--file-mb", "1"),
        *("--out", "measured"),
    )
    assert "ms by the table, measured" in shown
    record = json.loads(Path("measured", "trim.json").read_text())["latency"]
    assert 1 <= len(record["rounds"]) <= 3
    assert record["met"] == (record["measured_ms"] <= 0.8 * dense)


def test_a_front_has_a_folder_a_size_and_one_table(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    data = ["--data", "imagefolder:photos", "--without-training", "--params", "0.6"]
    shown = _compact("classifier", *data, "--front", "3", "--out", "sizes")
    record = json.loads(Path("sizes", "front.json").read_text())
    assert [size["folder"] for size in record["sizes"]] == [
        "",
        "params-90",
        "params-75",
        "params-60",
    ]
    params = [size["params"] for size in record["sizes"]]
    assert params == sorted(params, reverse=True)
    for size in record["sizes"][1:]:
        assert size["params"] <= size["share"] * params[0]
        folder = Path("sizes", size["folder"])
        assert count_params(vitrim.load(folder).architecture) == size["params"]
        assert (folder / "mask.safetensors").is_file()
    assert "nearest neighbours" in Path("sizes", "front.md").read_text()
    assert "params-75" in shown
    assert Path("sizes", "front.svg").read_text().startswith("<svg")
    assert not Path("sizes.partial").exists()
    # Replaced only where vitrim wrote everything.
    arguments = ["compact", "classifier", *data, "--front", "2", "--out", "sizes"]
    assert call(arguments) == 2
    Path("sizes", "mine.txt").touch()
    assert call([*arguments, "--overwrite"]) == 2
    Path("sizes", "mine.txt").unlink()
    assert call([*arguments, "--round-to", "4", "--overwrite"]) == 0
    assert not Path("sizes", "params-75").exists()


def test_an_interrupted_front_continues_without_a_second_pass(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    data = ["--data", "images:photos", "--without-training", "--macs", "0.7", "--round-to", "4"]
    arguments = ["compact", "model", *data, "--front", "3", "--out", "front"]
    assert call([*arguments[:-1], "whole"]) == 0

    def killed(*given: object, **options: object) -> None:
        raise KeyboardInterrupt

    cuts: list[float] = []

    def counted(*given: object, budget: float, **options: object) -> object:
        cuts.append(budget)
        if len(cuts) == 2:
            raise KeyboardInterrupt
        return trim_to(*given, budget=budget, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr("vitrim.compress.oneshot.trim.trim_to", counted)
        assert call(arguments) == 130
    assert Path("front", "macs-90").is_dir()
    assert Path("front.partial", "state.json").is_file()
    capsys.readouterr()
    assert call(arguments) == 2
    assert "--resume continues it" in capsys.readouterr().err.replace("\n", " ")
    with monkeypatch.context() as patch:
        patch.setattr("vitrim.compress.oneshot.prediction.stream_weights", killed)
        assert call([*arguments, "--resume"]) == 0
    assert not Path("front.partial").exists()
    whole, resumed = (
        json.loads(Path(name, "front.json").read_text())["sizes"] for name in ("whole", "front")
    )
    assert resumed == whole


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--without-training"], "needs one budget: --macs or --params"),
        (["--without-training", "--macs", "0.5", "--params", "0.5"], "needs one budget"),
        (["--without-training", "--macs", "1.5"], "--macs 1.5: give the share to keep"),
        (["--without-training", "--macs", "0.5"], "--without-training needs images"),
        (["--macs", "0.5"], "--without-training needs images"),
        (["--macs", "0.5", "--mask", "m"], "both select what is kept"),
        (["--resume"], "--resume belongs to --without-training"),
        (["--cost-table", "t.json"], "--cost-table belongs to --without-training"),
        (["--without-training", "--front", "1"], "--front 1: give 2 to 50 sizes"),
        (["--without-training", "--front", "4", "--macs", "0.95"], "between 0 and 0.9"),
        (["--without-training", "--file-mb", "0"], "--file-mb 0: give a number above 0"),
        (["--macs", "0.5", "--cost-table", "t.json"], "--cost-table belongs to --latency-ms"),
        (["--macs", "0.5", "--target", "rpi4"], "--target belongs to --latency-ms"),
        (["--latency-ms", "3", "--energy-mj", "0"], "--energy-mj 0: give a number above 0"),
        (
            ["--without-training", "--file-mb", "1", "--file-precision", "int4"],
            "--file-precision int4: choose fp32, fp16 or int8",
        ),
        (["--without-training", "--macs", "0.5", "--keep-ratio", "0.5"], "keep one"),
        (
            ["--without-training", "--macs", "0.01", "--data", "images:photos"],
            "--macs 0.01: the stem and the head",
        ),
        (["--without-training", "--macs", "0.5", "--data", "images:absent"], "no such folder"),
        (["--without-training", "--macs", "0.5", "--data", "images:model"], "no images in it"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(place)
    assert call(["compact", "model", *arguments, "--out", "refused"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert words in lines[0]
    assert not Path("refused").exists()
