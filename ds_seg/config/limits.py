"""Limits of time from the command line: when a run must have ended, and how long a rank may stand still."""

from __future__ import annotations

import math
import re

from ds_seg.config.faults import Faults

WATCHDOG_TIMEOUT_S = 600.0
_MAX_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<hours>\d+):(?P<minutes>[0-5]?\d)(?::(?P<seconds>[0-5]?\d))?")


def read_max_time(given: str | None, faults: Faults) -> float | None:
    """`--max-time` in seconds: HH:MM, HH:MM:SS, D-HH:MM or D-HH:MM:SS; None where it is not given."""
    if given is None:
        return None
    match = _MAX_TIME.fullmatch(given)
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups()) if match else (0, 0, 0, 0)
    total_s = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if total_s == 0:
        faults.add("--max-time", f"got {given!r}, want HH:MM, HH:MM:SS or D-HH:MM[:SS] above zero, such as 23:30.")
        return None
    return float(total_s)


def read_watchdog_timeout(given: float | None, faults: Faults) -> float:
    """`--watchdog-timeout` in seconds; 0 turns the watchdog off."""
    name = "--watchdog-timeout"
    return faults.number(
        name, {name: WATCHDOG_TIMEOUT_S if given is None else given}, 0.0, minimum=0.0, maximum=math.inf
    )
