"""One rank of test_rollback.py: real engines and real checkpoints; some global batches are NaN on the last rank.

Usage: rollback_worker.py OUTPUT_FOLDER [CHECK ...]
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import recipe
from checks import run_checks
from ds_seg import distributed
from ds_seg.checkpoint import TrainingState, checkpoint_name, list_checkpoints, resume_training
from ds_seg.checkpoint.store import HEADS_FILE
from ds_seg.config import RunConfig
from ds_seg.data.left_out import find_batch
from ds_seg.data.training_batches import MicroBatch
from ds_seg.engine.ema import WeightAverages
from ds_seg.errors import TrainingDiverged
from ds_seg.loop import TrainingLoop
from ds_seg.rollback import train_with_rollbacks
from ds_seg.summary import digest as digest_tensors
from ds_seg.tracking.metrics_log import read_metrics
from ds_seg.tracking.tracker import build_tracker
from engine_setup import RECIPE, digest
from engine_worker import flip_byte
from sharded import build_run, change_saving, start

OUT = Path(sys.argv[1])
STEPS = 12
TRAINED = RECIPE.replace(steps=8, ema_momentum=0.1)
BAD = (4, 5, 9, 10, 12)
"""Two in a row at step 4, two more at step 7 once those are left out, and a single one, which is only skipped."""
BY_HAND = (0, 1, 2, 3, 6, 7, 8, 11, 12, 13, 14, 15)
TIMES = ("images_per_s", "data_wait_s", "memory_gib")


def make_run(name: str, **changes: object) -> RunConfig:
    run = build_run(TRAINED, distributed.world_size(), OUT / name)
    values = {"max_skipped_steps": 2, "max_rollbacks": 2, "log_interval_steps": 1}
    return change_saving(dataclasses.replace(run, **{**values, **changes}), interval_steps=3, keep=100)


def make_batches(
    batches: Iterable[int], bad: Collection[int], before_batch: Callable[[int], None]
) -> Iterator[MicroBatch]:
    for batch in batches:
        before_batch(batch)
        for micro_batch in recipe.make_micro_batches(TRAINED, batch, distributed.rank(), distributed.world_size()):
            if batch in bad and distributed.rank() == distributed.world_size() - 1:
                micro_batch.images_B3HW.fill_(float("nan"))
            yield micro_batch


def train(
    run: RunConfig,
    bad: Collection[int],
    *,
    batches: Collection[int] = (),
    resume: Path | None = None,
    before_batch: Callable[[int], None] = lambda _batch: None,
) -> dict:
    """Train with rollbacks, or on a list of batches, and tell what came out."""
    engines = start(run)
    ema = WeightAverages(engines, run.ema)
    state = resume_training(resume, engines, run, ema) if resume else TrainingState()
    tracker = build_tracker(run, state.step, class_names=(), palette=())
    result = SimpleNamespace(
        mIoU=0.5, metrics=lambda: {"eval/mIoU": 0.5}, table=lambda: "", describe_fault=lambda: None
    )
    loop = TrainingLoop(run, engines, state, tracker, lambda _step: result, ema)

    def follow(state: TrainingState) -> Iterator[MicroBatch]:
        steps = range(state.step, STEPS)
        return make_batches(batches or [find_batch(step, state.left_out) for step in steps], bad, before_batch)

    message = None
    try:
        train_with_rollbacks(loop, follow)
    except TrainingDiverged as error:
        message = str(error)
    tracker.close("done")
    distributed.barrier()
    averages = {**ema.heads, **{f"backbone.{name}": average for name, average in ema.backbone.items()}}
    rows = read_metrics(run.work_dir / "metrics.jsonl")
    return {
        "digest": digest(engines) + digest_tensors(averages),
        "state": dataclasses.asdict(loop.state),
        "left_out": loop.state.left_out,
        "rows": [{key: value for key, value in row.items() if key not in TIMES} for row in rows],
        "checkpoints": [path.name for path in list_checkpoints(run.work_dir)],
        "message": message,
        "waited_s": sum(row["data_wait_s"] for row in rows if "loss" in row),
        "data_wait_share": loop.record.data_wait_share,
    }


def take_checkpoint(source: str, step: int, target: str) -> Path:
    """A copy of a run's checkpoint in a work dir of its own."""
    folder = OUT / target / "checkpoints" / checkpoint_name(step)
    if distributed.is_main():
        shutil.copytree(OUT / source / "checkpoints" / folder.name, folder)
    distributed.barrier()
    return folder


def check_two_rollbacks() -> dict:
    by_hand = train(make_run("by_hand", max_rollbacks=0), BAD, batches=BY_HAND)
    return {"by_hand": by_hand, "rolled_back": train(make_run("rolled_back"), BAD)}


def check_resumed() -> dict:
    """From before the first rollback, whose state knows nothing of it, and from between the two."""
    results = {}
    for step in (3, 6):
        folder = take_checkpoint("rolled_back", step, f"resumed_{step}")
        results[str(step)] = train(make_run(f"resumed_{step}"), BAD, resume=folder)
    return results


def check_first_steps() -> dict:
    """Nothing was saved by the loop yet."""
    by_hand = train(make_run("first_by_hand", max_rollbacks=0), (), batches=range(2, 2 + STEPS))
    return {"by_hand": by_hand, "rolled_back": train(make_run("first"), (0, 1))}


def check_damaged_checkpoint() -> dict:
    """The newest checkpoint before the bad steps gets a flipped bit meanwhile: the one before it is taken."""

    def damage(batch: int) -> None:
        heads = OUT / "damaged" / "checkpoints" / checkpoint_name(3) / HEADS_FILE
        if batch == BAD[0] and distributed.is_main() and heads.exists():
            flip_byte(heads)

    return train(make_run("damaged"), BAD, before_batch=damage)


def check_slow_data() -> dict:
    """The batches of the last rank come late, and rank 0 has to be the one that tells."""

    def wait(_batch: int) -> None:
        if not distributed.is_main():
            time.sleep(0.5)

    return train(make_run("slow"), (), before_batch=wait)


def check_bound() -> dict:
    """Data is not the cause: every batch from the fifth on is NaN."""
    return train(make_run("bound"), range(4, 100))


if __name__ == "__main__":
    run_checks(globals())
