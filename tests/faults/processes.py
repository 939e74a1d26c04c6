"""All processes of a run, found by a mark in their environment, and what they leave in shared memory."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

MARK = "DS_SEG_FAULTS_RUN"
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Process:
    """A living process of a run."""

    pid: int
    parent: int
    rank: int | None
    """Its RANK; a launcher has none, a data worker has its parent's."""


class RunProcesses:
    """The processes that carry a mark.

    Args:
        mark: the value of the variable MARK in their environment.
        first: the one that was started; its environment is its parent's for a moment.
    """

    def __init__(self, mark: str, first: int) -> None:
        self._entry = f"{MARK}={mark}".encode()
        self._strangers: set[int] = set()
        self._seen = {first}

    def alive(self) -> list[Process]:
        """Those that live now; one that has ended and waits for its parent does not."""
        pids = {int(name) for name in os.listdir("/proc") if name.isdigit()}  # noqa: PTH208
        self._strangers &= pids
        found = []
        for pid in sorted(pids - self._strangers):
            try:
                state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
                if state in "ZX":
                    continue
                entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except (OSError, ValueError):  # it has just ended
                continue
            if self._entry in entries:
                self._seen.add(pid)
            if pid not in self._seen:
                self._strangers.add(pid)
                continue
            ranks = [int(entry[5:]) for entry in entries if entry.startswith(b"RANK=")]
            found.append(Process(pid, int(parent), ranks[0] if ranks else None))
        return found

    def kill(self) -> None:
        """End what is left, so that a failed test leaves nothing behind."""
        for process in self.alive():
            try:
                os.kill(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def leftovers_in_shared_memory(self, before: set[str]) -> list[str]:
        """Files in /dev/shm that were not there before; torch's carry the number of the process that made them."""
        new = {path.name for path in SHARED_MEMORY.iterdir()} - before
        if new:  # a semaphore has a passing name while it is made, in tests beside this one
            time.sleep(0.5)
            new &= {path.name for path in SHARED_MEMORY.iterdir()}
        mine = {str(pid) for pid in self._seen}
        return sorted(name for name in new if not name.startswith("torch_") or name.split("_")[1] in mine)
