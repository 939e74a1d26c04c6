"""The thread that ends a run in which a rank, its process or its launcher has stopped."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

from ds_seg import distributed
from ds_seg.errors import EXIT_FAULT
from ds_seg.supervision import stop
from ds_seg.supervision.heartbeat import Heartbeat
from ds_seg.supervision.judgement import Ages, describe_silent, describe_stuck, find_silent, find_stuck
from ds_seg.supervision.processes import ProcessId, find_launchers, kill_tree, on_this_machine
from ds_seg.supervision.stacks import write_stacks

_GONE_GRACE_S = 2.0
"""A rank that ends in order is gone a moment before the others know that all of them end."""
_ACKNOWLEDGE_S = 5.0
"""For the other ranks to write their stacks."""
_REMEDY = "Run again with --resume auto to go on from the last checkpoint."


class Watchdog:
    """Watches this rank's launchers, its neighbours and the heartbeats, and ends all ranks when one has stopped.

    Args:
        heartbeat: of this rank.
        ranks: the process of every rank.
        work_dir: where stacks are written.
        timeout_s: seconds without a beat or without progress; 0 looks only for processes that are gone.
        interval_s: seconds between two looks.
        time_limit: ends the run in time; None where there is no limit.
    """

    def __init__(
        self,
        heartbeat: Heartbeat,
        ranks: dict[int, ProcessId],
        work_dir: Path,
        *,
        timeout_s: float,
        interval_s: float,
        time_limit: stop.TimeLimit | None,
    ) -> None:
        self._heartbeat, self._work_dir = heartbeat, work_dir
        self._timeout_s, self._interval_s, self._time_limit = timeout_s, interval_s, time_limit
        self._neighbours = on_this_machine(ranks)
        distributed.count_absent_by(self._count_gone)
        self._launchers = find_launchers() if distributed.world_size() > 1 else []
        self._ages = Ages()
        self._gone_s: dict[int, float] = {}
        self._answered, self._unanswered_s = 0, 0.0
        self._closed = threading.Event()
        threading.Thread(target=self._run, name="ds_seg watchdog", daemon=True).start()

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def _run(self) -> None:
        looked = time.monotonic()
        while not self._closed.wait(self._interval_s) and not distributed.is_ending():
            # no more than it takes while this process runs: it may itself have been suspended
            elapsed_s = min(time.monotonic() - looked, 2 * self._interval_s)
            looked = time.monotonic()
            self._look_for_stops()
            self._look_for_verdict()
            self._look_for_gone(elapsed_s)
            if self._timeout_s:
                self._look_for_stopped(elapsed_s)

    def _count_gone(self) -> int:
        return sum(process.is_gone() for process in self._neighbours.values())

    def _look_for_stops(self) -> None:
        gone = next((launcher for launcher in self._launchers if launcher.is_gone()), None)
        limit = self._time_limit
        if gone is not None:
            self._request_stop(f"the end of its launcher (process {gone.pid})")
        elif self._heartbeat.lost and _launcher_keeps_the_store():
            self._request_stop("the end of the launcher that keeps the rendezvous store")
        elif limit is not None and limit.is_due(stop.pace):
            kept_s = limit.needs_s(stop.pace)
            self._request_stop(f"--max-time ({limit.limit_s:.0f} s, of which the end gets {kept_s:.0f} s: {stop.pace})")

    def _request_stop(self, reason: str) -> None:
        if stop.request(reason):
            distributed.notify(f"rank {distributed.rank()}: all ranks stop, save, and end with 75, because of {reason}")
            self._heartbeat.wake()

    def _look_for_verdict(self) -> None:
        """On the ranks that do not judge."""
        if self._heartbeat.verdict and not distributed.is_main():
            write_stacks(self._work_dir)
            self._kill(json.loads(self._heartbeat.verdict))
            self._heartbeat.acknowledge()
            time.sleep(2 * _ACKNOWLEDGE_S)  # rank 0 ends this one
            distributed.end_this_rank(EXIT_FAULT)

    def _look_for_gone(self, elapsed_s: float) -> None:
        """A neighbour that was killed, or rank 0 on another machine: its store is gone with it."""
        gone = [rank for rank, process in self._neighbours.items() if process.is_gone()]
        if self._heartbeat.lost and not _launcher_keeps_the_store() and 0 not in gone:
            gone.insert(0, 0)
        self._gone_s = {rank: self._gone_s.get(rank, 0.0) + elapsed_s for rank in gone}
        if any(seconds > _GONE_GRACE_S for seconds in self._gone_s.values()) and distributed.claim_failure_report():
            names = ", ".join(f"rank {rank}" for rank in gone)
            distributed.notify(
                f"{names} of {distributed.world_size()} ended without reporting a failure: killed, crashed, or out of "
                f"memory. The other ranks end too. {_REMEDY}"
            )
            distributed.end_all_ranks(EXIT_FAULT)

    def _look_for_stopped(self, elapsed_s: float) -> None:
        beats = dict(self._heartbeat.beats)
        self._ages.observe(beats, elapsed_s)
        waiting = self._answered == self._heartbeat.answered and not self._heartbeat.lost
        self._unanswered_s = self._unanswered_s + elapsed_s if waiting else 0.0
        self._answered = self._heartbeat.answered
        if self._unanswered_s > self._timeout_s:
            keeper, stopped = ("the launcher", []) if _launcher_keeps_the_store() else ("rank 0", [0])
            self._end_alone(
                f"{keeper}, which keeps the rendezvous store, has not answered for {self._unanswered_s:.0f} s: its "
                f"process is stopped or its machine is gone",
                stopped,
            )
        if not beats or self._heartbeat.lost:
            return
        silent = find_silent(beats, self._ages, self._timeout_s)
        if silent and distributed.is_main():
            self._end_all(silent, describe_silent(silent, beats, self._ages))
        elif silent:
            self._end_alone(describe_silent(silent, beats, self._ages).strip(), silent)
        stuck = find_stuck(beats, self._ages, self._timeout_s) if distributed.is_main() else []
        if stuck:
            self._end_all([], describe_stuck(stuck, beats, self._ages))

    def _end_all(self, silent: list[int], description: str) -> None:
        """Rank 0 has judged: all ranks that can write their stacks, those that can't are killed."""
        if not distributed.claim_failure_report():
            return  # another failure is being reported, and ends all ranks
        self._heartbeat.announce(json.dumps(silent))
        write_stacks(self._work_dir)
        others = distributed.world_size() - 1 - len(silent)
        deadline = time.monotonic() + _ACKNOWLEDGE_S
        while self._heartbeat.acknowledged < others and time.monotonic() < deadline:
            self._heartbeat.wake()
            time.sleep(0.05)
        distributed.notify(
            f"the watchdog ends the run (--watchdog-timeout {self._timeout_s:g} s). What the others wait for:\n"
            f"{description}\nPython stacks of the ranks: {self._work_dir / 'stacks'}. {_REMEDY}"
        )
        self._kill(silent)
        distributed.end_all_ranks(EXIT_FAULT, absent=len(silent))

    def _end_alone(self, description: str, stopped: list[int]) -> None:
        """Rank 0 or its store does not answer: every rank judges for itself, at about the same time."""
        write_stacks(self._work_dir)
        if distributed.rank() == 1 or distributed.local_rank() == 0:
            distributed.notify(
                f"the watchdog ends the run (--watchdog-timeout {self._timeout_s:g} s): {description}. "
                f"Python stacks of the ranks: {self._work_dir / 'stacks'}. {_REMEDY}"
            )
        time.sleep(2 * self._interval_s)  # whoever judges next sees what this rank saw
        self._kill(stopped)
        distributed.end_this_rank(EXIT_FAULT)

    def _kill(self, ranks: list[int]) -> None:
        for rank in ranks:
            if rank in self._neighbours:
                kill_tree(self._neighbours[rank])


def _launcher_keeps_the_store() -> bool:
    """Under torchrun it is the launcher's process, otherwise rank 0's."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
