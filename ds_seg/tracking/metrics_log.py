"""metrics.jsonl: one JSON object a line, kept consistent over interruptions and resumes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_seg.errors import DataError
from ds_seg.files import write_text_atomic
from ds_seg.tracking.files import to_json_value


class MetricsLog:
    """Appends rows to a file that always equals the one of an uninterrupted run.

    Opening it forgets the rows after the step that the run resumes from. A fresh run (step 0) keeps the file
    of an earlier one beside it as `<name>.previous`.
    """

    def __init__(self, path: str | os.PathLike[str], resume_step: int = 0) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if resume_step == 0 and self.path.exists():
            self.path.replace(self.path.with_name(f"{self.path.name}.previous"))
        elif resume_step > 0:
            kept = [row for row in read_metrics(self.path) if row["step"] <= resume_step]
            write_text_atomic(self.path, "".join(map(_to_line, kept)))
        self._file = self.path.open("a", encoding="utf-8")

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row and flush it; it must have a `step`. NaN and infinities become null."""
        assert "step" in row, f"a row of {self.path.name} has no step: {dict(row)}"
        self._file.write(_to_line(row))
        self._file.flush()

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read the rows of a metrics.jsonl; a last line that a killed run left unfinished is left out.

    Returns:
        The rows in file order; none if there is no file.

    Raises:
        DataError: a line other than the last is no JSON object with a step.
    """
    if not Path(path).exists():
        return []
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
        elif number < len(lines):
            raise DataError(
                f"{os.fspath(path)} line {number} is not a JSON object with a step: {line[:80]!r}. "
                "Delete the line, or move the file away."
            )
    return rows


def _to_line(row: Mapping[str, Any]) -> str:
    return json.dumps(to_json_value(row), allow_nan=False) + "\n"
