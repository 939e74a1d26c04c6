"""Two gloo ranks with unequal numbers of windows finish, and measure what one process measures."""

from __future__ import annotations

import json
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("evaluation_worker.py")
FINISH_WITHIN_S = 120  # measured: 10 s on two shared cores, nearly all of it imports


def run_two_ranks(folder, *arguments):
    """Start both ranks, wait for them and return their exit codes and outputs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    base = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    base |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(folder), *arguments],
            env=os.environ | base | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=FINISH_WITHIN_S)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    return [worker.returncode for worker in workers], outputs


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lockstep")
    codes, outputs = run_two_ranks(folder)
    assert codes == [0, 0], "\n".join(outputs)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", ["slide", "whole", "one_rank_has_nothing"])
def test_unequal_ranks_equal_one_process(reports, case):
    single, model = runpy.run_path(str(WORKER))["evaluate"](case)

    assert reports[0][case]["windows"] != reports[1][case]["windows"], "the case must be unequal to show anything"
    assert reports[0][case]["calls"] == reports[1][case]["calls"]
    assert reports[0][case]["windows"] + reports[1][case]["windows"] == model.windows
    for report in reports:
        assert report[case]["counts"] == single.confusion.counts_KK.tolist()
        assert report[case]["metrics"] == single.metrics()


def test_without_lockstep_the_same_ranks_do_not_finish(tmp_path):
    """The mutation that shows the tests above can fail: the busy rank waits for one that has left."""
    codes, outputs = run_two_ranks(tmp_path, "naive")

    assert codes != [0, 0]
    assert "gloo" in "".join(outputs), "\n".join(outputs)  # it was a collective that failed, nothing else
