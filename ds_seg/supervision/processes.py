"""Which process is which, whether it is still there, and the launchers above this one.

A process is told from a later one with the same number by when it started, in clock ticks since the machine's start:
a wall clock that jumps does not matter.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import psutil

from ds_seg import distributed

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LAUNCHER_SCRIPTS = ("deepspeed", "torchrun")
_LAUNCHER_MODULES = ("deepspeed.launcher.runner", "deepspeed.launcher.launch", "torch.distributed.run")


class ProcessId(NamedTuple):
    """A process, wherever it runs."""

    machine: str
    pid: int
    start_ticks: int

    def is_gone(self) -> bool:
        """Whether it has ended; only of a process on this machine."""
        return _start_ticks(self.pid) != self.start_ticks


def identify(pid: int) -> ProcessId:
    """The process that has this number now."""
    return ProcessId(_machine(), pid, _start_ticks(pid) or 0)


def own_age_s() -> float:
    """Seconds since this process started, imports included."""
    ticks = _start_ticks(os.getpid())
    assert ticks is not None
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def gather_ranks() -> dict[int, ProcessId]:
    """The process of every rank; a collective."""
    return dict(enumerate(distributed.gather_objects(identify(os.getpid()))))


def on_this_machine(ranks: dict[int, ProcessId]) -> dict[int, ProcessId]:
    """Those of the other ranks that this process can look at and kill."""
    return {
        rank: process for rank, process in ranks.items() if process.machine == _machine() and process.pid != os.getpid()
    }


def find_launchers() -> list[ProcessId]:
    """The launchers that started this process, nearest first: without them nobody cares for the ranks."""
    return [identify(parent.pid) for parent in psutil.Process().parents() if _is_launcher(parent)]


def has_python_above() -> bool:
    """Whether a process above this one runs Python, as every launcher does; one that is gone has left init there."""
    return any(parent.name().startswith(("python", "pt_elastic")) for parent in psutil.Process().parents())


def kill_tree(process: ProcessId) -> None:
    """SIGKILL a process on this machine, even a stopped one, and all that it started."""
    if process.is_gone():
        return
    with contextlib.suppress(psutil.Error):
        root = psutil.Process(process.pid)
        for victim in [*root.children(recursive=True), root]:
            with contextlib.suppress(psutil.Error):
                victim.kill()


def end_with_parent() -> None:
    """Have the kernel kill this process with its parent: one that hangs would stay for ever."""
    _at_death_of_parent(signal.SIGKILL)


def outlive_parent() -> None:
    """Take `end_with_parent` back."""
    _at_death_of_parent(0)


def _at_death_of_parent(signal_number: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal_number)


def _is_launcher(process: psutil.Process) -> bool:
    try:
        arguments = process.cmdline()
    except psutil.Error:
        return False
    if not arguments or not Path(arguments[0]).name.startswith("python"):
        return False  # a shell or `timeout` that names a launcher among its arguments
    for argument, following in pairwise([*arguments[1:], ""]):
        if argument == "-m":
            return following in _LAUNCHER_MODULES
        if not argument.startswith("-"):
            return Path(argument).name in _LAUNCHER_SCRIPTS
    return False


def _machine() -> str:
    """Processes of one machine that see each other's numbers: containers of one host may not."""
    return f"{socket.gethostname()} {Path('/proc/self/ns/pid').readlink()}"


def _start_ticks(pid: int) -> int | None:
    """When a process started; None if it has ended, reaped by its parent or not."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
