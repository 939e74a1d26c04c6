"""Disks that are full or read-only, for real: a small tmpfs, and a bind mount of a folder onto itself.

Both need the right to mount (root, as in most containers for tests); where there is none the test is skipped.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def small_disk(folder: Path, size_mib: float) -> Iterator[Path]:
    """An empty file system of so many MiB at `folder`; processes started within may fill it up."""
    folder.mkdir(parents=True, exist_ok=True)
    with _mounted(folder, "-t", "tmpfs", "-o", f"size={int(size_mib * 1024)}k", "tmpfs"):
        yield folder


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[Path]:
    """A folder that nobody may write into, root included."""
    with _mounted(folder, "--bind", str(folder)):
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
        yield folder


def fill(disk: Path, *, leave_bytes: int = 0) -> Path:
    """Write a file that leaves so many bytes of a small disk free; remove it to have them back."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        file.write(bytes(max(free_bytes(disk) - leave_bytes, 0)))
    return ballast


def free_bytes(disk: Path) -> int:
    """What can still be written."""
    stats = os.statvfs(disk)
    return stats.f_bavail * stats.f_frsize


@contextlib.contextmanager
def _mounted(folder: Path, *arguments: str) -> Iterator[None]:
    try:
        done = subprocess.run(["mount", *arguments, str(folder)], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no `mount` here")
    if done.returncode:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
