"""The memory of a process is told apart by kind, at its peak and not only at the end."""

import mmap
import sys

import pytest

from ds_seg.config import CONFIGS_ROOT

MIB = 2**20


@pytest.fixture
def peaks(monkeypatch):
    monkeypatch.syspath_prepend(str(CONFIGS_ROOT.parent / "benchmarks"))
    from process_memory import MemoryPeaks

    yield MemoryPeaks()
    sys.modules.pop("process_memory", None)


def fill(size):
    """Memory of its own for each page, held long enough to be seen."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for page in range(0, size, mmap.PAGESIZE):
        memory[page] = 1
    return memory


def wait_for(condition):
    while not condition():
        pass


def test_anonymous_memory_that_was_given_back(peaks):
    with peaks:
        memory = fill(64 * MIB)
        wait_for(lambda: peaks.peak["anonymous"] > peaks.before["anonymous"] + 60 * MIB)
        memory.close()
    added = peaks.added()
    assert 60 * MIB < added["anonymous"] < 80 * MIB
    assert added["total"] > 60 * MIB
    assert added["file"] < 8 * MIB


def test_pages_of_a_mapped_file(peaks, tmp_path):
    (tmp_path / "file").write_bytes(b"1" * (32 * MIB))
    with peaks, (tmp_path / "file").open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        assert sum(memory[page] for page in range(0, len(memory), mmap.PAGESIZE)) > 0
        wait_for(lambda: peaks.peak["file"] > peaks.before["file"] + 30 * MIB)
        memory.close()
    added = peaks.added()
    assert 30 * MIB < added["file"] < 40 * MIB
    assert added["anonymous"] < 8 * MIB
