"""Records that could not be written: counted, told at the first and at the end, and never a reason to stop training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable


class LostRecords:
    """Writes what a run can do without, and counts what the disk did not take.

    Args:
        warn: prints a message that wants attention.

    Attributes:
        counts: kind of record -> how many were lost.
    """

    def __init__(self, warn: Callable[[str], None]) -> None:
        self.counts: Counter[str] = Counter()
        self._warn = warn

    def attempt(self, kind: str, write: Callable[[], object]) -> bool:
        """Write one record of a kind, named in the plural; whether that worked."""
        try:
            write()
        except OSError as error:
            if not self.counts:
                self._warn(
                    f"{kind} can't be written ({error}). Training goes on and counts what is lost; a checkpoint that "
                    "can't be written will stop it. Make space, or make the folder writable."
                )
            self.counts[kind] += 1
            return False
        return True

    def tell(self) -> None:
        """Print how much was lost, if anything was."""
        if self.counts:
            listed = ", ".join(f"{count} {kind}" for kind, count in sorted(self.counts.items()))
            self._warn(f"lost because they could not be written: {listed}")
