"""Watches a run: signals, time limit, heartbeats, watchdog. docs/decisions/013 tells how."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

from ds_seg import distributed
from ds_seg.supervision.heartbeat import Heartbeat
from ds_seg.supervision.processes import gather_ranks, outlive_parent, own_age_s
from ds_seg.supervision.progress import enter_phase
from ds_seg.supervision.signals import listening
from ds_seg.supervision.stop import TimeLimit
from ds_seg.supervision.watchdog import Watchdog

_INTERVAL_S = 0.5


@contextlib.contextmanager
def supervised(work_dir: Path, *, watchdog_timeout_s: float, max_time_s: float | None) -> Iterator[None]:
    """Watch this rank and, through the store, all others; a collective over all ranks.

    Args:
        work_dir: where the watchdog writes stacks.
        watchdog_timeout_s: seconds without progress after which a rank counts as stopped; 0 turns that off.
        max_time_s: seconds from the start of the command in which it must have ended; None for no limit.
    """
    interval_s = min(_INTERVAL_S, watchdog_timeout_s / 10 or _INTERVAL_S)
    heartbeat = Heartbeat(interval_s)
    time_limit = TimeLimit(max_time_s, own_age_s()) if max_time_s is not None and distributed.is_main() else None
    watchdog = Watchdog(
        heartbeat,
        gather_ranks(),
        work_dir,
        timeout_s=watchdog_timeout_s,
        interval_s=interval_s,
        time_limit=time_limit,
    )
    outlive_parent()  # from here on the death of a launcher is seen, and what was trained is saved first
    try:
        with listening(heartbeat.wake):
            yield
        enter_phase("leaving the run", patience=math.inf)  # ranks leave one by one
    finally:
        watchdog.close()
        heartbeat.close()
