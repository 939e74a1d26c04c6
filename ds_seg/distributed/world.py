"""Rank, world size and device of this process, read in one way whatever launched it.

The deepspeed launcher, torchrun and srun set (or are translated to) RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and
MASTER_PORT; a plain process becomes a world of one.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING

from ds_seg.cgroups import count_allowed_cores
from ds_seg.errors import UserError

if TYPE_CHECKING:
    import torch

_COUNT = re.compile(r"\d+")
"""Slurm writes `8(x2)` for 8 tasks on each of 2 nodes."""
_alone: ContextVar[bool] = ContextVar("ds_seg_alone", default=False)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Within it this process is a world of one, whatever launched it: for work that ranks don't share."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def rank() -> int:
    """Global rank of this process, 0 where nothing was launched."""
    if _alone.get():
        return 0
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0) if _in_srun_step() else 0))


def world_size() -> int:
    """Number of processes in the run, at least 1."""
    if _alone.get():
        return 1
    return int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_STEP_NUM_TASKS", 1)))


def local_rank() -> int:
    """Rank of this process on its own node: the index of its GPU."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0) if _in_srun_step() else 0))


def _local_world_size() -> int:
    """Number of processes of the run on this node, at least 1, as the launcher tells: torchrun, deepspeed or srun."""
    if world_size() == 1:
        return 1
    told = (os.environ.get(name, "") for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_STEP_TASKS_PER_NODE"))
    counts = [int(match[0]) for match in map(_COUNT.match, told) if match]
    return counts[0] if counts else 1


def usable_cores() -> int:
    """Cores that this process may run on, and no more than its container has the time of."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(cores, count_allowed_cores())))


def cores_per_process() -> int:
    """Cores for each process of the run on this node, at least 1: srun gives them, other launchers let all share."""
    given = os.environ.get("SLURM_CPUS_PER_TASK")
    if given and _in_srun_step() and not {"LOCAL_WORLD_SIZE", "LOCAL_SIZE"} & set(os.environ):
        return max(1, min(usable_cores(), int(given)))
    return max(1, usable_cores() // _local_world_size())


def is_main() -> bool:
    """Whether this is global rank 0: the one that prints, logs and writes summaries."""
    return rank() == 0


def device() -> torch.device:
    """This process's GPU, or the CPU where DeepSpeed's accelerator is the CPU."""
    import torch
    from deepspeed.accelerator import get_accelerator

    name = get_accelerator().device_name()
    return torch.device("cpu") if name == "cpu" else torch.device(name, local_rank())


def backend() -> str:
    """The collective backend of the accelerator: nccl on GPUs, gloo on CPUs."""
    return "gloo" if device().type == "cpu" else "nccl"


def _in_srun_step() -> bool:
    """A batch script or an salloc shell also has SLURM_PROCID, but only srun starts all tasks."""
    return "SLURM_STEP_NUM_TASKS" in os.environ


def complete_environment() -> None:
    """Set what torch reads where the launcher did not.

    Raises:
        UserError: RANK and WORLD_SIZE contradict each other, or srun started several processes that can't find each
            other.
    """
    if not 0 <= rank() < world_size():
        raise UserError(
            f"RANK is {rank()}, but WORLD_SIZE is {world_size()}: ranks are numbered from 0 to WORLD_SIZE - 1. Unset "
            "both for one process, or start several with deepspeed, torchrun or srun, which set them."
        )
    if "RANK" not in os.environ and _in_srun_step() and world_size() > 1:
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise UserError(
                f"srun started {world_size()} processes but {' and '.join(missing)} is not set, so they can't "
                "find each other. Export MASTER_ADDR (the first host of the job) and MASTER_PORT (a free port), "
                "as launch/slurm.sh does."
            )
    if world_size() == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(free_port()))
    os.environ.update(RANK=str(rank()), WORLD_SIZE=str(world_size()), LOCAL_RANK=str(local_rank()))


def free_port() -> int:
    """A TCP port that was free just now on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
