"""Where the time goes inside a model: one row an operator, from the runtime's own profiler in a
process of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...core.errors import InputError
from ...export.artifact import Artifact
from .conductor import RunnerProcess, ConductorError
from .measure import make_plan
from ..results.operator_table import OperatorRow, OperatorTable, operator_rows
from .options import CPU

__all__ = ["OperatorRow", "OperatorTable", "profile_operators"]


def profile_operators(
    artifact: Artifact | Path | str,
    threads: int = 1,
    *,
    runs: int = 20,
    batch: int | None = None,
    providers: Sequence[str] = (CPU,),
) -> OperatorTable:
    """Profile `runs` inferences after two warm ones. Errors: InputError, one line, for a bad
    artifact or a runner that failed.
    """
    if runs < 1:
        raise InputError(f"runs = {runs}: at least 1 is wanted")
    plan, _ = make_plan(
        {"model": artifact}, threads=threads, batch=batch, providers=tuple(providers)
    )
    try:
        child = RunnerProcess("model", plan["jobs"]["model"], 300.0)
        try:
            told = child.request("profile", count=runs)
        finally:
            child.close()
    except ConductorError as error:
        raise InputError(str(error)) from None
    return OperatorTable(operator_rows(told["rows"]), runs)
