"""The machine code of a compiled network as object files, before anything links them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import InputError

if TYPE_CHECKING:
    from tvm.relax import VMExecutable

OBJECTS = "objects"


def write_objects(executable: VMExecutable, folder: Path) -> list[Path]:
    """Write `code.o` (the kernels) and `program.o` (what calls them in order, with the small weights). Errors: InputError for targets without objects."""
    folder.mkdir(parents=True, exist_ok=True)
    found: list[Path] = []

    def keep(path: str, objects: list[str], **options: object) -> None:
        for number, name in enumerate(objects):
            if Path(name).suffix != ".o":
                raise InputError("this target's code is C source and no machine code; take a target whose tvm_target is of the kind llvm")
            stem = "program" if "devc" in Path(name).name else f"code{number or ''}"
            shutil.copyfile(name, folder / f"{stem}.o")
            found.append(folder / f"{stem}.o")

    executable.export_library(str(folder / "model.so"), fcompile=keep)
    return found
