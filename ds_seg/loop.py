"""The training loop: batches in, steps made, and every so often a row, an evaluation or a checkpoint out."""

from __future__ import annotations

import contextlib
import copy
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ds_seg import distributed
from ds_seg.checkpoint import CheckpointSaver, TrainingState, checkpoint_name, list_checkpoints
from ds_seg.config import RunConfig
from ds_seg.data.bad_samples import note_bad_samples
from ds_seg.data.training_batches import MicroBatch
from ds_seg.engine.ema import WeightAverages
from ds_seg.engine.engines import Engines
from ds_seg.engine.step import StepResult, TwoEngineStep
from ds_seg.errors import TrainingDiverged
from ds_seg.evaluation.evaluate import EvaluationResult
from ds_seg.supervision import stop
from ds_seg.supervision.progress import SLOW, enter_phase
from ds_seg.tracking.data_wait import DataWait
from ds_seg.tracking.tracker import Tracker

Evaluate = Callable[[int], EvaluationResult]


@dataclass
class LoopRecord:
    """What the summary needs to know of a loop."""

    step_times_s: list[float] = field(default_factory=list)
    data_wait_share: float | None = None
    """Of the steps' time, 0..1, on the rank that waited longest; None before the second step."""
    evaluation: EvaluationResult | None = None
    stopped: str | None = None
    """Why the loop ended before the last step, and how to go on; None if it did not."""


class TrainingLoop:
    """Runs a training from `state.step` to the last step.

    Args:
        run: the run.
        engines: both engines, on the weights of `state`.
        state: where the run stands; moved on with every step.
        tracker: gets rows and evaluations.
        evaluate: evaluates the engines after the given number of steps.
        ema: averages of the weights, moved on with every step that was not skipped; None where there are none.
        saved_in: the checkpoint in the work dir that holds engines and state as they are; None where there is none.
    """

    def __init__(
        self,
        run: RunConfig,
        engines: Engines,
        state: TrainingState,
        tracker: Tracker,
        evaluate: Evaluate,
        ema: WeightAverages | None = None,
        saved_in: Path | None = None,
    ) -> None:
        self.run, self.engines, self.state, self.tracker, self.evaluate = run, engines, state, tracker, evaluate
        self.ema = ema
        self.record = LoopRecord()
        self._train_step = TwoEngineStep(engines, run)
        self._saver = CheckpointSaver(engines, run, ema, tracker.info)
        self._saved, self._saved_state = saved_in, copy.deepcopy(state)
        self._data_wait = DataWait(
            run.log_interval_steps,
            workers=run.workers,
            cores=distributed.cores_per_process(),
        )
        self._told_of_data_wait = False

    def __call__(self, loader: Iterable[MicroBatch]) -> LoopRecord:
        """Train to the end, or until the run is to stop, which saves a checkpoint.

        A run that is resumed at its end is evaluated once more: its summary may have been written, or not.

        Args:
            loader: micro-batches from `state.step` on.

        Raises:
            CheckpointError: a checkpoint could not be written.
            TrainingDiverged: too many steps in a row were not finite; `state` tells which.
            DataError: more samples could not be read than the run may replace.
        """
        if not self._is_saved():  # after a rollback the same step comes again, from other data
            self._saved = None
        self._data_wait.start()
        with contextlib.closing(stop.Leavable(loader)) as batches:
            try:
                if self.state.evaluation_due or self.state.step >= self.run.schedule.max_steps:
                    self.tracker.rewind(self.state.step, evaluated=False)
                    self._evaluate_and_save()
                while self.state.step < self.run.schedule.max_steps:
                    self._one_step(batches)
            except stop.StopRequested:
                self.record.stopped = self._stop()
            self._saver.wait()
        return self.record

    def _one_step(self, batches: Iterator[MicroBatch]) -> None:
        started = time.perf_counter()
        micro_batches, waited_s, longest_wait_s = self._fetch(batches)
        self._note_bad_samples(micro_batches)
        result = self._train_step(self.state.step, micro_batches, scheduled_steps=self.state.scheduled_steps)
        if self.ema is not None and not result.skipped:
            self.ema.update(self.state.scheduled_steps)
        step_time_s = time.perf_counter() - started
        self.record.step_times_s.append(step_time_s)
        stop.pace.note_step(step_time_s)
        self._count(result)
        self.tracker.log_step(
            self._row(result, step_time_s, waited_s), self._note_data_wait(longest_wait_s, step_time_s)
        )
        self._evaluate_and_save()

    def _note_data_wait(self, longest_wait_s: float, step_time_s: float) -> str:
        """What the progress line is to tell of it."""
        self._data_wait.note(longest_wait_s, step_time_s)
        self.record.data_wait_share = self._data_wait.share
        told = self._data_wait.describe()
        if told and not self._told_of_data_wait:
            self._told_of_data_wait = True
            self.tracker.warn(self._data_wait.explain())
        return told

    def _note_bad_samples(self, micro_batches: list[MicroBatch]) -> None:
        most = self.run.max_bad_samples
        if most:
            met = [bad for batch in micro_batches for bad in batch.replaced]
            self.state.bad_samples = note_bad_samples(self.state.bad_samples, met, most, self.tracker.warn)

    def _fetch(self, batches: Iterator[MicroBatch]) -> tuple[list[MicroBatch], float, float]:
        """The micro-batches of a step, if all ranks have theirs and none is to stop.

        A rank that waits for its data can still agree to stop, because no rank begins a step before all have agreed.

        Returns:
            The micro-batches, the seconds that they took this rank, and those that they took the slowest.

        Raises:
            StopRequested: on all ranks alike.
        """
        enter_phase(f"waiting for the data of step {self.state.step + 1}")
        started = time.perf_counter()
        try:
            micro_batches = [next(batches) for _ in range(self.run.accumulation_steps)]
        except stop.StopRequested:
            micro_batches = []
        waited_s = time.perf_counter() - started
        enter_phase(f"agreeing to begin step {self.state.step + 1}")
        own = torch.tensor([stop.requested() is not None, waited_s], dtype=torch.float64, device=distributed.device())
        stopping, longest_wait_s = distributed.reduce_max(own).tolist()
        if stopping:
            raise stop.StopRequested
        return micro_batches, waited_s, longest_wait_s

    def _count(self, result: StepResult) -> None:
        state = self.state
        state.step += 1
        if not result.skipped:
            state.scheduled_steps += 1
            state.skipped_in_a_row = 0
            return
        state.skipped_steps += 1
        state.skipped_in_a_row += 1
        self.tracker.warn(
            f"step {state.step} skipped in both engines: loss {result.losses['loss']:g}, "
            f"gradient norm {result.grad_norm:g} ({state.skipped_steps} skipped so far)"
        )
        if state.skipped_in_a_row >= self.run.max_skipped_steps:
            self._saver.wait()
            raise TrainingDiverged(self._describe_divergence())

    def _describe_divergence(self) -> str:
        state = self.state
        before = list_checkpoints(self.run.work_dir, state.step - state.skipped_in_a_row)
        last = f"The last checkpoint before them is {before[-1]}" if before else "No checkpoint was saved before them"
        return (
            f"Loss or gradient was not finite in {state.skipped_in_a_row} steps in a row, the last at step "
            f"{state.step}. {last}. Lower optimizer.lr, set optimizer_config.grad_clip.max_norm, look for damaged "
            "images (ds_seg checks annotations at start unless check_data=False), or let --on-divergence rollback "
            "leave such data out."
        )

    def _row(self, result: StepResult, step_time_s: float, waited_s: float) -> dict[str, float | int]:
        rates = [group["lr"] for group in self.engines.param_groups]
        return {
            "step": self.state.step,
            **result.losses,
            "lr_min": min(rates),
            "lr_max": max(rates),
            "grad_norm": result.grad_norm,
            "grad_norm_clipped": result.grad_norm * result.clip_factor,
            "images_per_s": self.run.global_batch / step_time_s,
            "data_wait_s": waited_s,
            "memory_gib": memory_gib(),
        }

    def _evaluate_and_save(self) -> None:
        """Save before the evaluation, so that nothing that goes wrong there costs a step, and amend it with the result.

        Until then the checkpoint says that the evaluation is due, and a run resumed from it makes it first.
        """
        self._saver.poll()
        saving, improved = self._is_due(self.run.checkpoints.interval_steps), False
        if self.state.evaluation_due or self._is_due(self.run.evaluation.interval_steps):
            self.state.evaluation_due = True
            if saving and not self._is_saved():
                self._save()
            improved = self._evaluate()
            self.state.evaluation_due = False
        if improved or saving:
            self._save()

    def _evaluate(self) -> bool:
        """Evaluate, and say whether the result is the best so far and to be saved."""
        result = self.evaluate(self.state.step)
        self.record.evaluation = result
        self.tracker.log_evaluation(self.state.step, result.metrics(), result.table())
        if fault := result.describe_fault():
            self.tracker.warn(fault)
        return self._is_best(result)

    def _is_best(self, result: EvaluationResult) -> bool:
        state, metric = self.state, self.run.evaluation.save_best
        if metric is None:
            return False
        score: float = getattr(result, metric)
        best = -1.0 if state.best_score is None or state.best_metric != metric else state.best_score
        if score > best:
            state.best_metric, state.best_score = metric, score
            state.best_checkpoint = checkpoint_name(state.step)
        return score > best

    def _save(self) -> Path:
        if self._saved is None or self._saved_state != self.state:
            enter_phase(f"saving after step {self.state.step}", patience=SLOW)
            if self._saved is None or not (self._is_saved() and self._saver.amend(self.state)):
                self._saved = self._saver.save(self.state)
            self._saved_state = copy.deepcopy(self.state)
        return self._saved

    def _is_saved(self) -> bool:
        return self._saved is not None and self._saved_state.step == self.state.step

    def _stop(self) -> str:
        folder = self._save()
        return (
            f"Stopped by {stop.requested() or 'a stop of another rank'} after step {self.state.step} of "
            f"{self.run.schedule.max_steps}; everything is saved in {folder}. Run the same command with --resume auto "
            "to go on."
        )

    def _is_due(self, interval_steps: int) -> bool:
        return self.state.step % interval_steps == 0 or self.state.step >= self.run.schedule.max_steps


def memory_gib() -> float:
    """Peak memory of this process so far: the GPU's where it trains on one, else the resident set."""
    if distributed.device().type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
