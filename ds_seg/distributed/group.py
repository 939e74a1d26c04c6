"""Join and leave the process group."""

from __future__ import annotations

import datetime
import os

import torch
import torch.distributed as dist

from ds_seg.distributed import ending
from ds_seg.distributed.collectives import barrier
from ds_seg.distributed.world import backend, complete_environment, device, rank, world_size

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)
_store: dist.Store | None = None


def initialize() -> None:
    """Join the process group, once; a process that nobody launched becomes a world of one.

    Raises:
        UserError: the launcher's environment is incomplete.
    """
    global _store
    if dist.is_initialized():
        return
    complete_environment()
    if device().type != "cpu":
        torch.cuda.set_device(device())
    elif "OMP_NUM_THREADS" not in os.environ:  # torch would give every process all cores
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size()))
    rendezvous = dist.rendezvous("env://", timeout=COLLECTIVE_TIMEOUT)
    _store, _, _ = next(iter(rendezvous))
    dist.init_process_group(backend(), store=_store, rank=rank(), world_size=world_size(), timeout=COLLECTIVE_TIMEOUT)
    import deepspeed

    _leave_out_shared_memory_op(deepspeed.ops.__compatible_ops__)
    deepspeed.comm.init_distributed(backend(), verbose=False, dist_init_required=False)
    ending.watch_for_the_end(_store)


def shutdown() -> None:
    """Leave the process group, together with all ranks, if it was joined."""
    if not dist.is_initialized():
        return
    barrier()
    ending.announce_success()
    barrier()
    dist.destroy_process_group()


def open_store() -> dist.Store | None:
    """A connection of its own to the rendezvous store, for a thread; None in a world of one."""
    assert _store is not None, "the process group was not joined"
    return _store.clone() if world_size() > 1 else None


def _leave_out_shared_memory_op(compatible_ops: dict[str, bool]) -> None:
    """Keep DeepSpeed from compiling an all-reduce for inference on CPUs, which nothing here calls.

    It needs a compiler at run time, and leaves 66 MiB a rank in /dev/shm for every run (DeepSpeed 0.19.8).
    """
    from deepspeed.accelerator import get_accelerator

    if device().type == "cpu":
        compatible_ops[get_accelerator().create_op_builder("ShareMemCommBuilder").NAME] = False
