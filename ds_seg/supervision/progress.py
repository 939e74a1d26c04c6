"""What this rank is doing and how often it got on: what the watchdog judges it by.

Phases are entered in the same order on every rank, so that the ranks with the lowest count are those that the others
wait for. Ticks are this rank's own, as many as it likes.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

SLOW = 4.0
"""Patience for work that gives no sign of progress: building engines, a first step that compiles, big files."""


@dataclass(frozen=True)
class Progress:
    """A moment of this rank's work.

    Attributes:
        phase: What is being done, for people.
        position: Phases entered so far.
        ticks: Signs of progress so far.
        patience: Factor of the watchdog's timeout.
        since: Of the phase, in seconds of time.monotonic().
    """

    phase: str = "starting"
    position: int = 0
    ticks: int = 0
    patience: float = 1.0
    since: float = dataclasses.field(default_factory=time.monotonic)


_current = Progress()


def enter_phase(phase: str, *, patience: float = 1.0) -> None:
    """Say that this rank begins a phase; every rank enters the same phases in the same order.

    Args:
        phase: What is being done, for people.
        patience: Factor of the watchdog's timeout, for phases without ticks.
    """
    global _current
    _current = Progress(phase, _current.position + 1, _current.ticks + 1, patience)


def tick() -> None:
    """Say that this rank got on within its phase; only its main thread does, whatever others do beside it."""
    global _current
    if threading.current_thread() is not threading.main_thread():
        return
    _current = dataclasses.replace(_current, ticks=_current.ticks + 1)


def ticking(items: Iterable[T]) -> Iterator[T]:
    """Pass items on, with a tick after each."""
    for item in items:
        yield item
        tick()


def current() -> Progress:
    """Where this rank stands."""
    return _current
