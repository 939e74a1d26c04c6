"""What a forked process holds of its parent's memory."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ds_seg.data.forks import keep_out_of_forks

SIZE = 64 * 2**20


def mapped_in_a_fork(address: int) -> bool:
    """Whether a process that is forked now has the page of an address."""
    pid = os.fork()
    if pid == 0:
        maps = Path("/proc/self/maps").read_text().splitlines()
        spans = (tuple(int(end, 16) for end in line.split()[0].split("-")) for line in maps)
        os._exit(any(start <= address < stop for start, stop in spans))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1


@pytest.mark.parametrize(
    ("select", "shared"),
    [
        pytest.param(lambda large, _small: [large], False, id="large"),
        pytest.param(lambda large, _small: [large[SIZE // 2 :]], False, id="a view of a large one"),
        pytest.param(lambda _large, small: [small], True, id="another"),
        pytest.param(lambda _large, _small: [], True, id="none"),
    ],
)
def test_a_fork_has_all_but_what_is_kept_from_it(select: Callable, shared: bool) -> None:
    large, small = torch.ones(SIZE, dtype=torch.uint8), torch.ones(1000)
    keep_out_of_forks(select(large, small))
    keep_out_of_forks(select(large, small))
    assert mapped_in_a_fork(large.data_ptr() + SIZE // 2) is shared
    assert mapped_in_a_fork(small.data_ptr())
    large.add_(1)
    assert large.min() == 2 and small.min() == 1


def test_memory_that_was_given_back_is_shared_again() -> None:
    large = torch.ones(SIZE, dtype=torch.uint8)
    keep_out_of_forks([large])
    del large
    assert mapped_in_a_fork(torch.ones(SIZE, dtype=torch.uint8).data_ptr() + SIZE // 2)
