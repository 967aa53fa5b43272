"""Output files and folders: what is replaced, what is refused, and what a kill leaves behind."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from source_tree import ROOT
from vitrim.core import staging
from vitrim.core.errors import InputError
from vitrim.core.storage import (
    clear_folder,
    replace_file,
    replace_folder,
    require_output_file,
    require_output_folder,
    require_separate,
)
from vitrim.core.written_kinds import Contents, FolderKind, has_schema, json_kind, json_object

NOTE = json_kind("a note", "vitrim.note/1")
MARKER = "box.json"


def box_contents(folder: Path) -> Contents | None:
    if not has_schema(json_object(folder / MARKER), "vitrim.box/1"):
        return None
    return {MARKER: None, "data.bin": None, "part/*.txt": None, "notes/*.json": NOTE}


BOX = FolderKind("a box", MARKER, box_contents)


def fill(folder: Path, text: str = "new", *names: str) -> None:
    (folder / MARKER).write_text(json.dumps({"schema": "vitrim.box/1", "text": text}))
    for name in names or ("data.bin",):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


def write(folder: Path | str, text: str = "new", *names: str, overwrite: bool = True) -> None:
    with replace_folder(folder, BOX, overwrite=overwrite) as aside:
        fill(aside, text, *names)


def text_of(folder: Path) -> str:
    return str(json.loads((folder / MARKER).read_text())["text"])


def tree(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def refused(folder: Path | str, **options: Any) -> str:
    with pytest.raises(InputError) as error:
        write(folder, "new", **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- what is replaced ----


def test_a_new_folder_with_its_parents(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b" / "box")
    assert tree(tmp_path) == ["a", "a/b", "a/b/box", f"a/b/box/{MARKER}", "a/b/box/data.bin"]


def test_a_folder_of_the_same_kind_is_replaced_only_with_overwrite(tmp_path: Path) -> None:
    write(tmp_path / "box", "old", "data.bin", "part/1.txt", "part/2.txt")
    line = refused(tmp_path / "box", overwrite=False)
    assert line.endswith("is not empty; name another one, or pass --overwrite to replace it")
    write(tmp_path / "box", "new", "part/2.txt")
    assert tree(tmp_path) == ["box", f"box/{MARKER}", "box/part", "box/part/2.txt"]
    assert (tmp_path / "box" / "part" / "2.txt").read_text() == "new"


@pytest.mark.parametrize(
    "content",
    [None, "{}", "[1]", "not json", '{"schema": "vitrim.other/1"}', '{"schema": 5}', "{" * 100_000],
)
def test_a_folder_that_vitrim_did_not_write_is_never_replaced(
    tmp_path: Path, content: str | None
) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("precious")
    if content is not None:
        (tmp_path / "work" / MARKER).write_text(content)
    before = tree(tmp_path)
    for overwrite in (False, True):
        line = refused(tmp_path / "work", overwrite=overwrite)
        assert "is not a box that vitrim wrote" in line
        assert "--overwrite" not in line
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "name",
    ["thesis.txt", ".hidden", "part/notes.md", "deep/er/file", "notes/1.json", "part2/1.txt"],
)
def test_a_folder_with_a_file_of_somebody_else_is_not_replaced(tmp_path: Path, name: str) -> None:
    write(tmp_path / "box", "old")
    (tmp_path / "box" / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "box" / name).write_text("precious")
    line = refused(tmp_path / "box")
    assert f"vitrim did not write {name} in this folder" in line
    assert "move that file elsewhere, or name another folder" in line
    assert (tmp_path / "box" / name).read_text() == "precious"
    assert text_of(tmp_path / "box") == "old"


def test_a_link_in_a_folder_counts_as_a_file_of_somebody_else(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.txt").write_text("precious")
    for name, target in (("part", "photos"), ("data.bin", "photos/1.txt")):
        write(tmp_path / name / "box", "old", "notes.x")
        (tmp_path / name / "box" / "notes.x").unlink()
        (tmp_path / name / "box" / name).symlink_to(tmp_path / target)
        assert f"did not write {name} " in refused(tmp_path / name / "box")
    assert (tmp_path / "photos" / "1.txt").read_text() == "precious"


def test_files_of_the_system_do_not_matter(tmp_path: Path) -> None:
    for name in (".DS_Store", "Thumbs.db"):
        (tmp_path / "box").mkdir(exist_ok=True)
        (tmp_path / "box" / name).write_text("")
        write(tmp_path / "box", overwrite=name != ".DS_Store")
    (tmp_path / "volume" / "lost+found").mkdir(parents=True)
    write(tmp_path / "volume", overwrite=False)
    assert (tmp_path / "volume" / "lost+found").is_dir()


def test_a_file_that_appears_during_the_work_is_kept(tmp_path: Path) -> None:
    write(tmp_path / "box", "old")
    with pytest.raises(InputError, match=r"vitrim did not write thesis\.txt"):
        with replace_folder(tmp_path / "box", BOX, overwrite=True) as aside:
            fill(aside)
            (tmp_path / "box" / "thesis.txt").write_text("precious")
    assert tree(tmp_path) == ["box", f"box/{MARKER}", "box/data.bin", "box/thesis.txt"]
    assert text_of(tmp_path / "box") == "old"


def test_without_a_kind_nothing_is_replaced(tmp_path: Path) -> None:
    write(tmp_path / "box")
    with pytest.raises(InputError, match="not empty"), replace_folder(tmp_path / "box"):
        pass


def test_a_single_file_is_replaced_only_by_its_kind(tmp_path: Path) -> None:
    path = tmp_path / "note.json"
    note = json.dumps({"schema": "vitrim.note/1"})
    replace_file(path, note, NOTE)
    replace_file(path, note, NOTE)
    with pytest.raises(InputError, match="exists already; --overwrite replaces it"):
        require_output_file(path, NOTE)
    path.write_text("precious")
    with pytest.raises(InputError, match=r"note\.json: vitrim did not write .* not a note"):
        replace_file(path, note, NOTE)
    assert path.read_text() == "precious"


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_a_file_is_not_written_over_a_folder_or_a_device(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    make(tmp_path / "place")
    with pytest.raises(InputError, match=r"name a file|not a regular file"):
        replace_file(tmp_path / "place", "text")
    with pytest.raises(InputError, match="not a regular file"):
        replace_file("/dev/null", "text")


def test_a_file_behind_a_link_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("real.txt")
    replace_file(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"


def test_clearing_deletes_the_marker_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, "old", "a.bin", "z.bin")
    deleted: list[str] = []
    monkeypatch.setattr("vitrim.core.storage.delete", lambda path: deleted.append(path.name))
    clear_folder(tmp_path, MARKER)
    assert deleted == ["a.bin", "z.bin", MARKER]


# ---- what is read ----


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "project" / "model").mkdir(parents=True)
    (tmp_path / "project" / "model" / "weights").write_text("precious")
    return tmp_path / "project" / "model"


@pytest.mark.parametrize(
    ("output", "relation"),
    [
        ("project/model", "is"),
        ("project/../project/model", "is"),
        ("link", "is"),
        ("project", "contains"),
        ("link-to-project", "contains"),
        ("project/model/small", "lies in"),
        ("project/model/small/er", "lies in"),
        ("link/small", "lies in"),
    ],
)
def test_an_output_does_not_overlap_an_input(
    tmp_path: Path, model: Path, output: str, relation: str
) -> None:
    (tmp_path / "link").symlink_to(model)
    (tmp_path / "link-to-project").symlink_to(model.parent)
    place = f"{tmp_path}/{output}"
    for read in (model, tmp_path / "link"):
        expected = f"{place}: the output {relation} the model that is read ({read}); "
        with pytest.raises(InputError) as error:
            require_output_folder(place, BOX, overwrite=True, inputs={"the model": read})
        assert str(error.value).startswith(expected)


def test_a_file_that_is_read_is_protected_like_a_folder(tmp_path: Path, model: Path) -> None:
    weights = model / "weights"
    for output, relation in ((weights, "is"), (model, "contains")):
        with pytest.raises(InputError, match=f"the output {relation} the mask that is read"):
            require_separate(output, {"the mask": weights})
    with pytest.raises(InputError, match="the output is the mask"):
        require_output_file(weights, inputs={"the mask": weights})


def test_an_output_beside_the_inputs_is_fine(tmp_path: Path, model: Path) -> None:
    inputs = {"the model": model, "the mask": None, "the recipe": tmp_path / "absent.toml"}
    for output in ("project/small", "project/model2", "modelled", "a/b"):
        require_separate(tmp_path / output, inputs)


def test_a_missing_output_may_be_an_input_of_the_next_step(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the output lies in the artifact"):
        require_separate(tmp_path / "a" / "bundle", {"the artifact": tmp_path / "a"})


# ---- where it is written ----


def mounts(*arguments: str) -> bool:
    done = subprocess.run(["mount", *arguments], capture_output=True, check=False)
    return done.returncode == 0


@pytest.fixture(params=["cwd", "cwd-parent", "link", "tmpfs", "bind", "locked-parent", "plain"])
def place(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path | str]:
    """An existing empty folder, some of which cannot be renamed."""
    folder = tmp_path / "parent" / "place"
    folder.mkdir(parents=True)
    mounted = False
    given: Path | str = folder
    if request.param == "cwd":
        monkeypatch.chdir(folder)
        given = "."
    elif request.param == "cwd-parent":
        (folder / "lost+found").mkdir()
        monkeypatch.chdir(folder / "lost+found")
        given = ".."
    elif request.param == "link":
        (tmp_path / "link").symlink_to(folder)
        given = tmp_path / "link"
    elif request.param == "tmpfs":
        mounted = mounts("-t", "tmpfs", "none", str(folder))
    elif request.param == "bind":
        (tmp_path / "elsewhere").mkdir()
        mounted = mounts("--bind", str(tmp_path / "elsewhere"), str(folder))
    elif request.param == "locked-parent":
        folder.parent.chmod(0o555)
    if request.param in ("tmpfs", "bind") and not mounted:
        pytest.skip("no permission to mount")
    yield given
    folder.parent.chmod(0o755)
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_an_existing_folder_is_written_in_place(place: Path | str, tmp_path: Path) -> None:
    folder = tmp_path / "parent" / "place"
    before = folder.stat().st_ino
    write(place, "old", "data.bin", "part/1.txt", overwrite=False)
    assert text_of(folder) == "old"
    with pytest.raises(InputError, match="pass --overwrite"):
        write(place, overwrite=False)
    write(place, "new", "part/2.txt")
    assert text_of(folder) == "new"
    assert [name for name in tree(folder) if name != "lost+found"] == [
        MARKER,
        "part",
        "part/2.txt",
    ]
    assert folder.stat().st_ino == before
    assert os.listdir(folder.parent) == ["place"]
    # An error leaves the old content and nothing else.
    with pytest.raises(ZeroDivisionError):
        with replace_folder(place, BOX, overwrite=True) as aside:
            (aside / "half").write_text("")
            raise ZeroDivisionError
    assert text_of(folder) == "new"
    assert sorted(os.listdir(folder.parent)) == ["place"]
    assert "half" not in os.listdir(folder)
    assert not any(map(staging.is_staging, os.listdir(folder)))


def test_a_link_to_a_missing_folder_creates_it(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link")
    assert text_of(tmp_path / "real") == "new"
    assert (tmp_path / "link").is_symlink()


def test_a_file_in_the_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    for name in ("file", "file/x", "file/x/y"):
        line = refused(tmp_path / name)
        assert line == (
            f"{tmp_path / 'file'}: a file is in the way of the output folder; name another folder"
        )
        if name != "file":
            with pytest.raises(InputError, match="a file is in the way"):
                replace_file(tmp_path / name, "text")


@pytest.mark.parametrize("length", [240, 255])
def test_the_longest_names_of_a_file_system(tmp_path: Path, length: int) -> None:
    write(tmp_path / ("a" * length), "old")
    write(tmp_path / ("a" * length), "new")
    replace_file(tmp_path / ("b" * length), "text")
    assert sorted(os.listdir(tmp_path)) == ["a" * length, "b" * length]


@pytest.mark.parametrize("name", ["a" * 256, "é" * 130, "a/" * 3000, "x/" + "a" * 300])
def test_a_name_that_is_too_long(tmp_path: Path, name: str) -> None:
    assert "File name too long" in refused(tmp_path / name)
    with pytest.raises(InputError, match="File name too long"):
        replace_file(tmp_path / name, "text")
    assert tree(tmp_path) == []


def test_a_circle_of_links_and_a_zero_byte(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert "symbolic links" in refused(tmp_path / "a")
    assert "not the name of a file" in refused(f"{tmp_path}/a\0b")


def test_a_read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Permissions do not hold for root, which runs the tests in containers.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    line = refused(tmp_path / "new" / "box")
    assert f"cannot be written to ({tmp_path} is read-only, or you have no permission)" in line
    with pytest.raises(InputError, match="cannot be written to"):
        replace_file(tmp_path / "note.json", "text")
    assert tree(tmp_path) == []


def test_a_read_only_file_system(tmp_path: Path) -> None:
    if not mounts("-t", "tmpfs", "-o", "ro", "none", str(tmp_path)):
        pytest.skip("no permission to mount")
    try:
        assert "cannot be written to" in refused(tmp_path / "box")
        assert "cannot be written to" in refused(tmp_path)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_no_file_and_no_parent(tmp_path: Path, code: int) -> None:
    with pytest.raises(InputError, match="no space left on the disk"):
        with replace_folder(tmp_path / "a" / "b" / "box", BOX) as aside:
            fill(aside)
            raise OSError(code, os.strerror(code))
    assert tree(tmp_path) == []


def test_a_really_full_disk(tmp_path: Path) -> None:
    if not mounts("-t", "tmpfs", "-o", "size=64k", "none", str(tmp_path)):
        pytest.skip("no permission to mount")
    try:
        write(tmp_path / "box", "old")
        for place in (tmp_path / "box", tmp_path / "other"):
            with pytest.raises(InputError, match="no space left"):
                with replace_folder(place, BOX, overwrite=True) as aside:
                    (aside / "data.bin").write_bytes(b"x" * 200_000)
        with pytest.raises(InputError, match="no space left"):
            replace_file(tmp_path / "note.json", b"x" * 200_000)
        assert os.listdir(tmp_path) == ["box"]
        assert text_of(tmp_path / "box") == "old"
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_an_error_of_another_file_is_not_reported_as_one_of_the_output(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), replace_folder(tmp_path / "out" / "box", BOX):
        raise PermissionError(errno.EACCES, "Permission denied", "/usr/bin/compiler")


# ---- kills ----

KILLED = """
import os, sys
sys.path.insert(0, {tests!r})
from core.test_storage import write
from pathlib import Path

kill_at, calls = {kill_at}, 0
def counted(function):
    def call(*arguments, **options):
        global calls
        if calls == kill_at:
            os.kill(os.getpid(), 9)
        calls += 1
        return function(*arguments, **options)
    return call
for name in ("rename", "replace", "unlink", "rmdir", "mkdir", "remove"):
    setattr(os, name, counted(getattr(os, name)))
write({folder!r}, "new", "data.bin", "part/2.txt")
print("survived")
"""


def killed(folder: Path, kill_at: int) -> bool:
    """Replace the folder in a process that kills itself before a change of the disk."""
    code = KILLED.format(tests=str(ROOT / "tests"), kill_at=kill_at, folder=str(folder))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, check=False
    )
    assert "survived" in done.stdout or done.returncode == -9, done.stderr
    return "survived" not in done.stdout


@pytest.mark.parametrize("before", ["absent", "empty", "full"])
def test_a_kill_at_any_moment_leaves_the_old_or_the_new_content(
    tmp_path: Path, before: str
) -> None:
    outcomes = set()
    for kill_at in range(40):
        folder = tmp_path / str(kill_at) / "box"
        folder.parent.mkdir()
        if before == "empty":
            folder.mkdir()
        elif before == "full":
            write(folder, "old", "data.bin", "part/1.txt", "part/2.txt")
        if not killed(folder, kill_at):
            break
        staging.recover(folder)
        left = tree(folder.parent)
        if before == "full":
            outcomes.add(text_of(folder))
            assert (folder / "data.bin").read_text() == text_of(folder)
            assert (folder / "part" / "1.txt").exists() == (text_of(folder) == "old")
        elif before == "empty":
            outcomes.add("new" if (folder / MARKER).exists() else "old")
        assert not any(staging.is_staging(Path(name).name) for name in left), left
        write(folder, "third")
        assert tree(folder.parent) == ["box", f"box/{MARKER}", "box/data.bin"]
    assert kill_at > 4
    if before != "absent":
        assert outcomes == {"old", "new"}


def test_the_next_write_recovers(tmp_path: Path) -> None:
    write(tmp_path / "box", "old", "data.bin", "part/1.txt")
    assert killed(tmp_path / "box", 6)
    assert any(map(staging.is_staging, os.listdir(tmp_path)))
    with pytest.raises(InputError, match="pass --overwrite"):
        require_output_folder(tmp_path / "box", BOX)
    assert os.listdir(tmp_path) == ["box"]


def test_a_write_in_progress_is_not_disturbed(tmp_path: Path) -> None:
    with replace_folder(tmp_path / "box", BOX) as first:
        fill(first, "first")
        staging.recover(tmp_path / "box")
        staging.recover_all(tmp_path)
        assert (first / MARKER).is_file()
    assert text_of(tmp_path / "box") == "first"


def test_the_slower_of_two_writers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not empty"):
        with replace_folder(tmp_path / "box", BOX) as one:
            fill(one, "one")
            write(tmp_path / "box", "two", overwrite=False)
    assert text_of(tmp_path / "box") == "two"
    assert os.listdir(tmp_path) == ["box"]


def test_hidden_folders_of_others_are_never_deleted(tmp_path: Path) -> None:
    names = [".box.settings", ".box.vitrim-new-", ".box.old.abcdefgh", ".git", ".box2.vitrim-x"]
    for name in names:
        (tmp_path / name).mkdir()
    write(tmp_path / "box")
    staging.recover_all(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([*names, "box"])


def test_a_temporary_file_of_a_killed_process_is_deleted(tmp_path: Path) -> None:
    (tmp_path / ".note.json.vitrim-file-abcdefgh").write_text("half")
    replace_file(tmp_path / "note.json", "text")
    assert os.listdir(tmp_path) == ["note.json"]
