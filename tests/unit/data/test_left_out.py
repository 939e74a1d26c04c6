import itertools

from ds_seg.data.left_out import find_batch, leave_out


def batches(left_out, count=12):
    return [find_batch(step, left_out) for step in range(count)]


def test_a_range_is_passed_over_and_the_steps_before_it_stay():
    left_out = leave_out([], 3, 5)
    assert left_out == [(3, 5)]
    assert batches(left_out, 6) == [0, 1, 2, 6, 7, 8]


def test_ranges_follow_the_steps_that_were_made():
    """Each time the batches of steps 3 to 5 go, as they were then; an order of its own checks it."""
    left_out, stream = [], list(range(40))
    for first, last in ((3, 5), (3, 5), (8, 9), (1, 6), (0, 0), (20, 20)):
        left_out = leave_out(left_out, first, last)
        del stream[first : last + 1]
        assert batches(left_out) == stream[:12]
    assert all(one[1] < other[0] for one, other in itertools.pairwise(left_out))
