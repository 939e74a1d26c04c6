"""Join and leave the process group."""

from __future__ import annotations

import contextlib
import datetime
import os
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ds_seg.distributed import ending
from ds_seg.distributed.printing import notify
from ds_seg.distributed.world import (
    backend,
    complete_environment,
    cores_per_process,
    device,
    local_rank,
    rank,
    world_size,
)
from ds_seg.errors import UserError

if TYPE_CHECKING:
    import torch.distributed as dist

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)
_WATCHED_TIMEOUT = datetime.timedelta(days=365)
_TOLD_AFTER_S = 60.0
_store: dist.Store | None = None


def initialize(*, watched: bool = False) -> None:
    """Join the process group, once; a process that nobody launched becomes a world of one.

    Args:
        watched: a watchdog ends collectives that last too long, and knows better than torch which do.

    Raises:
        UserError: the launcher's environment is incomplete, or it left no GPU for this process.
    """
    import torch
    import torch.distributed as dist

    global _store
    if dist.is_initialized():
        return
    complete_environment()
    if "OMP_NUM_THREADS" not in os.environ:  # torch would give every process all cores
        torch.set_num_threads(cores_per_process())
    _store = _open_rendezvous()
    ending.watch_for_the_end(_store)
    if device().type != "cpu":
        _take_gpu()
    timeout = _WATCHED_TIMEOUT if watched else COLLECTIVE_TIMEOUT
    _set_default_timeout(timeout)
    dist.init_process_group(backend(), store=_store, rank=rank(), world_size=world_size(), timeout=timeout)
    import deepspeed

    with _without_shared_memory_op():
        deepspeed.comm.init_distributed(backend(), verbose=False, dist_init_required=False)


def _open_rendezvous() -> dist.Store:
    """The store where the ranks meet, without what an attempt before a restart by torchrun has left in it.

    With --max-restarts torchrun keeps one store for all attempts (torch 2.13), and with it the first one's failure.

    Raises:
        UserError: the address or the port can't be used.
    """
    import torch.distributed as dist

    try:
        with _telling_of_a_long_wait():
            store, _, _ = next(iter(dist.rendezvous("env://", timeout=COLLECTIVE_TIMEOUT)))
    except (ValueError, dist.DistNetworkError) as error:
        raise UserError(
            f"Rank {rank()} of {world_size()} can't use the rendezvous at {_describe_meeting()}: {error}. If another "
            "job has the port, choose a free one: deepspeed --master_port N, torchrun --master-port N, or "
            "MASTER_PORT=N for launch/train.sh and srun."
        ) from error
    return dist.PrefixStore(f"ds_seg/attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


@contextlib.contextmanager
def _telling_of_a_long_wait() -> Iterator[None]:
    """Say on each node, once, what is being waited for: a node that did not start, or a port that a firewall closes."""
    text = (
        f"rank {rank()} has waited for {_TOLD_AFTER_S:g} s for all {world_size()} processes to meet at "
        f"{_describe_meeting()}: have all been started, and can they reach that port? It gives up after "
        f"{COLLECTIVE_TIMEOUT.total_seconds() / 60:g} minutes."
    )
    telling = threading.Timer(_TOLD_AFTER_S, notify, [text])
    telling.daemon = True
    if local_rank() == 0:
        telling.start()
    try:
        yield
    finally:
        telling.cancel()


def _describe_meeting() -> str:
    address, port = (os.environ.get(name, "(not set)") for name in ("MASTER_ADDR", "MASTER_PORT"))
    return f"MASTER_ADDR {address}, MASTER_PORT {port}"


def shutdown() -> None:
    """Leave the process group, together with all ranks, if it was joined."""
    global _store
    if _store is None:
        return
    import torch.distributed as dist

    from ds_seg.distributed.collectives import barrier

    barrier()
    ending.announce_success()
    barrier()
    dist.destroy_process_group()
    _store = None


def open_store() -> dist.Store | None:
    """A connection of its own to the rendezvous store, for a thread; None in a world of one."""
    assert _store is not None, "the process group was not joined"
    return _store.clone() if world_size() > 1 else None


def _set_default_timeout(timeout: datetime.timedelta) -> None:
    """Also for the groups that DeepSpeed makes, which names none: torch would give them 10 minutes under NCCL."""
    from torch.distributed import distributed_c10d

    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timeout


def _take_gpu() -> None:
    """Let everything that names no device of its own use this process's GPU."""
    import torch

    visible = torch.cuda.device_count()
    if local_rank() >= visible:
        raise UserError(
            f"Rank {rank()} is process {local_rank()} of its node (from 0) and sees {visible} GPUs there. Start no "
            "more processes than GPUs, and let each see all GPUs of its node: srun without --gpus-per-task and "
            "--gpu-bind, as launch/slurm.sh has it."
        )
    torch.cuda.set_device(device())


@contextlib.contextmanager
def _without_shared_memory_op() -> Iterator[None]:
    """Keep DeepSpeed from compiling an all-reduce for inference on CPUs, which nothing here calls.

    It needs a compiler at run time, and leaves 66 MiB a rank in /dev/shm for every run. Within it DeepSpeed finds no
    compatible op at all: asking which there are starts compilers (DeepSpeed 0.19.8), and no other op is asked for here.
    """
    from deepspeed import ops

    known = vars(ops).get("__compatible_ops__")
    vars(ops)["__compatible_ops__"] = {}
    try:
        yield
    finally:
        if known is None:
            del vars(ops)["__compatible_ops__"]
        else:
            vars(ops)["__compatible_ops__"] = known
