"""One life of a run: from its start, through what is done to it, to the end of its last process."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import command_line
from ds_seg.tracking.metrics_log import read_metrics
from processes import MARK, SHARED_MEMORY, Process, RunProcesses

INJECTED = Path(__file__).parent / "injected"
_POLL_S = 0.05
_ORDINARY = re.compile(r"^(step \d+/|saved |evaluation at|warning: \d+% of the last \d+ steps|[+|]|\s*$)")
"""Lines that tell of no fault."""

unfinished: list[Life] = []
"""Started and not yet seen to its end: what a failed test leaves."""


@dataclass(frozen=True)
class Ending:
    """How a life ended. Times count from the fault."""

    exit_code: int
    detected_s: float | None
    """Until the output told of it, or a process that was not struck had ended; None if nothing did."""
    gone_s: float
    """Until the last process was gone, data workers included."""
    output: str

    def figures(self) -> dict[str, float | int | None]:
        """What goes into a row of docs/faults.md."""
        return {"detected_s": self.detected_s, "gone_s": self.gone_s, "exit_code": self.exit_code}


class Life:
    """A started run.

    Args:
        arguments: of `ds-seg`.
        folder: the current folder; what is printed goes to a file in it.
        processes: how many ranks.
        launcher: torchrun or deepspeed.
        fault: what injected/sitecustomize.py is to do; None for a fault from outside, or none.
        environment: variables beside those of this process.
    """

    def __init__(
        self,
        *arguments: object,
        folder: Path,
        processes: int = 2,
        launcher: str = "torchrun",
        fault: Mapping[str, object] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        mark = uuid.uuid4().hex
        env = command_line.environment(**{MARK: mark}, **(environment or {}))
        self._fault_log = folder / f"fault-{mark}.jsonl"
        if fault:
            paths = [str(INJECTED), *filter(None, [env.get("PYTHONPATH")])]
            env.update(
                PYTHONPATH=os.pathsep.join(paths), DS_SEG_FAULT=json.dumps(fault), DS_SEG_FAULT_LOG=str(self._fault_log)
            )
        self._shared_memory_before = {path.name for path in SHARED_MEMORY.iterdir()}
        self._struck: set[int] = set()
        self._ends: dict[int, float] = {}
        self.lines: list[tuple[float, str]] = []
        self.started_s = self.fault_s = time.time()
        self.popen = subprocess.Popen(
            command_line.command(processes, *map(str, arguments), launcher=launcher),
            cwd=folder,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self.processes = RunProcesses(mark, self.popen.pid)
        unfinished.append(self)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def output(self) -> str:
        """What all processes have printed so far."""
        return "".join(text for _, text in self.lines)

    def wait_for_row(self, work_dir: Path, step: int, timeout_s: float = 300) -> None:
        """Wait until the run has logged a step."""
        self.wait_until(
            lambda: any(row["step"] >= step for row in read_metrics(work_dir / "metrics.jsonl")),
            f"step {step} to be logged",
            timeout_s,
        )

    def wait_until(self, condition, what: str, timeout_s: float = 300) -> None:
        """Wait for something to come true while the run lives."""
        end = time.monotonic() + timeout_s
        while not condition():
            assert self.popen.poll() is None, f"the run ended, waiting for {what}:\n{self.output[-4000:]}"
            assert time.monotonic() < end, f"waited {timeout_s} s for {what}:\n{self.output[-4000:]}"
            time.sleep(0.01)

    def rank(self, rank: int) -> int:
        """The process number of a rank."""
        return self.ranks()[rank].pid

    def data_worker(self, rank: int) -> int:
        """The process number of a data worker of a rank."""
        return next(p.pid for p in self.processes.alive() if p.parent == self.rank(rank))

    def ranks(self) -> dict[int, Process]:
        """The main process of every rank that lives."""
        ranks = [process for process in self.processes.alive() if process.rank is not None]
        mains = {(process.pid, process.rank) for process in ranks}
        return {p.rank: p for p in ranks if p.rank is not None and (p.parent, p.rank) not in mains}

    def fault_now(self) -> None:
        """The fault is done from outside, now."""
        self.fault_s = time.time()

    def strike(self, number: signal.Signals, *pids: int) -> None:
        """Send a signal: the fault."""
        self._struck |= set(pids)
        self.fault_now()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(pid, number)

    def signal_all(self, number: signal.Signals) -> None:
        """Send a signal that is no fault to every process of the run."""
        for process in self.processes.alive():
            os.kill(process.pid, number)

    def finish(self, *, tells: str | None = None, timeout_s: float = 300) -> Ending:
        """Wait until every process of the run is gone.

        Args:
            tells: a regular expression of the line that tells of the fault; None: any line that is not ordinary.
            timeout_s: for the whole rest of the life.

        Raises:
            AssertionError: one is still alive after `timeout_s`, or the run has left something in shared memory.
        """
        deadline = time.monotonic() + timeout_s
        alive = {process.pid for process in self.processes.alive()}
        while alive and time.monotonic() < deadline:
            time.sleep(_POLL_S)
            self.popen.poll()
            now_alive = {process.pid for process in self.processes.alive()}
            self._ends |= {pid: time.time() for pid in alive - now_alive}
            alive = now_alive
        gone_s = time.time()
        left = [f"{p.pid} (rank {p.rank})" for p in self.processes.alive()] if alive else []
        code = self.end()
        assert not left, f"still alive {timeout_s:g} s after the fault: {', '.join(left)}\n{self.output[-4000:]}"
        shared = self.processes.leftovers_in_shared_memory(self._shared_memory_before)
        assert not shared, f"left in {SHARED_MEMORY}: {shared}"
        self._read_fault_log()
        return Ending(code, self._detected_s(tells), gone_s - self.fault_s, self.output)

    def end(self) -> int:
        """Kill what is left of the run, and return the launcher's exit code."""
        unfinished.remove(self)
        self.processes.kill()
        code = self.popen.wait(10)
        self._reader.join(5)
        return code

    def struck(self) -> bool:
        """Whether the fault has happened (for one that is injected)."""
        self._read_fault_log()
        return bool(self._struck)

    def _read(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self.lines.append((time.time(), line))

    def _read_fault_log(self) -> None:
        if self._fault_log.exists():
            entries = [json.loads(line) for line in self._fault_log.read_text().splitlines()]
            self._struck |= {entry["pid"] for entry in entries}
            self.fault_s = entries[0]["time_s"]

    def _detected_s(self, tells: str | None) -> float | None:
        later = [(when, text) for when, text in self.lines if when > self.fault_s]
        if tells is not None:
            found = [when for when, text in later if re.search(tells, text)]
        else:
            found = [when for when, text in later if not _ORDINARY.match(text)][:1]
            found += [when for pid, when in self._ends.items() if pid not in self._struck and when > self.fault_s]
        return min(found) - self.fault_s if found else None
