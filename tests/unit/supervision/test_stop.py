import threading
import time

import pytest

from ds_seg.supervision import stop
from ds_seg.supervision.stop import Leavable, Pace, StopRequested, TimeLimit


@pytest.fixture(autouse=True)
def no_stop(monkeypatch):
    monkeypatch.setattr(stop, "_request", None)


def test_items_errors_and_the_end_come_through():
    def items():
        yield 1
        yield None
        raise ValueError("damaged")

    leavable = Leavable(items())
    assert [next(leavable), next(leavable)] == [1, None]
    for _ in range(2):  # asked again after its end it must not wait for ever
        with pytest.raises(ValueError, match="damaged"):
            next(leavable)
    assert list(Leavable([])) == []


def test_items_are_taken_only_while_the_caller_waits():
    taken = []
    leavable = Leavable(taken.append(index) or index for index in range(5))
    assert next(leavable) == 0
    time.sleep(0.05)
    assert taken == [0]


def test_a_wait_ends_with_the_stop():
    def items():
        threading.Event().wait()
        yield

    leavable = Leavable(items())
    threading.Timer(0.1, stop.request, ["a test"]).start()
    started = time.monotonic()
    with pytest.raises(StopRequested):
        next(leavable)
    assert time.monotonic() - started < 5
    with pytest.raises(StopRequested):
        next(Leavable([1]))


def test_the_first_reason_stays():
    assert stop.age_s() == 0.0 and stop.requested() is None
    assert stop.request("one") and not stop.request("two")
    assert stop.requested() == "one"
    assert 0 <= stop.age_s() < 5


def measured(step_s, save_s=None):
    pace = Pace()
    pace.note_step(step_s)
    if save_s is not None:
        pace.note_save(save_s)
    return pace


def test_the_time_limit_keeps_two_steps_one_and_a_half_saves_and_a_margin():
    limit = TimeLimit(3600, elapsed_s=0)
    assert limit.needs_s(measured(10, save_s=40)) == 2 * 10 + 1.5 * 40 + 60
    assert limit.needs_s(measured(10)) == 2 * 10 + 300 + 60
    assert TimeLimit(100, elapsed_s=0).needs_s(measured(1)) == 2 + 10 + 20


def test_the_time_limit_is_due_when_what_is_left_is_needed_and_never_before_a_step():
    assert not TimeLimit(3600, elapsed_s=3430).is_due(measured(10, save_s=40))
    assert TimeLimit(3600, elapsed_s=3470).is_due(measured(10, save_s=40))
    assert not TimeLimit(3600, elapsed_s=4000).is_due(Pace())


def test_the_pace_forgets_slow_steps_but_not_slow_saves():
    pace = measured(50, save_s=9)
    for _ in range(20):
        pace.note_step(2)
    pace.note_save(3)
    assert (pace.step_s, pace.save_s) == (2, 9)
    assert str(pace) == "a step takes up to 2.0 s, a save up to 9.0 s"
    assert str(Pace()) == "no step was made yet, no save was measured yet"
