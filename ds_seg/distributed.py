"""Rank, world size and the few collectives that ds_seg issues outside DeepSpeed and DDP.

Every launcher is served by one path: the deepspeed launcher, torchrun and srun set (or are translated
to) RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; a plain process becomes a world of one.

Failure is reported through the rendezvous store and not through a collective: exactly one rank prints it
(`claim_failure_report`), and all ranks end with its exit code (`end_all_ranks`), also those in a collective.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist

from ds_seg.errors import EXIT_OK, UserError

T = TypeVar("T")

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)
_END = "ds_seg/end"
"""Store key: the exit code of the run, set once it is known."""
_LEFT = "ds_seg/left"
"""Store key: how many ranks have learnt of a failure and are ending."""
_LEAVE_TIMEOUT_S = 10.0
"""For a rank that can't end: one that was killed, or that holds the interpreter in a library."""
_alone: ContextVar[bool] = ContextVar("ds_seg_alone", default=False)
_store: dist.Store | None = None
_watcher: threading.Thread | None = None
_reporting = threading.Event()
"""Set on the rank that ends the others, so that its own watcher leaves it the time to do so."""


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
    global _store, _watcher
    if dist.is_initialized():
        return
    _complete_environment()
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
    _watcher = _start_watcher(_store.clone()) if world_size() > 1 else None


def shutdown() -> None:
    """Leave the process group, together with all ranks, if it was joined."""
    if not dist.is_initialized():
        return
    barrier()
    if is_main() and _store is not None:
        _store.set(_END, str(EXIT_OK))
    if _watcher is not None:
        _watcher.join(timeout=5)
    barrier()
    dist.destroy_process_group()


def claim_failure_report() -> bool:
    """Whether this rank is the one that prints the failure; no collective is issued.

    The first rank to ask gets True, and so does every rank once rank 0, which keeps the list, is gone.
    """
    if _store is None:
        return is_main()
    try:
        return _store.add("ds_seg/failures", 1) == 1
    except (RuntimeError, dist.DistError):
        return True


def end_all_ranks(code: int) -> NoReturn:
    """End this process with `code`, and every other rank with the same code, wherever it waits.

    Called by the rank that has printed a failure. Python's and torch's own clean-up is left out: it would
    wait for ranks that no longer answer.
    """
    _reporting.set()
    if _store is not None:
        with contextlib.suppress(RuntimeError, dist.DistError):
            _store.set(_END, str(code))
            _leave(_store)
    _exit(code)


def _start_watcher(store: dist.Store) -> threading.Thread:
    """Wait in the background for `_END`: a rank inside a collective would not learn of a failure elsewhere."""

    def watch() -> None:
        with contextlib.suppress(RuntimeError, dist.DistError):
            store.wait([_END], datetime.timedelta(days=365))
            code = int(store.get(_END))
            if code != EXIT_OK and not _reporting.is_set():
                _leave(store)
                _exit(code)

    thread = threading.Thread(target=watch, name="ds_seg failure watcher", daemon=True)
    thread.start()
    return thread


def _leave(store: dist.Store) -> None:
    """Count this rank as ended; rank 0, which keeps the store, goes last, so that all others get its answer."""
    store.add(_LEFT, 1)
    deadline = time.monotonic() + _LEAVE_TIMEOUT_S
    while is_main() and store.add(_LEFT, 0) < world_size() and time.monotonic() < deadline:
        time.sleep(0.02)


def _exit(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


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


def _leave_out_shared_memory_op(compatible_ops: dict[str, bool]) -> None:
    """Keep DeepSpeed from compiling an all-reduce for inference on CPUs, which nothing here calls.

    It needs a compiler at run time, and leaves 66 MiB a rank in /dev/shm for every run (DeepSpeed 0.19.8).
    """
    from deepspeed.accelerator import get_accelerator

    if device().type == "cpu":
        compatible_ops[get_accelerator().create_op_builder("ShareMemCommBuilder").NAME] = False


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
