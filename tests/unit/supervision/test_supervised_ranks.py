"""Real ranks that are stopped, killed, hung and signalled. Each costs about its timeout."""

import os
import re
import signal
import time

import pytest

from ds_seg.supervision.watchdog import _GONE_GRACE_S
from supervised_rank import running

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals")
TIMEOUT_S = 3.0
DETECTED_IN_S = TIMEOUT_S + 7  # on two busy cores; alone about TIMEOUT_S + 1.5


@pytest.mark.parametrize("stopped", [1, 2])
def test_a_stopped_process_is_named_and_killed(tmp_path, stopped):
    with running(tmp_path / "run", 3, TIMEOUT_S) as ranks:
        time.sleep(1)  # for a heartbeat from among the steps
        ranks.send(stopped, signal.SIGSTOP)
        codes, seconds = ranks.wait()
        expected = [1, 1, 1]
        expected[stopped] = -signal.SIGKILL
        assert codes == expected, ranks.log()
        assert TIMEOUT_S - 1 < seconds < DETECTED_IN_S
        log = ranks.log()
        assert f"rank {stopped}: no heartbeat for " in log and "its process is stopped or its machine is gone" in log
        assert re.search(r"last seen in: (the data of )?step \d+ \(for \d+ s; main thread at \S+:\d+ in \w+\)", log)
        assert log.count("the watchdog ends the run") == 1
        written = sorted(path.name for path in (ranks.folder / "stacks").iterdir())
        assert written == [f"rank_{rank:05d}.txt" for rank in range(3) if rank != stopped]
        assert "_wait_for_all" in (ranks.folder / "stacks" / "rank_00000.txt").read_text()


def test_a_stopped_rank_0_which_keeps_the_store_is_noticed_by_the_others(tmp_path):
    with running(tmp_path / "run", 2, TIMEOUT_S) as ranks:
        ranks.send(0, signal.SIGSTOP)
        codes, seconds = ranks.wait()
        assert codes == [-signal.SIGKILL, 1], ranks.log()
        assert TIMEOUT_S - 1 < seconds < DETECTED_IN_S
        assert "rank 0, which keeps the rendezvous store, has not answered for" in ranks.log()
        assert (ranks.folder / "stacks" / "rank_00001.txt").exists()


@pytest.mark.parametrize("hung", [0, 1])
def test_a_deadlocked_rank_is_named_with_what_it_was_doing(tmp_path, hung):
    with running(tmp_path / "run", 2, TIMEOUT_S) as ranks:
        ranks.hang(hung)
        codes, seconds = ranks.wait()
        log = ranks.log()
        assert codes == [1, 1], log
        assert TIMEOUT_S - 1 < seconds < DETECTED_IN_S
        assert f"rank {hung}: no progress for 3 s in: the data of step" in log
        assert f"rank {1 - hung}: no progress" not in log
        assert "in hang_in_the_pipeline" in log and "Run again with --resume auto" in log
        assert "hang_in_the_pipeline" in (ranks.folder / "stacks" / f"rank_{hung:05d}.txt").read_text()
        assert "_wait_for_all" in (ranks.folder / "stacks" / f"rank_{1 - hung:05d}.txt").read_text()


@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.parametrize("timeout_s", [600.0, 0.0], ids=["default", "off"])
def test_a_dead_rank_takes_the_others_down_although_they_wait_in_no_collective(tmp_path, killed, timeout_s):
    with running(tmp_path / "run", 2, timeout_s) as ranks:
        ranks.send(killed, signal.SIGKILL)
        codes, seconds = ranks.wait()
        assert codes[killed] == -signal.SIGKILL and codes[1 - killed] == 1, ranks.log()
        assert seconds < _GONE_GRACE_S + 6
        assert f"rank {killed} of 2 ended without reporting a failure" in ranks.log()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_to_one_rank_stops_all_and_says_so_once(tmp_path, name):
    with running(tmp_path / "run", 2, TIMEOUT_S) as ranks:
        (ranks.folder / "agree").touch()
        ranks.send(1, signal.Signals[name])
        codes, seconds = ranks.wait()
        log = ranks.log()
        assert codes == [75, 75], log
        assert seconds < 5
        assert f"{name} on rank 1 (" in log and "all ranks stop before the next step or window batch, save, and" in log
        assert log.count("ds-seg: ") == 1


def test_signals_close_together_are_one_request_and_a_later_one_ends_all_ranks_at_once(tmp_path):
    with running(tmp_path / "run", 2, 0.0) as ranks:
        ranks.send(1, signal.SIGINT)
        ranks.send(1, signal.SIGTERM)
        time.sleep(2.5)
        assert [process.exitcode for process in ranks.processes] == [None, None], ranks.log()
        ranks.send(1, signal.SIGTERM)
        codes, seconds = ranks.wait()
        assert codes == [128 + signal.SIGTERM] * 2, ranks.log()
        assert seconds < 5
        assert "a second signal ends the run at once" in ranks.log()
