"""SIGTERM, SIGINT, SIGHUP and SIGUSR1: the first asks the run to stop, a second one ends it at once.

A thread learns of a signal through Python's wake-up descriptor, because a handler would not run while the main thread
waits in a collective.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator

from ds_seg import distributed
from ds_seg.supervision import progress, stop

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_SAME_REQUEST_S = 2.0
"""Signals so close together are one request: the terminal, the launcher and the scheduler may each send one."""
_saving = threading.Event()
"""Set while there is something to save."""


@contextlib.contextmanager
def listening(wake: Callable[[], None]) -> Iterator[None]:
    """Listen for signals on this rank; the handlers from before come back afterwards unless the run is to stop.

    Args:
        wake: called when the run is asked to stop, to tell the other ranks.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    heard = [number for number in STOPPING if not _ignored_by_nohup(number)]
    before = {number: signal.signal(number, lambda _number, _frame: None) for number in heard}
    descriptor = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    _keep_from_children()
    threading.Thread(target=_listen, args=(reader, wake), name="ds_seg signals", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(descriptor)
        for number, handler in before.items():
            # srun signals the rest once the first rank has ended: they are to end with 75 as well
            signal.signal(number, handler if stop.requested() is None else signal.SIG_IGN)
        writer.close()  # ends the thread


@contextlib.contextmanager
def saving() -> Iterator[None]:
    """Within it a run that gets a signal saves, or writes its end, before it is over; outside it is over at once."""
    _saving.set()
    try:
        yield
    finally:
        _saving.clear()


def _ignored_by_nohup(number: signal.Signals) -> bool:
    return number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN


@functools.cache
def _keep_from_children() -> None:
    """A forked data worker has this process's descriptor, but its signals are not this process's."""
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))


def _listen(reader: socket.socket, wake: Callable[[], None]) -> None:
    first: float | None = None
    with reader:
        while data := reader.recv(1):
            number = signal.Signals(data[0])
            if number not in STOPPING:
                continue
            if first is None:
                first = time.monotonic()
                _receive(number, wake)
            elif time.monotonic() - first > _SAME_REQUEST_S:
                _end_at_once(number, "a second signal ends the run at once. What was saved before stays.")


def _receive(number: signal.Signals, wake: Callable[[], None]) -> None:
    if not _saving.is_set():
        _end_at_once(number, "the run ends at once, because there is nothing to save before training has begun.")
    stop.request(f"{number.name} on rank {distributed.rank()}")
    wake()
    distributed.notify(
        f"{number.name} on rank {distributed.rank()} ({progress.current().phase}): all ranks stop before the next step "
        f"or window batch, save, and end with 75 ({stop.pace}); a run whose last step is over just ends. A second "
        f"signal, {_SAME_REQUEST_S:g} s from now or later, ends them at once with {128 + number} and saves nothing "
        "more."
    )


def _end_at_once(number: signal.Signals, why: str) -> None:
    distributed.notify(f"{number.name} on rank {distributed.rank()}: {why}")
    distributed.end_all_ranks(128 + number)
