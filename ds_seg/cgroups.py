"""The control groups of this process: where Slurm and containers bound what it may take."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

SYSTEM = Path("/")
_QUOTAS = {"": ("cpu.max",), "cpu": ("cpu.cfs_quota_us", "cpu.cfs_period_us")}
"""Files of cgroup v2 and of v1's controller that hold the CPU time of a period, and the period."""
_NONE = float("inf")


def list_groups(system: Path, controllers: Collection[str]) -> Iterator[tuple[str, Path]]:
    """Folders of this process's groups and of those around them; nothing where none can be told.

    Args:
        system: where /proc and /sys are.
        controllers: those of v1 that matter; "" is v2.

    Yields:
        The controller and a folder, which need not be there from inside a container.
    """
    try:
        lines = (system / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, found, path = line.split(":", 2)
        for controller in set(controllers) & set(found.split(",")):
            group = Path(path)
            for folder in (group, *group.parents):
                yield controller, system / "sys/fs/cgroup" / controller / str(folder).lstrip("/")


def count_allowed_cores(system: Path = SYSTEM) -> float:
    """Cores whose time this process's groups may take (`docker run --cpus 4`), infinite without a limit.

    Args:
        system: where /proc and /sys are.
    """
    return min((_read_quota(folder, controller) for controller, folder in list_groups(system, _QUOTAS)), default=_NONE)


def _read_quota(folder: Path, controller: str) -> float:
    try:
        texts = [(folder / name).read_text(encoding="utf-8") for name in _QUOTAS[controller]]
        quota_us, period_us = map(int, " ".join(texts).split())
    except (OSError, ValueError):  # no such group from inside a container, or its limit is "max"
        return _NONE
    return quota_us / period_us if quota_us > 0 else _NONE
