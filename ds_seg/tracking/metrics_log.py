"""metrics.jsonl: one JSON object a line, kept consistent over interruptions and resumes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_seg.errors import DataError
from ds_seg.tracking.files import to_json_value


class MetricsLog:
    """Appends rows to a file that always equals the one of an uninterrupted run.

    Opening it forgets the rows after the step that the run resumes from; those of another run are set aside before.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        self.path = path
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab", buffering=0)
        self.rewind(resume_step)

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row, whole or not at all; it must have a `step`. NaN and infinities become null.

        Raises:
            OSError: the row could not be written; the file is as it was, and can be appended to once there is space.
        """
        assert "step" in row, f"a row of {self.path.name} has no step: {dict(row)}"
        line = _to_line(row)
        size_bytes = os.fstat(self._file.fileno()).st_size
        try:
            while line:  # a disk that fills up takes a part of a line without an error
                line = line[self._file.write(line) :]
        except OSError:
            os.ftruncate(self._file.fileno(), size_bytes)
            raise

    def rewind(self, step: int, *, evaluated: bool = True) -> None:
        """Forget the rows after a step, and a last line that was left unfinished. Takes no space on the disk.

        Args:
            step: the last one whose rows stay.
            evaluated: whether its evaluation stays too.
        """
        kept_bytes = 0
        for row, end_bytes in _read_rows(self.path):
            if row["step"] > step or (row["step"] == step and not evaluated and "loss" not in row):
                break
            kept_bytes = end_bytes
        os.ftruncate(self._file.fileno(), kept_bytes)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a metrics.jsonl; a last line that a killed run left unfinished is left out.

    Returns:
        The rows in file order; none if there is no file.

    Raises:
        DataError: a line other than the last is no JSON object with a step.
    """
    return [row for row, _ in _read_rows(path)]


def _read_rows(path: Path) -> list[tuple[dict[str, Any], int]]:
    """The rows, each with the number of bytes up to its end."""
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    rows: list[tuple[dict[str, Any], int]] = []
    end_bytes = 0
    for number, line in enumerate(lines, start=1):
        end_bytes += len(line)
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int) and line.endswith(b"\n"):
            rows.append((row, end_bytes))
        elif number < len(lines):
            text = line.decode(errors="replace").rstrip("\n")
            raise DataError(
                f"{path} line {number} is not a JSON object with a step: {text[:80]!r}. "
                "Delete the line, or move the file away."
            )
    return rows


def _to_line(row: Mapping[str, Any]) -> bytes:
    return (json.dumps(to_json_value(row), allow_nan=False) + "\n").encode()
