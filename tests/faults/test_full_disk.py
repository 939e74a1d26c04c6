"""Disks that fill up for real: a small tmpfs holds the work dir."""

import pytest

from checkpoint_hash import hash_tensors
from disks import fill, small_disk
from ds_seg.checkpoint.store import list_checkpoints
from run_rows import read_rows

STEPS, LONG = 12, 80
DISK_MIB = 64
NO_SAVES = ("--cfg-options", "checkpoint_config.interval=100", "evaluation.save_best=False")


@pytest.fixture
def disk(tmp_path):
    """An empty disk of its own."""
    with small_disk(tmp_path / "disk", DISK_MIB) as folder:
        yield folder


@pytest.mark.long
def test_a_disk_that_is_full_before_a_save_ends_the_run_and_leaves_the_older_checkpoint(story, disk):
    run = story(STEPS, work_dir=disk / "run")
    life = run.start(launcher="deepspeed")
    run.wait_for_steps(life, 3)
    life.fault_now()
    ballast = fill(disk, leave_bytes=256 * 1024)
    run.interrupted("disk full before a save", life.finish(tells="CheckpointError"), exit_code=2)
    ballast.unlink()
    run.complete()


@pytest.mark.long
def test_a_disk_that_fills_up_in_a_save_leaves_the_older_checkpoint(story, disk):
    run = story(STEPS, work_dir=disk / "run")
    fault = {"rank": 0, "place": "space", "step": 5, "do": str(disk / "ballast")}
    ending = run.start(launcher="deepspeed", fault=fault).finish(tells="CheckpointError")
    run.interrupted("disk full in the middle of a save", ending, exit_code=2)
    assert not list((run.work_dir / "checkpoints").glob(".step_*"))
    (disk / "ballast").unlink()
    run.complete()


@pytest.mark.long
def test_a_disk_that_is_full_while_logging_costs_rows_and_nothing_else(story, disk):
    run = story(LONG, work_dir=disk / "run")
    life = run.start(*NO_SAVES)
    run.wait_for_steps(life, 2)
    life.fault_now()
    ballast = fill(disk)
    full = read_rows(run.work_dir)[-1]["step"]  # a dozen rows still find room in the file's last block
    life.wait_until(lambda: f"step {full + 20}/{LONG} " in life.output, "20 steps on the full disk")
    ballast.unlink()
    ending = life.finish(tells="can't be written")
    assert ending.exit_code == 0, ending.output[-4000:]
    rows = read_rows(run.work_dir)
    lost = [row for row in run.reference.rows if row not in rows]
    assert [row for row in run.reference.rows if row in rows] == rows and lost
    (last,) = list_checkpoints(run.work_dir)
    assert hash_tensors(last) == run.reference.hashes[LONG]
    equal = f"yes, but for {len(lost)} rows of metrics.jsonl"
    run.record(fault="disk full while logging, for a few steps", **ending.figures(), lost_steps=0, equal=equal)
