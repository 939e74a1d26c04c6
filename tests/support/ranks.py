"""Starts a worker script on several processes, once, with a time limit."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ds_seg.distributed import free_port

_POLL_S = 0.05


def run_ranks(worker: Path, world_size: int, *arguments: object, timeout_s: float, device: str = "cpu") -> str:
    """Run a worker to its end on every rank and return what all of them printed.

    Without a launcher, whose own import of torch costs as much processor time as a third of a rank's start. What tests
    need of launchers is tested through the command line.

    Args:
        worker: the script.
        world_size: number of processes.
        arguments: of the script.
        timeout_s: after which it counts as hung.
        device: what DeepSpeed's accelerator is, `cpu` (with gloo) or `cuda` (with NCCL).

    Raises:
        AssertionError: a rank failed; the message ends with the output.
        subprocess.TimeoutExpired: it hung.
    """
    command = [sys.executable, str(worker), *map(str, arguments)]
    port = str(free_port())
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        ranks = [
            subprocess.Popen(command, env=_environment(rank, world_size, port, device), stdout=output, stderr=output)
            for rank in range(world_size)
        ]
        try:
            codes = _wait(ranks, command, timeout_s)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        output.seek(0)
        text = output.read()
    assert codes == [0] * world_size, f"exit codes {codes}\n{text[-9000:]}"
    return text


def _environment(rank: int, world_size: int, port: str, device: str) -> dict[str, str]:
    support = Path(__file__).parent
    paths = [str(support), str(support.with_name("parity")), *filter(None, [os.environ.get("PYTHONPATH")])]
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    return {
        **os.environ,
        **{name: str(number) for name, number in numbers.items()},
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "DS_ACCELERATOR": device,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(paths),
    }


def _wait(ranks: list[subprocess.Popen], command: list[str], timeout_s: float) -> list[int | None]:
    """Exit codes once all have ended, or one has failed."""
    end = time.monotonic() + timeout_s
    while None in (codes := [process.poll() for process in ranks]) and not any(codes):
        if time.monotonic() > end:
            raise subprocess.TimeoutExpired(command, timeout_s)
        time.sleep(_POLL_S)
    return codes
