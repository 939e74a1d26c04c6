"""Ranges of the training stream that a run leaves out, counted in global batches."""

from __future__ import annotations

from collections.abc import Iterable

BatchRange = tuple[int, int]
"""First and last global batch."""


def find_batch(step: int, left_out: Iterable[BatchRange]) -> int:
    """The global batch that step `step` trains on: the step-th of those that are not left out.

    Args:
        step: from 0.
        left_out: disjoint ranges in rising order, as `leave_out` returns them.
    """
    batch = step
    for first, last in left_out:
        if batch >= first:
            batch += last - first + 1
    return batch


def leave_out(left_out: Iterable[BatchRange], first_step: int, last_step: int) -> list[BatchRange]:
    """The ranges, with the batches of some steps and what was left out between them added.

    Args:
        left_out: as it was when those steps were made.
        first_step: first step whose batch goes.
        last_step: last one.
    """
    left_out = list(left_out)
    first, last = find_batch(first_step, left_out), find_batch(last_step, left_out)
    kept = [(begin, end) for begin, end in left_out if end < first or begin > last]
    return sorted([*kept, (first, last)])
