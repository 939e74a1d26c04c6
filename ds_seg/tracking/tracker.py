"""One place that a loop reports to: metrics.jsonl, the console, wandb and the prediction pictures."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ds_seg import distributed
from ds_seg.config import RunConfig
from ds_seg.evaluation.pictures import Palette, Picture, draw_comparison, save_picture
from ds_seg.tracking.console import Console
from ds_seg.tracking.lost_records import LostRecords
from ds_seg.tracking.metrics_log import MetricsLog
from ds_seg.tracking.wandb_run import start_wandb


class Tracker:
    """Where a run reports to. This one, for every rank but the main one, does nothing."""

    def info(self, text: str) -> None:
        """Print a message."""

    def warn(self, text: str) -> None:
        """Print a message that wants attention."""

    def log_step(self, row: Mapping[str, Any], note: str = "") -> None:
        """Record a step; `row` has `step` and the keys of metrics.jsonl, `note` is for the console alone."""

    def log_evaluation(self, step: int, metrics: Mapping[str, float | None], table: str) -> None:
        """Record an evaluation: `EvaluationResult.metrics()` and `.table()`."""

    def log_pictures(self, step: int, pictures: Sequence[Picture]) -> None:
        """Record predictions as pictures; those of an earlier step with the same name are replaced on disk."""

    def rewind(self, step: int, *, evaluated: bool = True) -> None:
        """Forget the rows after a step: the run goes on from there, and unless `evaluated` with its evaluation."""

    def write(self, kind: str, action: Callable[[], object]) -> bool:
        """Write another record that the run can do without, and say whether that worked.

        Args:
            kind: names such records in the plural.
            action: writes it.
        """
        return False

    @property
    def lost(self) -> dict[str, int]:
        """Kinds of records of which some could not be written -> how many."""
        return {}

    def close(self, status: str) -> None:
        """End the records; wandb shows a run that is not `done` as failed, one that was `stopped` as preempted."""


class MainTracker(Tracker):
    """The main rank's tracker.

    Args:
        run: Whose work dir gets the records.
        resume_step: Step that the run goes on from; 0 for a fresh one.
        class_names: In the order of the class ids.
        palette: RGB colour of each class.
    """

    def __init__(self, run: RunConfig, resume_step: int, class_names: Sequence[str], palette: Palette) -> None:
        self._run, self._class_names, self._palette = run, class_names, palette
        self._console = console = Console(run.schedule.max_steps, resume_step)
        self._metrics = MetricsLog(run.work_dir / "metrics.jsonl", resume_step)
        self._lost = LostRecords(console.warn)
        shown = {"name": run.name, "config": run.mmseg.to_dict(), "deepspeed": run.deepspeed}
        self._wandb = start_wandb(
            run.work_dir, run.wandb, shown, resumed=resume_step > 0, info=console.info, warn=console.warn
        )

    def info(self, text: str) -> None:
        """Print a message."""
        self._console.info(text)

    def warn(self, text: str) -> None:
        """Print a message that wants attention."""
        self._console.warn(text)

    def log_step(self, row: Mapping[str, Any], note: str = "") -> None:
        """Record a step if it is the first, the last or one of every `log_config.interval`."""
        step = row["step"]
        if step % self._run.log_interval_steps and step not in (1, self._run.schedule.max_steps):
            return
        self._append(row)
        self._console.log_step(row, note)
        if self._wandb is not None:
            self._wandb.log_step(row)

    def log_evaluation(self, step: int, metrics: Mapping[str, float | None], table: str) -> None:
        """Record an evaluation and print its table."""
        self._append({"step": step, **metrics})
        self._console.log_evaluation(step, metrics, table)
        if self._wandb is not None:
            self._wandb.log_evaluation(step, metrics)

    def log_pictures(self, step: int, pictures: Sequence[Picture]) -> None:
        """Write `predictions/<name>.png` comparisons and send the pictures to wandb."""
        for name, image_HW3, prediction_HW, label_HW in pictures:
            comparison_HW3 = draw_comparison(image_HW3, prediction_HW, label_HW, self._palette, self._class_names)
            path = self._run.work_dir / "predictions" / f"{name}.png"
            self._lost.attempt("pictures", functools.partial(save_picture, comparison_HW3, path))
        if self._wandb is not None:
            self._wandb.log_pictures(step, pictures, self._class_names, self._palette)

    def rewind(self, step: int, *, evaluated: bool = True) -> None:
        """Forget the rows after a step; wandb keeps its own and gets the new ones beside them."""
        self._metrics.rewind(step, evaluated=evaluated)

    def write(self, kind: str, action: Callable[[], object]) -> bool:
        """Write another record, and count it if that fails."""
        return self._lost.attempt(kind, action)

    @property
    def lost(self) -> dict[str, int]:
        """Kinds of records of which some could not be written -> how many."""
        return dict(self._lost.counts)

    def _append(self, row: Mapping[str, Any]) -> None:
        self._lost.attempt("rows of metrics.jsonl", lambda: self._metrics.append(row))

    def close(self, status: str) -> None:
        """Close the files, the bar and the wandb run, and tell what was lost."""
        self._metrics.close()
        self._lost.tell()
        self._console.close()
        if self._wandb is not None:
            self._wandb.finish(status)


def build_tracker(run: RunConfig, resume_step: int, class_names: Sequence[str], palette: Palette) -> Tracker:
    """The tracker of this rank: `MainTracker` on global rank 0, one that does nothing elsewhere."""
    return MainTracker(run, resume_step, class_names, palette) if distributed.is_main() else Tracker()
