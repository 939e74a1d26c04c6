"""SIGKILL of a rank at random instants of a save, of one that is waited for and of one in the background."""

import random

import pytest

from story import SAVE_INTERVAL_STEPS

SEED = 5


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_kill_at_any_instant_of_a_save_leaves_a_whole_checkpoint(story):
    run = story(60)
    draw = random.Random(SEED)
    for life_number in range(10):
        mode, rank, part = ("sync", "async")[life_number % 2], life_number // 2 % 2, draw.random()
        fault = {"rank": rank, "place": "save", "step": 0, "do": "kill", "part": part}
        life = run.start("--checkpoint", mode, fault=fault)
        run.interrupted(
            f"SIGKILL of rank {rank} {part:.0%} through a save ({mode})",
            life.finish(),
            lost_at_most_steps=2 * SAVE_INTERVAL_STEPS,
        )
    run.complete()
