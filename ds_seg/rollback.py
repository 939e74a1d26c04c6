"""Training that goes back to its last good checkpoint when it diverges, and leaves out the data it diverged on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path

from ds_seg import distributed
from ds_seg.checkpoint import TrainingState, list_checkpoints, resume_training, save_checkpoint
from ds_seg.checkpoint.store import checkpoint_step, drop_checkpoints_after
from ds_seg.checkpoint.training_state import Rollback
from ds_seg.config import RunConfig
from ds_seg.data.training_batches import MicroBatch
from ds_seg.errors import CheckpointError, TrainingDiverged
from ds_seg.loop import LoopRecord, TrainingLoop
from ds_seg.supervision.progress import SLOW, enter_phase

OpenLoader = Callable[[TrainingState], Iterable[MicroBatch]]


def train_with_rollbacks(loop: TrainingLoop, open_loader: OpenLoader) -> LoopRecord:
    """Run a loop to its end, through as many rollbacks as the run allows; a collective over all ranks.

    Args:
        loop: its `state` is another one after a rollback.
        open_loader: the micro-batches from where a state stands.

    Raises:
        TrainingDiverged: once more than allowed, or with no checkpoint to go back to.
    """
    if loop.run.max_rollbacks and not _list_good(loop.run, loop.state.step):
        enter_phase("saving before the first step", patience=SLOW)
        folder = save_checkpoint(loop.engines, loop.run, loop.state, loop.ema)
        loop.tracker.info(f"saved {folder}, for a rollback before the first regular checkpoint")
    while True:
        try:
            return loop(open_loader(loop.state))
        except TrainingDiverged as divergence:
            if not loop.run.max_rollbacks:
                raise
            enter_phase("going back to the last good checkpoint", patience=SLOW)
            loop.state = _go_back(loop, divergence)


def _go_back(loop: TrainingLoop, divergence: TrainingDiverged) -> TrainingState:
    """Load the last good checkpoint into the live engines; a collective over all ranks."""
    run, diverged, warn = loop.run, loop.state, loop.tracker.warn
    first_bad_step, last_bad_step = diverged.step - diverged.skipped_in_a_row, diverged.step - 1
    if len(diverged.rollbacks) >= run.max_rollbacks:
        raise TrainingDiverged(
            f"{divergence} This run went back {len(diverged.rollbacks)} times already (max_rollbacks="
            f"{run.max_rollbacks}) and left out {_describe(diverged, run)}: the cause is probably not in the data."
        ) from divergence
    for folder in reversed(_list_good(run, first_bad_step)):
        try:
            state = resume_training(folder, loop.engines, run, loop.ema)
        except CheckpointError as error:
            warn(f"can't go back to {folder}: {error}")
            continue
        break
    else:
        raise TrainingDiverged(
            f"{divergence} There is no complete checkpoint of step {first_bad_step} or before to go back to."
        ) from divergence
    rollback = Rollback(checkpoint_step(folder), first_bad_step, last_bad_step)
    rollbacks = [*diverged.rollbacks, rollback]
    state = dataclasses.replace(state, rollbacks=rollbacks, train_images=diverged.train_images)
    if distributed.is_main():  # of steps that are now made anew, with other data
        drop_checkpoints_after(run.work_dir, state.step, state.best_checkpoint)
    distributed.barrier()
    loop.tracker.rewind(state.step)
    warn(
        f"loss or gradient was not finite from step {first_bad_step + 1} to {last_bad_step + 1}: went back to {folder} "
        f"(rollback {len(state.rollbacks)} of at most {run.max_rollbacks}); from now on the run leaves out "
        f"{_describe(state, run)}"
    )
    return state


def _list_good(run: RunConfig, step: int) -> list[Path]:
    """Checkpoints of a step or before it, oldest first, as rank 0 sees them."""
    return distributed.broadcast_object(list_checkpoints(run.work_dir, step))


def _describe(state: TrainingState, run: RunConfig) -> str:
    """The left out parts of the stream in words."""
    return ", ".join(
        f"global batches {first} to {last} (samples {first * run.global_batch} to {(last + 1) * run.global_batch - 1})"
        for first, last in state.left_out
    )
