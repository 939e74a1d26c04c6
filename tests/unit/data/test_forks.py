"""What a forked process holds of its parent's memory."""

import contextlib
import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ds_seg.data.forks import keep_out_of_forks

SIZE = 64 * 2**20
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
FAILED = 3


def true_in_a_fork(check: Callable[[], bool]) -> bool:
    """Whether a check holds in a process that is forked now."""
    pid = os.fork()
    if pid == 0:
        code = FAILED
        with contextlib.suppress(Exception):
            code = int(check())
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (False, True), code
    return bool(code)


def mapped_in_a_fork(address: int) -> bool:
    """Whether a process that is forked now has the page of an address."""

    def is_mapped() -> bool:
        maps = Path("/proc/self/maps").read_text().splitlines()
        spans = (tuple(int(end, 16) for end in line.split()[0].split("-")) for line in maps)
        return any(start <= address < stop for start, stop in spans)

    return true_in_a_fork(is_mapped)


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


def test_heap_memory_that_was_given_back_is_shared_again() -> None:
    """A tensor lies in the heap where that has room for it, and the process keeps the memory when the tensor goes."""

    def kept_as_long_as_used() -> bool:
        libc = ctypes.CDLL(None)
        assert libc.mallopt(M_MMAP_THRESHOLD, 2 * SIZE) and libc.mallopt(M_TRIM_THRESHOLD, 8 * SIZE)
        large = torch.empty(SIZE, dtype=torch.uint8)  # to fill it takes threads, which a fork has not
        address = large.data_ptr() + SIZE // 2
        keep_out_of_forks([large])
        kept = not mapped_in_a_fork(address)
        del large
        return kept and mapped_in_a_fork(address)

    assert true_in_a_fork(kept_as_long_as_used)
