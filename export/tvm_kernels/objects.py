"""The machine code of a compiled network as object files, before anything links them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from ...core.errors import InputError
from ..runtimes.runtime import Role
from .compiled_program import Program
from .link import Linker
from .network_source import write_network

if TYPE_CHECKING:
    from tvm.relax import VMExecutable
    from tvm.target import Target

OBJECTS = "objects"
# The hand-written part of a compiled network; the bundle ships the same.
HEADERS = Path(__file__).resolve().parents[1] / "bundle_sources" / "tvm"


def write_objects(executable: VMExecutable, folder: Path) -> list[Path]:
    """Write `code.o` (the kernels) and `program.o` (what calls them in order, with the small
    weights). Errors: InputError for targets without objects.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found: list[Path] = []

    def keep(path: str, objects: list[str], **options: object) -> None:
        for number, name in enumerate(objects):
            if Path(name).suffix != ".o":
                raise InputError(
                    "this target's code is C source and no machine code; take a target whose tvm_target is of the kind llvm"
                )
            stem = "program" if "devc" in Path(name).name else f"code{number or ''}"
            shutil.copyfile(name, folder / f"{stem}.o")
            found.append(folder / f"{stem}.o")

    executable.export_library(str(folder / "model.so"), fcompile=keep)
    return found


def write_program(
    program: Program, target: Target, linker: Linker, folder: Path, name: str, *, keep: bool
) -> list[tuple[str, Role]]:
    """Compile a straight program into the library `name`; with `keep` its parts stay in `objects/`,
    for linking them into a program. Errors: InputError.
    """
    import tvm

    parts = folder / OBJECTS
    parts.mkdir(parents=True, exist_ok=True)
    code = parts / "code.o"
    tvm.tirx.build(program.kernels, target=target).write_to_file(str(code))
    source, constants = write_network(program, parts)
    linker.program(source, [code], HEADERS, folder / name)
    if not keep:
        shutil.rmtree(parts)
        return []
    rows: list[tuple[Path, Role]] = [(code, "other"), (constants, "other"), (source, "source")]
    return [(path.relative_to(folder).as_posix(), role) for path, role in rows]
