"""What a person is told of steps that wait for their data."""

import re

import pytest

from ds_seg.tracking.data_wait import DataWait


def waiting(share, steps=20, *, interval_steps=10, workers=2, cores=8):
    wait = DataWait(interval_steps, workers=workers, cores=cores)
    for _ in range(steps + 1):
        wait.note(share, 1.0)
    return wait


def test_up_to_5_percent_are_not_worth_a_word():
    assert waiting(0.049).describe() == "" and waiting(0.051).describe().startswith("data wait 5%: ")


@pytest.mark.parametrize(
    ("share", "options", "wanted"),
    [
        (0.2, {}, 3),
        (0.5, {}, 4),
        (0.6, {}, 5),
        (0.99, {}, 8),
        (0.99, {"cores": 32}, 32),
        (0.05 + 1e-9, {}, 3),
        (0.7, {"workers": 0}, 3),
        (0.2, {"workers": 0}, 1),
    ],
)
def test_as_many_workers_are_wanted_as_would_keep_up_as_far_as_cores_go(share, options, wanted):
    text = waiting(share, **options).describe()
    assert text.endswith(f": try data.workers_per_gpu={wanted}, now {options.get('workers', 2)}")


def test_where_all_cores_have_a_worker_more_of_them_are_no_remedy():
    wait = waiting(0.23, cores=2)
    assert wait.describe() == "data wait 23%: no core is left for more workers: faster storage or smaller images"
    assert "More workers would have no core: copy the dataset to a local disk" in wait.explain()


def test_the_warning_says_all_that_can_be_done():
    text = waiting(0.5).explain()
    assert text.startswith("50% of the last 10 steps' time went into waiting for data, with data.workers_per_gpu=2 (")
    assert "cores for each training process: 8" in text and "Try --cfg-options data.workers_per_gpu=4;" in text
    assert re.search(r"`ds-seg doctor CONFIG --workers N` measures the images/s", text)


def test_the_line_tells_of_the_last_interval_and_the_summary_of_all_steps():
    wait = waiting(0.8, 20, interval_steps=20)
    for _ in range(20):
        wait.note(0.0, 1.0)
    assert wait.describe() == "" and wait.share == pytest.approx(0.4)


def test_the_first_step_of_each_loader_counts_nowhere():
    wait = DataWait(10, workers=2, cores=4)
    for _ in range(2):
        wait.start()
        wait.note(9.0, 10.0)
        assert not wait.share
        for _ in range(10):
            wait.note(0.0, 1.0)
    assert wait.share == 0.0 and wait.describe() == ""


def test_few_steps_tell_nothing_yet():
    assert waiting(0.9, 9, interval_steps=1).describe() == "" and waiting(0.9, 10, interval_steps=1).describe()
    assert DataWait(10, workers=2, cores=4).share is None
