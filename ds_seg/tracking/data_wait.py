"""The share of the steps' time that goes into waiting for data, and what would make it smaller."""

from __future__ import annotations

import math
from collections import deque

WORTH_TELLING = 0.05
_FEWEST_STEPS = 10
"""A share of fewer says more about chance than about the data."""


class DataWait:
    """Adds up what the steps of a run wait for their data.

    The first step of a loader, while its workers start, counts nowhere.

    Args:
        interval_steps: What the progress line tells is measured over so many steps, 10 at least.
        workers: Data loading processes of each training process.
        cores: For each training process.
    """

    def __init__(self, interval_steps: int, *, workers: int, cores: int) -> None:
        self._workers, self._cores = workers, cores
        self._recent: deque[tuple[float, float]] = deque(maxlen=max(interval_steps, _FEWEST_STEPS))
        self._waited_s = self._total_s = 0.0
        self._starting = True

    def start(self) -> None:
        """A new loader begins."""
        self._starting = True

    def note(self, waited_s: float, step_time_s: float) -> None:
        """Count a step.

        Args:
            waited_s: The longest that a rank waited for the data of the step.
            step_time_s: Of the whole step, the wait included.
        """
        if not self._starting:
            self._recent.append((waited_s, step_time_s))
            self._waited_s += waited_s
            self._total_s += step_time_s
        self._starting = False

    @property
    def share(self) -> float | None:
        """Of all steps so far, 0..1; None before the second."""
        return self._waited_s / self._total_s if self._total_s else None

    @property
    def recent_share(self) -> float:
        """Of the last interval, 0..1; 0 as long as there are too few steps to tell."""
        if len(self._recent) < _FEWEST_STEPS:
            return 0.0
        return sum(waited_s for waited_s, _ in self._recent) / sum(step_time_s for _, step_time_s in self._recent)

    def describe(self) -> str:
        """For the progress line: the share of the last interval and the remedy; empty where that is small."""
        share = self.recent_share
        return f"data wait {share:.0%}: {self._short_remedy(share)}" if share > WORTH_TELLING else ""

    def explain(self) -> str:
        """For a warning: the same with all that can be done."""
        return (
            f"{self.recent_share:.0%} of the last {len(self._recent)} steps' time went into waiting for data, with "
            f"data.workers_per_gpu={self._workers} (cores for each training process: {self._cores}). "
            f"{self._long_remedy()} `ds-seg doctor CONFIG --workers N` measures the images/s that storage "
            "and decoding give to N processes."
        )

    def _short_remedy(self, share: float) -> str:
        wanted = self._workers_wanted(share)
        if wanted > self._workers:
            return f"try data.workers_per_gpu={wanted}, now {self._workers}"
        return "no core is left for more workers: faster storage or smaller images"

    def _long_remedy(self) -> str:
        wanted = self._workers_wanted(self.recent_share)
        storage = "copy the dataset to a local disk, or store its images no larger than the crops need."
        if wanted > self._workers:
            return f"Try --cfg-options data.workers_per_gpu={wanted}; where that changes nothing, {storage}"
        return f"More workers would have no core: {storage}"

    def _workers_wanted(self, share: float) -> int:
        """So many that the data would come in time if each brings what one of today's does, as far as cores go."""
        wanted = self._workers / (1 - share) if self._workers else share / (1 - share)
        return min(self._cores, max(math.ceil(wanted), self._workers + 1))
