"""Where the time of a training step goes: its data, forward, backward, optimizer, and collectives inside them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Timed = Mapping[str, Sequence[tuple[Any, str]]]
"""Phase -> the callables that make it, each as the object that holds it and the name of its attribute."""
DATA = "data"
"""Drawing a batch of the benchmark's own, which `step_s` leaves out; benchmarks/data.py measures a real pipeline."""
REST = "rest"
COLLECTIVES = "collectives"
_COLLECTIVE_PREFIXES = ("gloo:", "nccl:", "ncclDevKernel", "ncclKernel")


class PhaseClock:
    """A context in which the callables of each phase are timed, the device being idle before and after each.

    Args:
        timed: what to time; a phase inside another counts for both.
        device: where they compute.

    Attributes:
        seconds: by phase.
    """

    def __init__(self, timed: Timed, device: torch.device) -> None:
        self.timed, self.device = timed, device
        self.seconds: Counter[str] = Counter()

    def __enter__(self) -> PhaseClock:
        self._originals = [
            (owner, name, getattr(owner, name)) for calls in self.timed.values() for owner, name in calls
        ]
        for phase, calls in self.timed.items():
            for owner, name in calls:
                setattr(owner, name, self._timing(getattr(owner, name), phase))
        return self

    def __exit__(self, *_error: object) -> None:
        for owner, name, original in self._originals:
            setattr(owner, name, original)

    def _timing(self, function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._wait()
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._wait()
                self.seconds[phase] += time.perf_counter() - started  # type: ignore[assignment]

        return timed

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def split_step(step: Callable[[], object], timed: Timed, device: torch.device) -> dict[str, float]:
    """Seconds of one step by phase, and `rest`: norms, clipping, and what lies between.

    Args:
        step: makes one training step.
        timed: the callables of its phases, none inside another.
        device: where it computes.
    """
    started = time.perf_counter()
    with PhaseClock(timed, device) as clock:
        step()
    total_s = time.perf_counter() - started
    phases = {phase: clock.seconds[phase] for phase in timed}
    return {**phases, REST: total_s - sum(phases.values())}


def measure_collectives_s(step: Callable[[], object], device: torch.device) -> float:
    """Seconds of one step in which a collective runs, hidden behind computation or not.

    Args:
        step: makes one training step.
        device: where it computes.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as trace:
        step()
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in trace.events() or ()
        if event.name.startswith(_COLLECTIVE_PREFIXES)
    ]
    return merged_length(spans) / 1e6


def merged_length(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, covered_until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, covered_until))
        covered_until = max(covered_until, end)
    return total
