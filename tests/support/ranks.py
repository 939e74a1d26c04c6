"""Starts a worker script on several processes, once, with a time limit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from ds_seg.distributed import free_port

_SUPPORT = Path(__file__).parent


def run_ranks(worker: Path, world_size: int, *arguments: object, timeout_s: float, device: str = "cpu") -> str:
    """Run a worker to its end on every rank and return what all of them printed.

    Without a launcher. What tests need of launchers is tested through the command line.

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
    command = [sys.executable, _SUPPORT / "start_ranks.py", world_size, worker, *arguments]
    process = subprocess.Popen(
        list(map(str, command)),
        env=_environment(world_size, device),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        text, _ = process.communicate(timeout=timeout_s)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 0, text[-9000:]
    return text


def _environment(world_size: int, device: str) -> dict[str, str]:
    paths = [str(_SUPPORT), str(_SUPPORT.with_name("parity")), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "DS_ACCELERATOR": device,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(paths),
    }
