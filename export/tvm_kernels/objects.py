"""The machine code of a compiled network: object files, and the library of an execution plan."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from ...core.errors import InputError
from ...targets.instruction_sets import HEADER
from ..runtimes.runtime import Role
from .execution_plan import ExecutionPlan
from .link import Linker
from .network_source import write_source

if TYPE_CHECKING:
    from tvm.relax import VMExecutable
    from tvm.target import Target

OBJECTS = "objects"
# The hand-written part of a compiled network, which a bundle contains too.
HEADERS = (Path(__file__).resolve().parents[1] / "bundle_sources" / "tvm", HEADER.parent)


def write_objects(executable: VMExecutable, folder: Path) -> list[Path]:
    """Write the object files of an executable for the virtual machine.

    Returns:
        `code.o`, the kernels, and `program.o`, the executable with the small weights.

    Raises:
        InputError: The target's code is not machine code.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found: list[Path] = []

    def keep(path: str, objects: list[str], **options: object) -> None:
        for number, name in enumerate(objects):
            if Path(name).suffix != ".o":
                raise InputError(
                    "this target's code is C source, not machine code; "
                    "use a target whose tvm_target is of the kind llvm"
                )
            stem = "program" if "devc" in Path(name).name else f"code{number or ''}"
            shutil.copyfile(name, folder / f"{stem}.o")
            found.append(folder / f"{stem}.o")

    executable.export_library(str(folder / "model.so"), fcompile=keep)
    return found


def write_library(
    plan: ExecutionPlan,
    target: Target,
    linker: Linker,
    path: Path,
    *,
    keep_objects: bool,
) -> list[tuple[str, Role]]:
    """Compile an execution plan into a shared library.

    Args:
        plan: The plan.
        target: TVM's target.
        linker: A linker for the target.
        path: The library.
        keep_objects: Keep the object files, for linking them into a program, in `objects/` beside
            the library.

    Returns:
        (path, role) of the kept files, relative to the library's folder.

    Raises:
        InputError: The compiler failed.
    """
    from .program import compile_kernels

    objects = path.parent / OBJECTS
    objects.mkdir(parents=True, exist_ok=True)
    code = objects / "code.o"
    compile_kernels(plan.kernels, target).write_to_file(str(code))
    source, constants = write_source(plan, objects)
    linker.link_program(source, [code], HEADERS, path)
    if not keep_objects:
        shutil.rmtree(objects)
        return []
    rows: list[tuple[Path, Role]] = [
        (code, "other"),
        (constants, "other"),
        (source, "source"),
    ]
    return [(file.relative_to(path.parent).as_posix(), role) for file, role in rows]
