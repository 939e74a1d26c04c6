"""The search for what a run leaves behind finds orphans and shared memory."""

import os
import subprocess
import sys
import time
import uuid

import pytest

from processes import MARK, SHARED_MEMORY, RunProcesses


@pytest.fixture
def orphan():
    """A process whose parent has ended, started with a mark and a rank; and how to find it."""
    mark = uuid.uuid4().hex
    orphan = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    parent = subprocess.Popen([sys.executable, "-c", orphan], env={**os.environ, MARK: mark, "RANK": "1"})
    parent.wait(30)
    processes = RunProcesses(mark, parent.pid)
    yield processes
    processes.kill()


def test_an_orphan_is_found_with_its_rank_and_can_be_ended(orphan):
    (found,) = orphan.alive()
    assert found.rank == 1
    orphan.kill()
    end = time.monotonic() + 10
    while orphan.alive():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_shared_memory_of_a_run_is_told_from_what_was_there_and_from_other_runs(orphan):
    (found,) = orphan.alive()
    before = {path.name for path in SHARED_MEMORY.iterdir()}
    left, of_another = SHARED_MEMORY / f"torch_{found.pid}_1_0", SHARED_MEMORY / f"torch_{os.getpid()}_1_0"
    try:
        left.touch()
        of_another.touch()
        new = set(orphan.leftovers_in_shared_memory(before))
        assert left.name in new and of_another.name not in new
    finally:
        left.unlink()
        of_another.unlink()
