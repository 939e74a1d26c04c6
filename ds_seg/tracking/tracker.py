"""One place that a loop reports to: metrics.jsonl, the console, wandb and the prediction pictures."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_seg.config.hooks import WandbSettings
from ds_seg.evaluation.pictures import Palette, Picture, draw_comparison, save_picture
from ds_seg.tracking.console import Console
from ds_seg.tracking.lost_records import LostRecords
from ds_seg.tracking.metrics_log import MetricsLog
from ds_seg.tracking.wandb_run import WandbRun, start_wandb


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
    """The main rank's tracker; it owns what it is built from.

    Args:
        work_dir: Folder of the run; pictures go to its `predictions`.
        metrics: Receives every row.
        console: Shows every row.
        wandb_run: None where wandb is off.
        log_interval: Steps between rows that are recorded, besides the first and the last.
        total_steps: Last step of the run.
        class_names: In the order of the class ids.
        palette: RGB colour of each class.
    """

    def __init__(
        self,
        work_dir: Path,
        metrics: MetricsLog,
        console: Console,
        wandb_run: WandbRun | None,
        *,
        log_interval: int,
        total_steps: int,
        class_names: Sequence[str],
        palette: Palette,
    ) -> None:
        self._work_dir = work_dir
        self._metrics = metrics
        self._console = console
        self._wandb = wandb_run
        self._log_interval = log_interval
        self._total_steps = total_steps
        self._class_names = class_names
        self._palette = palette
        self._lost = LostRecords(console.warn)

    def info(self, text: str) -> None:
        """Print a message."""
        self._console.info(text)

    def warn(self, text: str) -> None:
        """Print a message that wants attention."""
        self._console.warn(text)

    def log_step(self, row: Mapping[str, Any], note: str = "") -> None:
        """Record a step if it is the first, the last or one of every `log_interval`."""
        step = row["step"]
        if step % self._log_interval and step not in (1, self._total_steps):
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
            path = self._work_dir / "predictions" / f"{name}.png"
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


def build_tracker(
    work_dir: Path,
    *,
    is_main: bool,
    total_steps: int,
    log_interval: int,
    wandb_settings: WandbSettings,
    resume_step: int,
    run_config: Mapping[str, Any],
    class_names: Sequence[str],
    palette: Palette,
) -> Tracker:
    """Build the tracker of this rank.

    Args:
        work_dir: Folder of the run.
        is_main: Whether this is global rank 0; the others get a tracker that does nothing.
        total_steps: Last step of the run.
        log_interval: Steps between recorded rows, at least 1.
        wandb_settings: See there.
        resume_step: Step that the run resumes from; 0 for a fresh one.
        run_config: Shown in wandb.
        class_names: In the order of the class ids.
        palette: RGB colour of each class.
    """
    if not is_main:
        return Tracker()
    console = Console(total_steps, resume_step)
    metrics = MetricsLog(work_dir / "metrics.jsonl", resume_step)
    wandb_run = start_wandb(
        work_dir, wandb_settings, run_config, resumed=resume_step > 0, info=console.info, warn=console.warn
    )
    return MainTracker(
        work_dir,
        metrics,
        console,
        wandb_run,
        log_interval=log_interval,
        total_steps=total_steps,
        class_names=class_names,
        palette=palette,
    )
