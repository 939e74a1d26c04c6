"""Rollbacks on two gloo ranks, bit by bit against runs whose batches were picked by hand; both on real checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ranks import run_ranks

WORKER = Path(__file__).with_name("rollback_worker.py")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two ranks saw, in rank order."""
    out = tmp_path_factory.mktemp("rollback")
    run_ranks(WORKER, 2, out, timeout_s=400)
    return json.loads((out / "world2.json").read_text())


def assert_equal_runs(got, wanted):
    """Weights, moments, averages and rows to the last bit, and where the run stands but for its rollbacks."""
    assert got["digest"] == wanted["digest"]
    assert got["rows"] == wanted["rows"] and len(got["rows"]) >= 12
    assert {**got["state"], "rollbacks": []} == {**wanted["state"], "rollbacks": []}
    assert got["message"] is None


FIRST = {"to_step": 3, "first_bad_step": 4, "last_bad_step": 5}
SECOND = {"to_step": 6, "first_bad_step": 7, "last_bad_step": 8}


def test_two_rollbacks_equal_a_run_without_those_batches(ranks):
    for rank in ranks:
        both = rank["check_two_rollbacks"]
        assert_equal_runs(both["rolled_back"], both["by_hand"])
        assert both["rolled_back"]["state"]["rollbacks"] == [FIRST, SECOND]
        assert both["rolled_back"]["left_out"] == [[4, 5], [9, 10]]
        assert both["rolled_back"]["state"]["skipped_steps"] == 1  # the single bad batch
        # the one before the first step, and those of the steps that count
        assert both["rolled_back"]["checkpoints"] == [f"step_{step:06d}" for step in (0, 3, 6, 9, 12)]


@pytest.mark.parametrize(("step", "rollbacks"), [("3", [FIRST, SECOND]), ("6", [FIRST, SECOND])])
def test_a_resume_from_before_or_between_the_rollbacks_ends_the_same(ranks, step, rollbacks):
    for rank in ranks:
        got, wanted = rank["check_resumed"][step], rank["check_two_rollbacks"]["rolled_back"]
        assert got["digest"] == wanted["digest"] and got["state"] == wanted["state"]
        assert got["state"]["rollbacks"] == rollbacks


def test_a_run_that_diverges_at_once_starts_again_from_its_first_weights(ranks):
    for rank in ranks:
        both = rank["check_first_steps"]
        assert_equal_runs(both["rolled_back"], both["by_hand"])
        assert both["rolled_back"]["state"]["rollbacks"] == [{"to_step": 0, "first_bad_step": 0, "last_bad_step": 1}]


def test_a_damaged_checkpoint_is_passed_over(ranks):
    for rank in ranks:
        got, wanted = rank["check_damaged_checkpoint"], rank["check_two_rollbacks"]["by_hand"]
        assert_equal_runs(got, wanted)
        assert got["state"]["rollbacks"] == [{**FIRST, "to_step": 0}, SECOND]


def test_after_the_last_rollback_the_run_stops_with_what_was_left_out(ranks):
    for rank in ranks:
        message = rank["check_bound"]["message"]
        assert "not finite in 2 steps in a row, the last at step 6" in message
        assert (
            "This run went back 2 times already (max_rollbacks=2) and left out global batches 4 to 5 (samples 64 to "
            "95), global batches 6 to 7 (samples 96 to 127): the cause is probably not in the data."
        ) in message


def test_the_wait_for_data_is_that_of_the_slowest_rank(ranks):
    for rank in ranks:
        slow = rank["check_slow_data"]
        assert slow["waited_s"] < 2 and slow["data_wait_share"] > 0.3
        assert rank["check_first_steps"]["by_hand"]["data_wait_share"] < 0.3
