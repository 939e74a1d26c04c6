"""Memory that the processes of a host may still take: of the machine, or of what Slurm or a container allows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

from ds_seg.cgroups import SYSTEM, list_groups

_NAMES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""Files of cgroup v2 and of v1's controller: limit, usage, and the entry of memory.stat for what can be dropped."""


def measure_free_bytes(system: Path = SYSTEM) -> int:
    """What this host can still give to this process and others of its job.

    Args:
        system: where /proc and /sys are.
    """
    return max(0, min([psutil.virtual_memory().available, *_list_rooms(system)]))


def _list_rooms(system: Path) -> Iterator[int]:
    """What each limit on this process's groups leaves; nothing where none can be read."""
    for controller, folder in list_groups(system, _NAMES):
        yield from _read_room(folder, controller)


def _read_room(folder: Path, controller: str) -> Iterator[int]:
    limit, usage, droppable = _NAMES[controller]
    try:
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines())
        yield int((folder / limit).read_text()) - int((folder / usage).read_text()) + int(statistics.get(droppable, 0))
    except (OSError, ValueError):  # no such group from inside a container, or its limit is "max"
        return
