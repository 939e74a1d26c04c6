import dataclasses

import pytest

from ds_seg.supervision.heartbeat import Beat
from ds_seg.supervision.judgement import Ages, describe_silent, describe_stuck, find_silent, find_stuck

BEAT = Beat(1, 1, 5, "micro-batch 1 of 2 of step 7", 1.0, 2.0, "loop.py:12 in run", False)


def observe(*looks, elapsed_s=1.0):
    """Ages after looks that are a second apart."""
    ages = Ages()
    for beats in looks:
        ages.observe(beats, elapsed_s)
    return ages


def beat(**changes):
    return dataclasses.replace(BEAT, **changes)


def grow(beats, looks, *, ticking=(), beating=None):
    """The same ranks seen some more times: those that beat and those that tick."""
    beating = beats if beating is None else beating
    return [
        {
            rank: dataclasses.replace(
                one, number=one.number + look * (rank in beating), ticks=one.ticks + look * (rank in ticking)
            )
            for rank, one in beats.items()
        }
        for look in range(looks)
    ]


def test_a_rank_is_silent_only_once_the_timeout_is_over():
    beats = {0: BEAT, 1: BEAT}
    looks = grow(beats, 7, beating=[0])
    assert find_silent(looks[5], observe(*looks[:6]), 5.0) == []
    assert find_silent(looks[6], observe(*looks), 5.0) == [1]


def test_a_rank_that_gets_on_keeps_its_peers_from_being_blamed():
    beats = {0: BEAT, 1: BEAT}
    looks = grow(beats, 9, ticking=[0])
    assert find_stuck(looks[-1], observe(*looks), 5.0) == []
    looks = grow(beats, 9)
    assert find_stuck(looks[-1], observe(*looks), 5.0) == [0, 1]


def test_those_furthest_behind_are_blamed_and_not_those_that_wait_for_them():
    beats = {0: beat(position=9), 1: BEAT, 2: beat(position=9)}
    looks = grow(beats, 9)
    assert find_stuck(looks[-1], observe(*looks), 5.0) == [1]


def test_of_ranks_in_one_phase_the_one_outside_the_collective_is_blamed():
    beats = {0: beat(in_collective=True), 1: BEAT, 2: beat(in_collective=True)}
    looks = grow(beats, 9)
    assert find_stuck(looks[-1], observe(*looks), 5.0) == [1]


def test_patience_stretches_the_timeout():
    beats = {0: beat(patience=4.0), 1: BEAT}
    looks = grow(beats, 22)
    assert find_stuck(looks[19], observe(*looks[:20]), 5.0) == []
    assert find_stuck(looks[21], observe(*looks), 5.0) == [0, 1]


def test_silence_gets_no_patience():
    beats = {0: beat(patience=4.0), 1: BEAT}
    looks = grow(beats, 7, beating=[1])
    assert find_silent(looks[6], observe(*looks), 5.0) == [0]


@pytest.mark.parametrize("describe", [describe_silent, describe_stuck])
def test_lines_name_rank_phase_and_place_and_stay_few(describe):
    beats = dict.fromkeys(range(12), BEAT)
    text = describe(list(beats), beats, observe(*grow(beats, 3, beating=[])))
    assert "rank 0: no " in text and " for 2 s" in text and text.count("\n") == 8
    assert "micro-batch 1 of 2 of step 7 (for 2 s; main thread at loop.py:12 in run)" in text
    assert text.endswith("and 4 more ranks")
