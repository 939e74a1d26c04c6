"""Starts a worker script on several processes, once, with a time limit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_ranks(worker: Path, world_size: int, *arguments: object, timeout_s: float, device: str = "cpu") -> str:
    """Run a worker to its end under torchrun and return what it printed.

    Args:
        worker: the script.
        world_size: number of processes.
        arguments: of the script.
        timeout_s: after which it counts as hung.
        device: what DeepSpeed's accelerator is, `cpu` (with gloo) or `cuda` (with NCCL).

    Raises:
        AssertionError: it failed; the message ends with its output.
        subprocess.TimeoutExpired: it hung.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world_size)]
    support = Path(__file__).parent
    paths = [str(support), str(support.with_name("parity")), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "DS_ACCELERATOR": device, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [*torchrun, str(worker), *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout
