"""A run that faults interrupt: lives that go on one from another, compared with one that nothing disturbed."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint_hash import hash_tensors
from ds_seg.checkpoint.store import checkpoint_step, list_checkpoints
from ds_seg.tracking.metrics_log import read_metrics
from life import Ending, Life
from run_rows import read_rows

SAVE_INTERVAL_STEPS = 3
EVALUATION_INTERVAL_STEPS = 6
GONE_WITHIN_S = 60
"""On a busy machine; docs/faults.md has what it takes on one that is not."""
_START = re.compile(r"^steps (\d+) to \d+", re.MULTILINE)
RecordRow = Callable[..., None]


@dataclass(frozen=True)
class Reference:
    """A run that nothing disturbed.

    Attributes:
        config: what it and the disturbed runs train.
        environment: variables that they need.
        data: the images that they read.
        steps: how many it made.
        rows: of its metrics.jsonl, without the clock's.
        hashes: of its checkpoints' tensors, by step.
    """

    config: Path
    environment: dict[str, str]
    data: Path
    steps: int
    rows: list[dict[str, Any]]
    hashes: dict[int, str]


class Story:
    """One work dir and the lives that it sees.

    Args:
        reference: what the run is compared with.
        folder: gets what is printed.
        record: keeps a row of docs/faults.md.
        work_dir: None: a new one in `folder`.
    """

    def __init__(self, reference: Reference, folder: Path, record: RecordRow, work_dir: Path | None = None) -> None:
        self.reference, self.folder, self.record = reference, folder, record
        self.work_dir = work_dir or folder / "run"
        self._open: list[dict[str, Any]] = []
        self._step_before = self.last_step

    @property
    def last_step(self) -> int:
        """The last step that the run has logged."""
        return max((row["step"] for row in read_metrics(self.work_dir / "metrics.jsonl")), default=0)

    def start(self, *options: object, environment: dict[str, str] | None = None, **life: Any) -> Life:
        """Start the run, or let it go on from its newest checkpoint."""
        self._step_before = self.last_step
        arguments = ["train", self.reference.config, "--work-dir", self.work_dir, "--resume", "auto", *options]
        env = {**self.reference.environment, **(environment or {})}
        return Life(*arguments, folder=self.folder, environment=env, **life)

    def wait_for_steps(self, life: Life, steps: int) -> None:
        """Wait until a life has made so many steps beyond all earlier ones."""
        life.wait_for_row(self.work_dir, self._step_before + steps)

    def interrupted(
        self,
        fault: str,
        ending: Ending,
        *,
        exit_code: int | None = None,
        lost_at_most_steps: int = SAVE_INTERVAL_STEPS,
        right_until_step: int | None = None,
    ) -> None:
        """Take down a life that a fault has ended; the next one will show what was lost.

        Args:
            fault: what happened, in words.
            ending: how it ended.
            exit_code: wanted; None: any but 0.
            lost_at_most_steps: a bound, kept by the next life.
            right_until_step: where the fault makes steps differ from the reference's; None: it does not.
        """
        self._compare(ending, right_until_step)
        right = ending.exit_code == exit_code if exit_code is not None else ending.exit_code != 0
        assert right, f"{fault}: exit code {ending.exit_code}\n{ending.output[-4000:]}"
        assert ending.gone_s < GONE_WITHIN_S, f"{fault}: the last process was gone after {ending.gone_s:.0f} s"
        self._open.append({"fault": fault, **ending.figures(), "lost_at_most_steps": lost_at_most_steps})

    def survived(self, fault: str, ending: Ending) -> None:
        """Take down a fault that the run has got over by itself: it ends as if nothing had been."""
        self.ended(ending)
        self.record(fault=fault, **ending.figures(), lost_steps=self.lost_steps(ending), equal=True)

    def complete(self, *options: object) -> None:
        """Let the run go to its end undisturbed, compare it with the reference, and keep all rows."""
        self.ended(self.start(*options).finish())
        for row in self._open:
            lost_at_most_steps = row.pop("lost_at_most_steps")
            assert row["lost_steps"] <= lost_at_most_steps, row
            self.record(**row, equal=True)

    def ended(self, ending: Ending) -> None:
        """Compare a run that has reached its last step with the reference."""
        assert ending.exit_code == 0, ending.output[-4000:]
        self._compare(ending)
        assert read_rows(self.work_dir) == self.reference.rows
        newest = list_checkpoints(self.work_dir)[-1]
        assert hash_tensors(newest) == self.reference.hashes[self.reference.steps]

    def lost_steps(self, ending: Ending) -> int:
        """How many steps that had been made before, a life had to make again."""
        started = _START.search(ending.output)
        assert started, f"the run did not get to its first step:\n{ending.output[-4000:]}"
        return max(self._step_before - int(started.group(1)), 0)

    def _compare(self, ending: Ending, until_step: int | None = None) -> None:
        """Compare what a life has added with the reference, and note what the life before it had lost."""
        rows = [row for row in read_rows(self.work_dir) if until_step is None or row["step"] <= until_step]
        assert rows == self.reference.rows[: len(rows)], f"differs from the uninterrupted run\n{ending.output[-4000:]}"
        for checkpoint in list_checkpoints(self.work_dir)[-1:]:
            wanted = self.reference.hashes.get(checkpoint_step(checkpoint))
            assert wanted is None or hash_tensors(checkpoint) == wanted, f"{checkpoint} differs from the uninterrupted"
        if self._open and "lost_steps" not in self._open[-1]:
            self._open[-1]["lost_steps"] = self.lost_steps(ending)
