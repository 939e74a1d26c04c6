"""Config faults, gathered so that one run tells the user about all of them."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from ds_seg.errors import ConfigError, count

_LARGEST_NUMBER = sys.float_info.max
_LARGEST_INTEGER = 2**63 - 1
"""Of 64 bits with a sign, as torch has them."""

OF_A_BASE = "What comes from _base_ goes with _delete_=True in your own file's section"


def suggest(name: str, known: Iterable[str]) -> str:
    """A hint like ` Did you mean 'optimizer'?`, or an empty string where nothing is close or begins so."""
    names, given = {one.lower(): one for one in known}, name.lower()
    close = [one for one in names if len(given) > 2 and one.startswith(given)]
    close += difflib.get_close_matches(given, names, n=1, cutoff=0.6)
    return f" Did you mean '{names[close[0]]}'?" if close else ""


def describe_unknown_key(key: str, known: Iterable[str]) -> str:
    """What is said of a key that means nothing, without a full stop."""
    known = list(known)
    return f"unknown key.{suggest(key, known)} Known here: {', '.join(sorted(known))}"


def list_fields(field: str, value: Any) -> list[tuple[str, Any]]:
    """What may stand alone or in a list, each with its dotted field; empty where there is nothing."""
    if isinstance(value, (list, tuple)):
        return [(f"{field}[{index}]", item) for index, item in enumerate(value)]
    return [(field, value)] if value else []


class Faults:
    """Collects messages that each start with a dotted config field; raises them as one error."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.messages: list[str] = []

    def add(self, field: str, message: str) -> None:
        """Note one fault of `field`."""
        self.messages.append(f"{field}: {message}")

    def section(
        self, field: str, value: Any, known: Iterable[str] | None, *, replaces: bool = False
    ) -> Mapping[str, Any]:
        """`value` as a dict (None counts as an empty one), with a fault for every key that is not in `known`.

        `known=None` takes any key. With `replaces` the message tells how to get rid of a base's keys.
        """
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            self.add(field, f"got {value!r}, want a dict.")
            return {}
        known = list(value if known is None else known)
        for key in value:
            if key not in known:
                hint = f" {OF_A_BASE}." if replaces else ""
                self.add(f"{field}.{key}", f"{describe_unknown_key(key, known)}.{hint}")
        return value

    def number(
        self,
        field: str,
        section: Mapping[str, Any],
        default: float,
        *,
        minimum: float,
        maximum: float = _LARGEST_NUMBER,
    ) -> float:
        """The number at the last part of `field`, or `default`; a fault if it is none or out of range."""
        value = section.get(field.rpartition(".")[2], default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.add(field, f"got {value!r}, want a number.")
            return default
        if not minimum <= value <= maximum:
            bounded = maximum < _LARGEST_NUMBER
            limit = f"between {minimum:g} and {maximum:g}" if bounded else f"at least {minimum:g}, and finite"
            self.add(field, f"got {value!r}, want {limit}.")
            return default
        return value

    def integer(self, field: str, section: Mapping[str, Any], default: int, *, minimum: int) -> int:
        """The whole number at the last part of `field`, or `default`; a fault if it is none, too small or too large."""
        value = section.get(field.rpartition(".")[2], default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            self.add(field, f"got {value!r}, want a whole number of at least {minimum}.")
            return default
        if value > _LARGEST_INTEGER:
            self.add(field, f"got {value!r}, want a whole number of at most {_LARGEST_INTEGER}.")
            return default
        return value

    def flag(self, field: str, section: Mapping[str, Any], default: bool) -> bool:
        """The boolean at the last part of `field`, or `default`; a fault if it is none."""
        value = section.get(field.rpartition(".")[2], default)
        if not isinstance(value, bool):
            self.add(field, f"got {value!r}, want True or False.")
            return default
        return value

    def text(self, field: str, section: Mapping[str, Any]) -> str | None:
        """The string at the last part of `field`; None where there is none, and a fault if it is anything else."""
        value = section.get(field.rpartition(".")[2])
        if value is not None and not isinstance(value, str):
            self.add(field, f"got {value!r}, want a string.")
            return None
        return value or None

    def size_px(self, field: str, value: Any, *, multiple: int) -> None:
        """A fault if `value` is no height and width in pixels (or one for both), or no `multiple` of the patch."""
        sizes = value if isinstance(value, (tuple, list)) else (value, value)
        if len(sizes) != 2 or not all(isinstance(length, int) and length > 0 for length in sizes):
            self.add(field, f"got {value!r}, want (height, width) in pixels.")
        elif any(length % multiple for length in sizes):
            nearest = tuple(max(multiple, round(length / multiple) * multiple) for length in sizes)
            self.add(
                field,
                f"got {tuple(sizes)}, want multiples of the backbone's {multiple} px patch; the nearest are {nearest}.",
            )

    def raise_if_any(self) -> None:
        """Raise all faults as one.

        Raises:
            ConfigError: at least one fault was noted.
        """
        if not self.messages:
            return
        listed = "\n".join(f"  - {message}" for message in self.messages)
        raise ConfigError(f"{count(len(self.messages), 'fault')} in {self.source}:\n{listed}")
