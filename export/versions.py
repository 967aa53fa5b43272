"""Versions of the tools that made an artifact."""

from __future__ import annotations

from importlib import metadata


def tool_versions(*names: str) -> dict[str, str]:
    """Versions of installed packages by name; those that are absent are left out."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
