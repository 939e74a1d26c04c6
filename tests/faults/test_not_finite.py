"""NaN and Inf in what one rank computes."""

import pytest

from run_rows import read_rows

STEPS = 12
RARE_SAVES = ("--cfg-options", "checkpoint_config.interval=6")


@pytest.mark.long
def test_one_bad_step_is_left_out_on_all_ranks(story, tmp_path, fault_row):
    rows, endings = [], []
    for value, rank in (("nan", 1), ("inf", 0)):
        run = story(STEPS, folder=tmp_path / value)
        fault = {"rank": rank, "place": "maps", "step": 6, "do": value}
        ending = run.start(fault=fault).finish(tells="step 7 skipped in both engines")
        assert ending.exit_code == 0, ending.output[-4000:]
        rows.append(read_rows(run.work_dir))
        endings.append((f"{value} from the backbone of rank {rank} in one step", ending))
    before = [row for row in run.reference.rows if row["step"] < 7]
    assert rows[0] == rows[1] and rows[0][: len(before)] == before and len(rows[0]) == len(run.reference.rows)
    for words, ending in endings:
        fault_row(fault=words, **ending.figures(), lost_steps=0, equal="the step is left out, on all ranks alike")


@pytest.mark.long
def test_five_bad_steps_in_a_row_end_the_run(story):
    run = story(STEPS)
    fault = {"rank": 1, "place": "maps", "step": 6, "do": "nan", "times": 5}
    ending = run.start(*RARE_SAVES, fault=fault, launcher="deepspeed").finish(tells="not finite in 5 steps in a row")
    run.interrupted("nan from the backbone of rank 1 in five steps in a row", ending, exit_code=1, lost_at_most_steps=5)
    run.complete(*RARE_SAVES)
