"""How all ranks end with one message and one exit code, wherever each of them waits.

Failure is reported through the rendezvous store and not through a collective: exactly one rank prints it
(`claim_failure_report`), and all ranks end with its exit code (`end_all_ranks`), also those in a collective.
"""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from ds_seg.distributed.world import is_main, rank, world_size
from ds_seg.errors import EXIT_OK

if TYPE_CHECKING:
    import torch.distributed as dist

_END = "ds_seg/end"
"""Store key: the exit code of the run and how many ranks are expected to take it, set once they are known."""
_LEFT = "ds_seg/left"
"""Store key: how many ranks have learnt of a failure and are ending."""
_LEAVE_TIMEOUT_S = 10.0
"""For a rank that can't end: one that was killed, or that holds the interpreter in a library."""
_store: dist.Store | None = None
_watcher: threading.Thread | None = None
_reporting = threading.Event()
"""Set on the rank that ends the others, so that its own watcher leaves it the time to do so."""
_ending = threading.Event()
_DEATH_S = 0.1
"""A connection breaks a moment before its process counts as ended."""
_count_gone: Callable[[], int] = int


def watch_for_the_end(store: dist.Store) -> None:
    """Wait in the background for `_END`: a rank inside a collective would not learn of a failure elsewhere."""
    global _store, _watcher
    _store = store
    if world_size() == 1:
        return
    own = store.clone()  # a connection serves one caller at a time

    def watch() -> None:
        with contextlib.suppress(RuntimeError):
            own.wait([_END], datetime.timedelta(days=365))
            _ending.set()
            code, expected = map(int, own.get(_END).split())
            if code != EXIT_OK and not _reporting.is_set():
                _leave(own, expected)
                end_this_rank(code)

    _watcher = threading.Thread(target=watch, name="ds_seg failure watcher", daemon=True)
    _watcher.start()


def announce_success() -> None:
    """Let every rank's watcher end; called by all ranks."""
    _ending.set()
    if is_main() and _store is not None:
        _store.set(_END, f"{EXIT_OK} {world_size()}")
    if _watcher is not None:
        _watcher.join(timeout=5)


def is_ending() -> bool:
    """Whether this rank knows that the run is ending, so that processes may be gone."""
    return _ending.is_set()


def claim_failure_report() -> bool:
    """Whether this rank is the one that prints the failure; no collective is issued.

    The first rank to ask gets True, and so does every rank once the store is gone with the process that kept it.
    Before the store is there rank 0 gets it, and a rank that no world of its size has.
    """
    if _store is None:
        return is_main() or rank() >= world_size()
    try:
        return _store.add("ds_seg/failures", 1) == 1
    except RuntimeError:
        return True


def end_all_ranks(code: int, *, absent: int = 0) -> NoReturn:
    """End this process with `code`, and every other rank with the same code, wherever it waits.

    Called by the rank that has printed a failure. Python's and torch's own clean-up is left out: it would
    wait for ranks that no longer answer.

    Args:
        code: exit code.
        absent: ranks that are known not to answer any more, and are not waited for, as are those that have ended.
    """
    _reporting.set()
    _ending.set()
    store = _store
    if store is not None:
        # in a thread: a store whose process was stopped does not answer, and knows no timeout
        telling = threading.Thread(target=_tell, args=(store, code, absent), daemon=True)
        telling.start()
        telling.join(timeout=_LEAVE_TIMEOUT_S + 1)
    end_this_rank(code)


def end_this_rank(code: int) -> NoReturn:
    """End this process at once, and the data workers that it started: one that hangs would outlive it."""
    for worker in multiprocessing.active_children():
        worker.kill()
    with contextlib.suppress(OSError, ValueError):  # nobody reads any more
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def count_absent_by(count_gone: Callable[[], int]) -> None:
    """Let `count_gone` tell how many ranks have ended before anybody was told to: they will not answer."""
    global _count_gone
    _count_gone = count_gone


def _tell(store: dist.Store, code: int, absent: int) -> None:
    time.sleep(_DEATH_S)
    expected = world_size() - max(absent, _count_gone())
    with contextlib.suppress(RuntimeError):
        store.set(_END, f"{code} {expected}")
        _leave(store, expected)


def _leave(store: dist.Store, expected: int) -> None:
    """Count this rank as ended; rank 0, which keeps the store, goes last, so that all others get its answer."""
    store.add(_LEFT, 1)
    deadline = time.monotonic() + _LEAVE_TIMEOUT_S
    while is_main() and store.add(_LEFT, 0) < expected and time.monotonic() < deadline:
        time.sleep(0.02)
