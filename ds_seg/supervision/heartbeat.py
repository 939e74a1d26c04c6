"""The exchange of heartbeats, stop requests and verdicts through the rendezvous store, in a thread of its own.

A store whose process was stopped answers nobody, without a timeout (torch 2.13), so nothing else touches it; how often
it answered is what the watchdog looks at. A rank writes its own beat and reads rank 0's; rank 0 reads all.
"""

from __future__ import annotations

import json
import threading
import time
from dataclasses import asdict, dataclass

import torch.distributed as dist

from ds_seg import distributed
from ds_seg.supervision import progress, stop
from ds_seg.supervision.stacks import describe_main_thread

_STOP, _VERDICT, _SEEN = "ds_seg/stop", "ds_seg/verdict", "ds_seg/verdict_seen"
_LAST_BEAT_S = 5.0
"""For a store that answers no more."""


@dataclass(frozen=True)
class Beat:
    """What a rank publishes about itself.

    Attributes:
        number: Beats so far: it stands still when the process does.
        ticks: See `progress.Progress`, as the next three.
        position: Phases entered.
        phase: What is being done.
        patience: Factor of the timeout.
        phase_s: Seconds since the phase began.
        place: Innermost line of the main thread.
        in_collective: Whether that is part of a collective.
    """

    number: int
    ticks: int
    position: int
    phase: str
    patience: float
    phase_s: float
    place: str
    in_collective: bool


def read_own_beat(number: int) -> Beat:
    """This rank's beat now."""
    now = progress.current()
    place, in_collective = describe_main_thread()
    phase_s = time.monotonic() - now.since
    return Beat(number, now.ticks, now.position, now.phase, now.patience, phase_s, place, in_collective)


class Heartbeat:
    """Beats for this rank and keeps the last beats of those it watches: all on rank 0, rank 0 on the others.

    Args:
        interval_s: Seconds between two beats.

    Attributes:
        beats: By rank.
        answered: Exchanges that the store has completed.
        lost: Whether the store's process has gone.
        verdict: What the watchdog of rank 0 has found; empty while all is well.
    """

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._store: dist.Store | None = distributed.open_store()
        self._wake, self._closed = threading.Event(), threading.Event()
        self._own_verdict = self.verdict = ""
        self._published_stop = self._said_seen = False
        self.beats: dict[int, Beat] = {}
        self.answered = 0
        self.acknowledged = 0
        self.lost = False
        self._begin()
        self._thread = threading.Thread(target=self._run, name="ds_seg heartbeat", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Exchange now rather than at the next beat."""
        self._wake.set()

    def close(self) -> None:
        """Stop beating, after a last beat: a thread inside the store's C++ aborts a Python that ends meanwhile."""
        self._closed.set()
        self.wake()
        self._thread.join(_LAST_BEAT_S)

    def announce(self, verdict: str) -> None:
        """Tell all ranks what was found; for rank 0."""
        self._own_verdict = verdict
        self.wake()

    def acknowledge(self) -> None:
        """Tell rank 0 that this rank has written its stacks."""
        self._said_seen = True
        self.wake()

    def _begin(self) -> None:
        """Every key exists before anybody reads it."""
        if self._store is not None:
            self._store.set(_beat_key(distributed.rank()), json.dumps(asdict(read_own_beat(0))))
            if distributed.is_main():
                self._store.set(_STOP, "")
                self._store.set(_VERDICT, "")
        distributed.barrier()

    def _run(self) -> None:
        last = False
        while not last:
            last = self._closed.is_set()
            try:
                self._exchange()
            except (RuntimeError, dist.DistError):
                self.lost = True
                return
            self.answered += 1
            if not last:
                self._wake.wait(self._interval_s)
                self._wake.clear()

    def _exchange(self) -> None:
        own = read_own_beat(self.answered + 1)
        if self._store is None:
            self.beats = {0: own}
            return
        self._publish(self._store, own)
        watched = range(distributed.world_size()) if distributed.is_main() else range(1)
        keys = [_STOP, _VERDICT, *map(_beat_key, watched)]
        reason, verdict, *beats = (bytes(value).decode() for value in self._store.multi_get(keys))
        self.beats = {rank: Beat(**json.loads(beat)) for rank, beat in zip(watched, beats, strict=True)}
        self.verdict = verdict
        if reason and stop.request(reason):
            self._published_stop = True
        if self._own_verdict:
            self.acknowledged = self._store.add(_SEEN, 0)

    def _publish(self, store: dist.Store, own: Beat) -> None:
        store.set(_beat_key(distributed.rank()), json.dumps(asdict(own)))
        reason = stop.requested()
        if reason and not self._published_stop:
            store.set(_STOP, reason)
            self._published_stop = True
        if self._own_verdict:
            store.set(_VERDICT, self._own_verdict)
        if self._said_seen:
            self._said_seen = False
            store.add(_SEEN, 1)


def _beat_key(rank: int) -> str:
    return f"ds_seg/beat/{rank}"
