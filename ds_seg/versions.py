"""Versions of packages, as a record of what a run was made with."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version


def find_versions(packages: Iterable[str]) -> dict[str, str]:
    """The version of each package that pip knows, and `not installed` for the others."""
    return {name: _find_version(name) for name in packages}


def _find_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
