"""Profiles are complete and have sources; a malformed one is refused with file, line and key.

A model that does not fit a device gets the excess in bytes.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from vitrim.core.errors import InputError
from vitrim.targets import catalog
from vitrim.targets.catalog import list_targets, load_target, present_name
from vitrim.targets.check import check
from vitrim.targets.detect import detect_host, missing_features
from vitrim.targets.instruction_sets import CPU_FEATURES, known_features, x86_tvm_target
from vitrim.targets.profile import TargetProfile

SHIPPED = list_targets()
# Each contains the instruction sets of those before it.
LEVELS = ("x86-64", "x86-64-v3", "x86-64-v4-vnni")
# The demo's model.
PARAMS, PEAK_BYTES = 800_000, 300_000


def test_the_documented_devices_are_shipped() -> None:
    documented = {
        "x86-64",
        "x86-64-v3",
        "x86-64-v4-vnni",
        "cuda",
        "jetson-nano",
        "jetson-orin-nano",
        "rpi-zero-2w",
        "rpi3",
        "rpi4",
        "rpi5",
        "rock5b",
        "imx8m-plus",
    }
    assert documented | {"coral-dev-board", "snapdragon-8-gen-2", "gap8", "stm32h7"} == set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_number_of_a_shipped_profile_has_a_source(name: str) -> None:
    profile = load_target(name)
    assert profile.name == name
    sources = {key: profile.source_of(key) for key in profile.numbers()}
    assert all(
        source and (source.startswith(("http", "measured", "derived: ", "unverified")))
        for source in sources.values()
    ), sources


def test_the_host_is_detected_as_a_complete_profile() -> None:
    host = load_target("host")
    assert host == detect_host()
    assert host.cores >= 1
    assert host.memory.ram_bytes > 2**20
    assert TargetProfile.model_validate_json(host.model_dump_json(by_alias=True)) == host


def test_avx512_rounds_widths_to_sixteen() -> None:
    assert load_target("x86-64-v4-vnni").round_to == 16


def test_the_levels_of_x86_64_contain_each_other() -> None:
    levels = [set(load_target(name).features) for name in LEVELS]
    assert levels[0] < levels[1] < levels[2]
    assert "avx" not in levels[0]
    assert "avx2" in levels[1]
    assert not {"avx512f", "avx512_vnni"} & levels[1]
    assert "avx512_vnni" in levels[2]
    assert [load_target(name).vector.kind for name in LEVELS] == ["sse", "avx2", "avx512"]


def test_an_earlier_name_is_accepted_and_its_present_meaning_printed_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "_reported", set())
    assert load_target("x86-64-avx2").name == "x86-64-v3"
    assert load_target("x86-64-avx2") == load_target("x86-64-v3")
    assert load_target("x86-64-v2").name == load_target("x86-64").name == "x86-64"
    first, second = capsys.readouterr().err.splitlines()
    assert first == "target x86-64-avx2 is named x86-64-v3 now"
    assert "any x86-64-v2 processor" in second
    assert "x86-64-v4-vnni" in second


def test_names_in_files_of_earlier_versions_keep_their_meaning() -> None:
    assert present_name("x86-64") == "x86-64-v4-vnni"
    assert present_name("x86-64-avx2") == "x86-64-v3"
    assert present_name("rpi4") == "rpi4"


@pytest.mark.parametrize("name", LEVELS)
def test_a_host_that_is_taken_for_a_smaller_one_compiles_for_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = load_target(name)
    if lacking := missing_features(profile):
        pytest.skip(f"this processor has no {', '.join(lacking)}")
    monkeypatch.setenv(CPU_FEATURES, " ".join(profile.features))
    host = detect_host()
    assert set(host.features) == set(profile.features)
    assert host.vector == profile.vector
    assert host.tvm_target is not None
    assert profile.tvm_target is not None
    assert host.tvm_target == {"kind": "llvm", "mcpu": profile.tvm_target["mcpu"]}
    above = [other for other in LEVELS if LEVELS.index(other) > LEVELS.index(name)]
    assert all(missing_features(load_target(other)) for other in above)


def test_features_that_the_machine_lacks_cannot_be_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CPU_FEATURES, "")
    assert detect_host().features == ()
    monkeypatch.setenv(CPU_FEATURES, " ".join(known_features()))
    claimed = detect_host().features
    monkeypatch.delenv(CPU_FEATURES)
    assert claimed == detect_host().features


def test_a_core_without_the_whole_of_a_level_gets_its_instruction_sets_by_name() -> None:
    assert x86_tvm_target(["avx2", "fma"]) == {
        "kind": "llvm",
        "mcpu": "x86-64",
        "mattr": ["+avx2", "+fma"],
    }
    v3 = load_target("x86-64-v3").features
    assert x86_tvm_target(v3) == {"kind": "llvm", "mcpu": "haswell"}
    assert x86_tvm_target([*v3, "avx_vnni"]) == {
        "kind": "llvm",
        "mcpu": "haswell",
        "mattr": ["+avxvnni"],
    }


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("rpi-4", "rpi4"),
        ("jetson-orin", "jetson-orin-nano"),
        ("x86_64", "x86-64"),
        ("hots", "host"),
        ("RPI4", "rpi4"),
        ("x86_64-avx2", "x86-64-v3"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_name(wrong: str, nearest: str) -> None:
    with pytest.raises(InputError, match=f"did you mean '{nearest}'"):
        load_target(wrong)


def test_a_name_without_a_near_one_is_refused_with_the_list() -> None:
    with pytest.raises(InputError, match=r"known are .*rpi4"):
        load_target("zzzzzz")


def test_a_missing_file_is_refused_with_the_nearest_file_or_name(tmp_path: Path) -> None:
    path = own(tmp_path, 'name = "rpi4"', 'name = "my-board"')
    with pytest.raises(
        InputError, match=r"mime\.toml: cannot be read .*; did you mean .*mine\.toml"
    ):
        load_target(path.with_name("mime.toml"))
    with pytest.raises(InputError, match=r"did you mean 'rpi4'\?"):
        load_target("./rpi-4.toml")
    with pytest.raises(InputError, match=r"give the path of a target's \.toml file, or a name"):
        load_target("./missing.toml")


def own(tmp_path: Path, old: str, new: str) -> Path:
    text = (
        Path(str(__import__("vitrim.targets", fromlist=["x"]).__path__[0])) / "rpi4.toml"
    ).read_text()
    assert old in text
    path = tmp_path / "mine.toml"
    path.write_text(text.replace(old, new, 1))
    return path


def test_a_users_profile_is_loaded_from_its_path(tmp_path: Path) -> None:
    assert load_target(own(tmp_path, 'name = "rpi4"', 'name = "my-board"')).name == "my-board"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "round_to = 4",
            "round_too = 4",
            r"mine.toml:\d+: round_too: no such key; did you mean 'round_to'\?",
        ),
        (
            "round_to = 4",
            "round_to = 0",
            r"mine.toml:11: round_to: Input should be greater than or equal to 1",
        ),
        (
            "cores = 4",
            'cores = "four"',
            r"mine.toml:\d+: clusters.0.cores: Input should be a valid integer",
        ),
        (
            "cores = 4",
            "core_count = 4",
            r"mine.toml:\d+: clusters.0.core_count: no such key; did you mean 'core'\?",
        ),
        ("cores = 4\n", "", r"mine.toml:\d+: clusters.0.cores: this key is missing"),
        ("[peak]", "[speak]", r"mine.toml:\d+: speak: no such key; did you mean 'peak'\?"),
        (
            "[memory]",
            "[memory]\nflesh_bytes = 5",
            r"mine.toml:\d+: memory.flesh_bytes: no such key; did you mean 'flash_bytes'\?",
        ),
        (
            "memory = ",
            "memorial = ",
            r"mine.toml:\d+: the number memory.l1d_bytes has no source; "
            r"add 'memory' to \[sources\]",
        ),
        ("schema = ", "schema = = ", r"mine.toml: not TOML: .*line 1"),
        (
            '"vitrim.target/1"',
            '"vitrim.target/9"',
            r"mine.toml:1: schema: Input should be 'vitrim.target/1'",
        ),
    ],
)
def test_a_malformed_profile_is_refused_with_file_line_and_key(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_target(own(tmp_path, old, new))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_reported_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.toml: cannot be read"):
        load_target(tmp_path / "absent.toml")


def test_the_demo_fits_a_raspberry_pi() -> None:
    fit = check(load_target("rpi4"), params=PARAMS, peak_activation_bytes=PEAK_BYTES)
    assert fit.fits
    assert (fit.weight_excess_bytes, fit.activation_excess_bytes) == (0, 0)
    assert str(fit).endswith("it fits")


def test_weights_that_do_not_fit_are_reported_with_the_excess() -> None:
    fit = check(load_target("stm32h7"), params=PARAMS, peak_activation_bytes=PEAK_BYTES)
    assert not fit.fits
    assert fit.weight_excess_bytes == 3_200_000 - 2 * 2**20
    assert (
        "weights (fp32): 3.2 MB, but only 2.1 MB flash: 1.1 MB too much, 1.5 times too large"
        in str(fit)
    )
    assert check(
        load_target("stm32h7"), params=PARAMS, peak_activation_bytes=PEAK_BYTES, precision="int8"
    ).fits


def test_activations_that_do_not_fit_are_reported_with_the_excess() -> None:
    fit = check(
        load_target("stm32h7"), params=100_000, peak_activation_bytes=3_700_000, precision="int8"
    )
    assert not fit.fits
    assert (
        "peak activation: 3.7 MB, but only 786 kB usable memory beside the weights: "
        "2.91 MB too much, 4.7 times too large"
    ) in str(fit)
