"""A run's wish to stop: where it came from, when it was learnt, and how the time limit makes one.

The wish is known to a rank soon after any rank has it, because it travels through the rendezvous store. It is acted on
where all ranks agree: before a step begins, and before a window batch of an evaluation.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

_POLL_S = 0.1
_UNKNOWN_SAVE_SHARE = 0.1
_UNKNOWN_SAVE_AT_MOST_S = 300.0
_MARGIN_SHARE = 0.2
_MARGIN_AT_MOST_S = 60.0
"""For the summary, the report, wandb and the launcher."""
_RECENT_STEPS = 20


class StopRequested(Exception):
    """All ranks have agreed to stop here, or this rank has given up waiting because of a stop; never an error."""


@dataclass(frozen=True)
class _Request:
    reason: str
    learnt: float
    """In seconds of time.monotonic()."""


class TimeLimit:
    """When a run with `--max-time` must begin to stop, as measured by its own steps and saves.

    Args:
        limit_s: Seconds from the start of the command to its end.
        elapsed_s: Seconds of it that are over.
    """

    def __init__(self, limit_s: float, elapsed_s: float) -> None:
        self.limit_s = limit_s
        self._ends = time.monotonic() + limit_s - elapsed_s

    def needs_s(self, steps: Pace) -> float:
        """Seconds to keep for the step that is running, the save and the end."""
        unknown = min(_UNKNOWN_SAVE_AT_MOST_S, _UNKNOWN_SAVE_SHARE * self.limit_s)
        save_s = unknown if steps.save_s is None else 1.5 * steps.save_s
        return 2 * (steps.step_s or 0.0) + save_s + min(_MARGIN_AT_MOST_S, _MARGIN_SHARE * self.limit_s)

    def is_due(self, steps: Pace) -> bool:
        """Whether it is time to stop; never before a step was made, or a requeued run would get nowhere."""
        return steps.step_s is not None and time.monotonic() + self.needs_s(steps) >= self._ends


class Pace:
    """The longest of the recent steps and of all saves."""

    def __init__(self) -> None:
        self.save_s: float | None = None
        self._steps_s: list[float] = []

    @property
    def step_s(self) -> float | None:
        """The longest of the recent steps; None before the first."""
        return max(self._steps_s, default=None)

    def note_step(self, seconds: float) -> None:
        """Remember how long a step took."""
        self._steps_s = [*self._steps_s[1 - _RECENT_STEPS :], seconds]

    def note_save(self, seconds: float) -> None:
        """Remember how long a save took."""
        self.save_s = max(seconds, self.save_s or 0.0)

    def __str__(self) -> str:
        step = "no step was made yet" if self.step_s is None else f"a step takes up to {self.step_s:.1f} s"
        save = "no save was measured yet" if self.save_s is None else f"a save up to {self.save_s:.1f} s"
        return f"{step}, {save}"


pace = Pace()
_request: _Request | None = None
_lock = threading.Lock()


def request(reason: str) -> bool:
    """Ask the run to stop; True for the first to ask on this rank."""
    global _request
    with _lock:
        first = _request is None
        if first:
            _request = _Request(reason, time.monotonic())
    return first


def requested() -> str | None:
    """Why the run is to stop, or None."""
    return None if _request is None else _request.reason


def age_s() -> float:
    """Seconds since this rank learnt of the stop."""
    return 0.0 if _request is None else time.monotonic() - _request.learnt


class Leavable(Generic[T]):
    """An iterator whose wait for the next item ends when the run is to stop.

    A thread of its own takes the items, and only while the caller waits: nothing runs beside training, so that a
    loader in this process may use the global random state. A thread that hangs is left behind.

    Args:
        items: taken one at a time.
    """

    def __init__(self, items: Iterable[T]) -> None:
        self._items = iter(items)
        self._over: BaseException | None = None
        self._wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._taken: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()
        threading.Thread(target=self._take, name="ds_seg data", daemon=True).start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        """The next item.

        Raises:
            StopRequested: the run is to stop; the item may be lost.
        """
        if self._over is not None:
            raise self._over
        if requested():
            raise StopRequested
        self._wanted.put(True)
        while True:
            try:
                item, error = self._taken.get(timeout=_POLL_S)
            except queue.Empty:
                if requested():
                    raise StopRequested from None
                continue
            if error is not None:
                self._over = error
                raise error
            return item  # type: ignore[return-value]

    def close(self) -> None:
        """Let the thread end, and with it what the items hold: the worker processes of a loader."""
        self._wanted.put(False)

    def _take(self) -> None:
        while self._wanted.get():
            try:
                self._taken.put((next(self._items), None))
            except BaseException as error:  # handed to the caller, StopIteration too
                self._taken.put((None, error))
                return
