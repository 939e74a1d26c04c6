"""Ranks that only wait for each other, under the real supervision; started from one process that has torch loaded."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from ds_seg import distributed
from ds_seg.supervision import stop, supervised
from ds_seg.supervision.progress import SLOW, enter_phase
from ds_seg.supervision.signals import saving

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["deepspeed", "torch.distributed", "ds_seg.supervision", "ds_seg.distributed"])


def run_rank(rank: int, world_size: int, port: int, folder: Path, timeout_s: float) -> None:
    """Go from phase to phase with the other ranks, without a collective that would notice a dead one, as under NCCL.

    A file `hang_RANK` makes the rank hang in its data; a stop is agreed on and ends with 75.
    """
    log = os.open(folder / f"rank_{rank}.log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed.initialize()
    with supervised(folder, watchdog_timeout_s=timeout_s, max_time_s=None), saving():
        for step in range(1, 100_000):
            enter_phase(f"the data of step {step}")
            if (folder / f"hang_{rank}").exists():
                hang_in_the_pipeline()
            enter_phase(f"step {step}", patience=SLOW)  # which is no excuse for silence
            _wait_for_all(folder, step, rank, world_size)
            if stop.requested() and (folder / "agree").exists():
                distributed.end_all_ranks(75)


def hang_in_the_pipeline() -> None:
    """What a deadlock looks like."""
    while True:
        time.sleep(1000)


def _wait_for_all(folder: Path, step: int, rank: int, world_size: int) -> None:
    own = folder / f"step_of_{rank}"
    own.with_suffix(".new").write_text(str(step))
    own.with_suffix(".new").rename(own)
    while any(_read_step(folder / f"step_of_{other}") < step for other in range(world_size)):
        time.sleep(0.02)


def _read_step(path: Path) -> int:
    try:
        return int(path.read_text())
    except FileNotFoundError:
        return 0


class Ranks:
    """The processes of one run.

    Args:
        folder: work dir, empty.
        world_size: number of ranks.
        timeout_s: of the watchdog.
    """

    def __init__(self, folder: Path, world_size: int, timeout_s: float) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        port = distributed.free_port()
        arguments = [(rank, world_size, port, folder, timeout_s) for rank in range(world_size)]
        self.processes = [context.Process(target=run_rank, args=given, daemon=True) for given in arguments]
        for process in self.processes:
            process.start()

    def wait_until_running(self, timeout_s: float = 60) -> None:
        """Return once every rank has made a few steps."""
        end = time.monotonic() + timeout_s
        while any(_read_step(self.folder / f"step_of_{rank}") < 3 for rank in range(len(self.processes))):
            assert time.monotonic() < end, self.log()
            time.sleep(0.05)

    def send(self, rank: int, number: signal.Signals) -> None:
        """Signal one rank."""
        os.kill(self.processes[rank].pid, number)

    def hang(self, rank: int) -> None:
        """Let a rank hang in its data."""
        (self.folder / f"hang_{rank}").touch()

    def wait(self, timeout_s: float = 30) -> tuple[list[int | None], float]:
        """Exit codes, and seconds until all were gone."""
        started = time.monotonic()
        for process in self.processes:
            process.join(max(0.0, timeout_s - (time.monotonic() - started)))
        return [process.exitcode for process in self.processes], time.monotonic() - started

    def log(self) -> str:
        """What all ranks have printed."""
        return "".join(path.read_text() for path in sorted(self.folder.glob("rank_*.log")))

    def kill(self) -> None:
        """Leave nothing behind."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()


@contextlib.contextmanager
def running(folder: Path, world_size: int, timeout_s: float) -> Iterator[Ranks]:
    """Ranks that have begun, and are gone afterwards."""
    ranks = Ranks(folder, world_size, timeout_s)
    try:
        ranks.wait_until_running()
        yield ranks
    finally:
        ranks.kill()
