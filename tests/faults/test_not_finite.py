"""NaN and Inf in what one rank computes: once, five times in a row, and with a rollback."""

import pytest

from checkpoint_hash import hash_tensors
from ds_seg.checkpoint.store import list_checkpoints
from run_rows import read_rows

STEPS, FIRST_BAD_STEP = 12, 7
RARE_SAVES = ("--cfg-options", "checkpoint_config.interval=6")
WHO = (("nan", 1), ("inf", 0))


def fault(value: str, rank: int, times: int) -> dict:
    """What sitecustomize.py is to do to the maps of the backbone."""
    return {"rank": rank, "place": "maps", "step": FIRST_BAD_STEP - 1, "do": value, "times": times}


def twice(story, tmp_path, times: int, tells: str, *options: str) -> tuple[list, list]:
    """Two runs that differ in who computes what is not finite: their endings, and what they leave."""
    endings, left = [], []
    for value, rank in WHO:
        run = story(STEPS, folder=tmp_path / value)
        ending = run.start(*options, fault=fault(value, rank, times)).finish(tells=tells)
        assert ending.exit_code == 0, ending.output[-4000:]
        rows = read_rows(run.work_dir)
        before = [row for row in run.reference.rows if row["step"] < FIRST_BAD_STEP]
        assert rows[: len(before)] == before and rows[-1]["step"] == STEPS
        endings.append(ending)
        left.append((rows, hash_tensors(list_checkpoints(run.work_dir)[-1])))
    return endings, left


@pytest.mark.long
def test_one_bad_step_is_left_out_on_all_ranks(story, tmp_path, fault_row):
    endings, left = twice(story, tmp_path, 1, f"step {FIRST_BAD_STEP} skipped in both engines")
    assert left[0] == left[1]
    for (value, rank), ending in zip(WHO, endings, strict=True):
        words = f"{value} from the backbone of rank {rank} in one step"
        fault_row(fault=words, **ending.figures(), lost_steps=0, equal="but for that step, left out by all ranks")


@pytest.mark.long
def test_five_bad_steps_in_a_row_end_the_run(story):
    run = story(STEPS)
    life = run.start(*RARE_SAVES, fault=fault("nan", 1, 5), launcher="deepspeed")
    ending = life.finish(tells="not finite in 5 steps in a row")
    words = "nan from the backbone of rank 1 in five steps in a row"
    run.interrupted(words, ending, exit_code=1, lost_at_most_steps=5, right_until_step=FIRST_BAD_STEP - 1)
    run.complete(*RARE_SAVES)


@pytest.mark.long
def test_a_run_that_may_roll_back_goes_on_without_the_bad_batches(story, tmp_path, fault_row):
    endings, left = twice(
        story, tmp_path, 3, "went back to", "--on-divergence", "rollback", *RARE_SAVES, "max_skipped_steps=3"
    )
    assert left[0] == left[1]
    for (value, rank), ending in zip(WHO, endings, strict=True):
        words = f"{value} from the backbone of rank {rank} in three steps in a row, `--on-divergence rollback`"
        fault_row(fault=words, **ending.figures(), lost_steps=3, equal="but for those batches, left out by all ranks")
