"""Which ranks have stopped, judged from their heartbeats; pure functions of what was observed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ds_seg.supervision.heartbeat import Beat

_NAMED_AT_MOST = 8


@dataclass
class Ages:
    """How long each rank has shown no beat and no progress.

    Time counts only as long as this process runs: after a suspended machine or a Ctrl-Z all ranks start where they
    were.
    """

    silent_s: dict[int, float] = field(default_factory=dict)
    idle_s: dict[int, float] = field(default_factory=dict)
    _seen: dict[int, Beat] = field(default_factory=dict)

    def observe(self, beats: Mapping[int, Beat], elapsed_s: float) -> None:
        """Take in the newest beats.

        Args:
            beats: by rank.
            elapsed_s: since the last call, while this process ran.
        """
        for rank, beat in beats.items():
            seen = self._seen.get(rank)
            moved = seen is None or beat.ticks != seen.ticks
            beaten = seen is None or beat.number != seen.number
            self.silent_s[rank] = 0.0 if beaten else self.silent_s[rank] + elapsed_s
            self.idle_s[rank] = 0.0 if moved else self.idle_s[rank] + elapsed_s
        self._seen = dict(beats)


def find_silent(beats: Mapping[int, Beat], ages: Ages, timeout_s: float) -> list[int]:
    """Ranks whose process does not even beat: stopped, or gone with its machine.

    A thread of its own beats, however slow the work beside it is, so no phase has more patience than another.
    """
    return [rank for rank in beats if ages.silent_s[rank] > timeout_s]


def find_stuck(beats: Mapping[int, Beat], ages: Ages, timeout_s: float) -> list[int]:
    """Ranks that beat but don't get on, and that all others wait for.

    Phases are entered in the same order everywhere, so it is those that have entered the fewest. As long as one of
    them gets on, the rest may be waiting for that one. Of several in the same phase, those that are not in a
    collective are to blame, if there are such.
    """
    lowest = min(beat.position for beat in beats.values())
    last = {rank: beat for rank, beat in beats.items() if beat.position == lowest}
    patience = max(beat.patience for beat in last.values())
    if any(ages.idle_s[rank] <= timeout_s * patience for rank in last):
        return []
    return [rank for rank, beat in last.items() if not beat.in_collective] or list(last)


def describe_silent(ranks: list[int], beats: Mapping[int, Beat], ages: Ages) -> str:
    """A line for each of those that do not beat."""
    return _list(
        [
            f"rank {rank}: no heartbeat for {ages.silent_s[rank]:.0f} s: its process is stopped or its machine is "
            f"gone; last seen in: {_where(beats[rank])}"
            for rank in ranks
        ]
    )


def describe_stuck(ranks: list[int], beats: Mapping[int, Beat], ages: Ages) -> str:
    """A line for each of those that do not get on."""
    return _list(
        [f"rank {rank}: no progress for {ages.idle_s[rank]:.0f} s in: {_where(beats[rank])}" for rank in ranks]
    )


def _where(beat: Beat) -> str:
    return f"{beat.phase} (for {beat.phase_s:.0f} s; main thread at {beat.place})"


def _list(lines: list[str]) -> str:
    rest = [f"and {len(lines) - _NAMED_AT_MOST} more ranks"] if len(lines) > _NAMED_AT_MOST else []
    return "\n".join(f"  {line}" for line in [*lines[:_NAMED_AT_MOST], *rest])
