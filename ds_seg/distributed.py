"""Rank, world size and the few collectives that ds_seg issues outside DeepSpeed and DDP.

Every launcher is served by one path: the deepspeed launcher, torchrun and srun set (or are translated
to) RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; a plain process becomes a world of one.

Failure is reported through the rendezvous store and not through a collective, so a rank that fails
never makes the others wait: `claim_failure_report` lets exactly one rank print.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import os
import socket
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from ds_seg.errors import UserError

T = TypeVar("T")

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)
_REPORT_WAIT = datetime.timedelta(seconds=10)
_store: dist.Store | None = None


def rank() -> int:
    """Global rank of this process, 0 where nothing was launched."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0) if _in_srun_step() else 0))


def world_size() -> int:
    """Number of processes in the run, at least 1."""
    return int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_STEP_NUM_TASKS", 1)))


def local_rank() -> int:
    """Rank of this process on its own node: the index of its GPU."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0) if _in_srun_step() else 0))


def is_main() -> bool:
    """Whether this is global rank 0: the one that prints, logs and writes summaries."""
    return rank() == 0


def device() -> torch.device:
    """This process's GPU, or the CPU where DeepSpeed's accelerator is the CPU."""
    from deepspeed.accelerator import get_accelerator

    name = get_accelerator().device_name()
    return torch.device("cpu") if name == "cpu" else torch.device(name, local_rank())


def backend() -> str:
    """The collective backend of the accelerator: nccl on GPUs, gloo on CPUs."""
    return "gloo" if device().type == "cpu" else "nccl"


def initialize() -> None:
    """Join the process group, once; a process that nobody launched becomes a world of one.

    Raises:
        UserError: the launcher's environment is incomplete.
    """
    global _store
    if dist.is_initialized():
        return
    _complete_environment()
    if device().type != "cpu":
        torch.cuda.set_device(device())
    rendezvous = dist.rendezvous("env://", timeout=COLLECTIVE_TIMEOUT)
    _store, _, _ = next(iter(rendezvous))
    dist.init_process_group(backend(), store=_store, rank=rank(), world_size=world_size(), timeout=COLLECTIVE_TIMEOUT)
    import deepspeed.comm

    with contextlib.redirect_stdout(io.StringIO()):  # every rank would report that a helper was built
        deepspeed.comm.init_distributed(backend(), verbose=False, dist_init_required=False)


def shutdown() -> None:
    """Leave the process group if it was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def claim_failure_report() -> bool:
    """Whether this rank is the one that prints the failure; no collective is issued.

    The first rank to ask gets True and must call `finish_failure_report` once it has printed. Every
    other rank waits until that happened (at most ten seconds) and gets False, so that its own exit
    does not make the launcher kill the rank that still has to speak.
    """
    if _store is None:
        return is_main() or world_size() == 1
    try:
        if _store.add("ds_seg/failures", 1) == 1:
            return True
        _store.wait(["ds_seg/failure_reported"], _REPORT_WAIT)
    except (RuntimeError, dist.DistError):
        pass  # the rank that hosts the store has reported and gone
    return False


def finish_failure_report() -> None:
    """Let the ranks that wait in `claim_failure_report` exit."""
    if _store is not None:
        try:
            _store.set("ds_seg/failure_reported", "1")
        except (RuntimeError, dist.DistError):
            pass


def barrier() -> None:
    """Wait for every rank."""
    if world_size() > 1:
        dist.barrier()


def reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum over ranks, in place and in the tensor's own dtype; the same tensor is returned."""
    if world_size() > 1:
        dist.all_reduce(values, op=dist.ReduceOp.SUM)
    return values


def reduce_max(values: torch.Tensor) -> torch.Tensor:
    """Element-wise maximum over ranks, in place; the same tensor is returned."""
    if world_size() > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def any_rank(flag: bool) -> bool:
    """True on every rank if `flag` is true on at least one. A collective: every rank calls it."""
    return bool(reduce_max(torch.tensor([int(flag)], device=device())).item())


def broadcast_object(value: T) -> T:
    """Global rank 0's picklable `value`, on every rank. A collective."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=device())
    return box[0]


def gather_objects(value: T) -> list[T]:
    """One picklable value a rank, in rank order, on every rank. A collective."""
    if world_size() == 1:
        return [value]
    gathered: list[T] = [value] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def agree(check: Callable[[], T]) -> T:
    """Run `check` on every rank and go on only if it succeeded on all of them. A collective.

    Returns:
        This rank's own result.

    Raises:
        UserError: of the same class and text on every rank, from the lowest rank that raised one.
    """
    result, failure = None, None
    try:
        result = check()
    except UserError as error:
        failure = error
    failures = [failed for failed in gather_objects(failure) if failed is not None]
    if failures:
        raise failures[0]
    return result  # type: ignore[return-value]


def _in_srun_step() -> bool:
    """A batch script or an salloc shell also has SLURM_PROCID, but only srun starts all tasks."""
    return "SLURM_STEP_NUM_TASKS" in os.environ


def _complete_environment() -> None:
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
