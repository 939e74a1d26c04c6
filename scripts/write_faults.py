"""Run `pytest tests/faults`, print the fault matrix, and write docs/faults.md from it.

Usage: python scripts/write_faults.py [ROWS]

Every row is a test that passed in that run; nothing else gets into the page. ROWS is the file of an earlier whole run
(`.pytest_cache/v/ds_seg/faults`), to write the page without running the tests again.
"""

from __future__ import annotations

import datetime
import os
import time

from measured_page import ROOT, Row, describe_place, read_or_measure
from prettytable import PrettyTable

PAGE = ROOT / "docs" / "faults.md"
WHOLE_FILES = ("--dist", "loadfile", "--no-loadscope-reorder")
"""A file at a time, in the order of tests/conftest.py: the longest first, so that none is left over at the end."""
PACKAGES = ("torch", "deepspeed", "wandb")
SECTIONS = {
    "test_killed_in_a_step": "SIGKILL in a step",
    "test_killed_in_a_save": "SIGKILL in a save",
    "test_stopped": "Launchers, signals, and what hangs",
    "test_damaged_work_dirs": "Damaged work dirs",
    "test_not_finite": "Not finite",
    "test_full_disk": "Full disks",
    "test_surroundings": "wandb, clock, images, other runs",
    "test_soak": "Soak",
}
COLUMNS = ("fault", "detected in (s)", "processes gone in (s)", "exit code", "lost steps", "resumed equal")
INTRODUCTION = """# Faults

What was done to running trainings, and what became of them. This page is written by `make test-faults` from what
`pytest tests/faults` measured; each row is a test that passed. {when}, {where}, {cores} cores.

Every run is started by the real command line, as two processes (gloo, real ZeRO-3) under torchrun or the deepspeed
launcher. It trains a tiny network, saves every 3 steps and evaluates every 6. Processes are killed and stopped by real
signals, at an exact place in the code or from outside; disks are full, and bits are flipped.

- *Detected in*: from the fault until the output reported it or another process ended. For a fault that a run finds when
  it starts, this includes the start itself (about half of it imports).
- *Processes gone in*: until no process of the run was left, launchers and data workers included. For a run that
  survives its fault, this is the rest of the run. Afterwards nothing of it is left in `/dev/shm` either.
- *Exit code*: of the launcher, as its caller sees it. torchrun ends with 1 whatever its ranks end with; the deepspeed
  launcher passes on the code of a rank; a negative code is the signal that killed the launcher itself.
- *Lost steps*: steps that the resumed run had to make again.
- *Resumed equal*: every row of `metrics.jsonl` (except times and memory) and every tensor of the last checkpoint equal,
  bit for bit, those of an undisturbed run.
"""


def main() -> None:
    """Print the matrix and write the page."""
    began = time.monotonic()
    rows = read_or_measure("faults", "-n", os.environ.get("JOBS", "2"), *WHOLE_FILES, "-m", "", "tests/faults")
    took = f"{(time.monotonic() - began) / 60:.0f} minutes"
    sections: dict[str, list[Row]] = {name: [] for name in SECTIONS}
    for row in rows:
        sections[row["test"].partition(".py")[0].rpartition("/")[2]].append(row)
    print(format_matrix(rows))
    when = datetime.date.today().isoformat()
    parts = [INTRODUCTION.format(when=when, where=describe_place(PACKAGES), cores=os.cpu_count())]
    parts += [format_section(SECTIONS[name], members) for name, members in sections.items() if members]
    PAGE.write_text("\n".join(parts), encoding="utf-8")
    print(f"wrote {PAGE} from {len(rows)} rows in {took}")


def format_matrix(rows: list[Row]) -> str:
    """All rows for a terminal."""
    table = PrettyTable(COLUMNS, align="r")
    table.align["fault"] = "l"
    table.add_rows([format_cells(row) for row in rows])
    return table.get_string()


def format_section(title: str, rows: list[Row]) -> str:
    """A table for the page."""
    lines = [f"## {title}", "", f"| {' | '.join(COLUMNS)} |", f"|---|{'---|' * (len(COLUMNS) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(format_cells(row))} |" for row in rows), ""])


def format_cells(row: Row) -> list[str]:
    """The cells of a row, in the order of COLUMNS."""
    detected = "" if row["detected_s"] is None else f"{row['detected_s']:.1f}"
    equal = "yes" if row["equal"] is True else row["equal"]
    return [row["fault"], detected, f"{row['gone_s']:.1f}", str(row["exit_code"]), str(row["lost_steps"]), equal]


if __name__ == "__main__":
    main()
