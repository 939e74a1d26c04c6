"""30 kills of one run, drawn at random with a fixed seed: who, and when."""

import random
import time
from signal import SIGKILL

import pytest

from life import Life
from story import SAVE_INTERVAL_STEPS, Story

KILLS, STEPS, SEED = 30, 160, 20
VICTIMS = ("rank 0", "rank 1", "the launcher", "all processes")


def kill(life: Life, victim: str) -> None:
    """SIGKILL what is there of the victim; a rank that is not there yet leaves the launcher."""
    mains = {f"rank {rank}": process.pid for rank, process in life.ranks().items()}
    everyone = [process.pid for process in life.processes.alive()]
    life.strike(SIGKILL, *(everyone if victim == "all processes" else [mains.get(victim, life.popen.pid)]))


def wait(at_most_s: float, run: Story, step: int) -> None:
    """Wait, but not for longer than until the run has logged a step: a fast machine would come to the end."""
    end = time.monotonic() + at_most_s
    while time.monotonic() < end and run.last_step < step:
        time.sleep(0.01)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_thirty_random_kills_leave_the_run_as_if_nothing_had_been(story, fault_row):
    rows = []
    run = story(STEPS, record=lambda **row: rows.append(row))
    draw = random.Random(SEED)
    for _ in range(KILLS):
        victim, in_training = draw.choice(VICTIMS), draw.random() < 0.75
        steps, delay_s = draw.randint(1, 4), draw.random()
        life = run.start("--checkpoint", draw.choice(("sync", "async")))
        if in_training:
            run.wait_for_steps(life, steps)
            time.sleep(0.2 * delay_s)
        else:
            wait(8 * delay_s, run, run.last_step + steps)
        assert life.popen.poll() is None, f"the run ended before it could be killed:\n{life.output[-4000:]}"
        kill(life, victim)
        # a kill may fall into a save, as in test_killed_in_a_save.py
        run.interrupted(f"SIGKILL of {victim}", life.finish(), lost_at_most_steps=2 * SAVE_INTERVAL_STEPS)
    run.complete()
    fault_row(
        fault=f"{KILLS} kills of one run of {STEPS} steps, at random (seed {SEED}); the largest figures",
        detected_s=max(row["detected_s"] or 0.0 for row in rows),  # None where nobody was left to tell
        gone_s=max(row["gone_s"] for row in rows),
        exit_code=", ".join(sorted({str(row["exit_code"]) for row in rows})),
        lost_steps=max(row["lost_steps"] for row in rows),
        equal=True,
    )
