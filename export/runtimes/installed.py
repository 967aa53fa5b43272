"""Whether a runtime's packages are here, and the line that says how to get them."""

from __future__ import annotations

import importlib.util


def lacking(runtime: str, extra: str, *modules: str) -> str | None:
    """Why a runtime cannot be used: the first of its modules that cannot be imported, and what to
    install; None where all are there.
    """
    for module in modules:
        try:
            if importlib.util.find_spec(module) is not None:
                continue
        except (ImportError, ValueError):
            pass
        return f"runtime {runtime!r}: {module} is not installed; install it with `pip install 'vitrim[{extra}]'`"
    return None
