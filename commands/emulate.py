"""`vitrim targets emulate`: prepare the running of aarch64 artifacts on this machine."""

from __future__ import annotations

import sys
from typing import Annotated

import typer


def emulate(
    runtime: Annotated[
        list[str] | None,
        typer.Option(
            "--runtime",
            help="An aarch64 runtime to have in it: onnxruntime (the default) or tvm; may be given again.",
        ),
    ] = None,
) -> None:
    """Prepare the running of aarch64 artifacts on this machine: qemu, an arm64 user land with
    python3, and the runtimes' wheels.

    Takes half a minute and 200 MB of the user's cache folder (VITRIM_EMULATION names another
    place). What is there already is kept. Emulated runs prove outputs and top-1; their times are
    never a device's.

    [bold]Example[/bold]

      vitrim targets emulate
    """
    from ..bench.emulation import prepare
    from ..bench.local.progress import step_lines

    found = prepare(step_lines(sys.stderr), runtimes=runtime or ["onnxruntime"])
    parts = ", ".join(
        f"{name} {version}" for name, version in found.versions.items() if name != "qemu"
    )
    typer.echo(f"ready: {found.name} with {parts}")
