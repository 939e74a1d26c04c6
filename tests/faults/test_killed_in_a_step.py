"""SIGKILL of a rank inside the forward, the backward, the optimizer step and the evaluation."""

import pytest

PLACES = {
    "forward": "between two blocks of the forward",
    "backward": "in the backward, between head and backbone",
    "step": "between the optimizer steps of backbone and head",
    "evaluation": "in the evaluation",
}
LIVES = [(rank, place) for rank in (0, 1) for place in PLACES]


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_killed_rank_takes_the_others_down_and_nothing_is_lost_but_steps_since_the_last_save(story):
    run = story(60)
    for rank, place in LIVES:
        life = run.start(fault={"rank": rank, "place": place, "step": run.last_step + 4, "do": "kill"})
        run.interrupted(f"SIGKILL of rank {rank} {PLACES[place]}", life.finish())
    run.complete()
