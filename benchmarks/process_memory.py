"""The memory of a process while something runs, told apart by what it is made of."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from types import TracebackType

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_KINDS = {"anonymous": "RssAnon", "file": "RssFile", "total": "VmRSS"}
_EVERY_S = 0.002


def read_memory() -> dict[str, int]:
    """Bytes of this process that lie in RAM.

    Returns:
        `anonymous`: what the process holds for itself: tensors, heap, interpreter. `file`: touched pages of mapped
        files, which the system shares with its page cache and takes back when it needs them. `total`: both, and what
        is shared between processes: the resident set, whose peak is `ru_maxrss`.
    """
    status = _STATUS.read_text(encoding="ascii")
    return {kind: _read_field(status, name) for kind, name in _KINDS.items()}


class MemoryPeaks:
    """A context in which the peaks of `read_memory` are followed, every 2 ms; the total's peak is the kernel's own.

    Attributes:
        before: bytes when it was entered.
        peak: highest bytes within.
    """

    def __init__(self) -> None:
        self.before: dict[str, int] = {}
        self.peak: dict[str, int] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> MemoryPeaks:
        _CLEAR.write_text("5", encoding="ascii")  # the kernel's peak starts anew
        self.before = self.peak = read_memory()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self.peak = {**self.peak, "total": _read_field(_STATUS.read_text(encoding="ascii"), "VmHWM")}

    def added(self) -> dict[str, int]:
        """Bytes at the peak beyond those before, by kind."""
        return {kind: self.peak[kind] - before for kind, before in self.before.items()}

    def _follow(self) -> None:
        while not self._done.wait(_EVERY_S):
            now = read_memory()
            self.peak = {kind: max(now[kind], peak) for kind, peak in self.peak.items()}


def _read_field(status: str, name: str) -> int:
    match = re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE)
    assert match is not None, f"{_STATUS} has no {name}"
    return int(match[1]) * 1024
