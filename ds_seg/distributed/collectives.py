"""The few collectives that ds_seg issues outside DeepSpeed and DDP."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from ds_seg.distributed.world import device, is_main, world_size
from ds_seg.errors import UserError

T = TypeVar("T")


def barrier() -> None:
    """Wait for every rank."""
    if world_size() > 1:
        # NCCL is told the GPU, or it guesses one from the global rank as long as it knows of none, and warns
        dist.barrier(device_ids=None if device().index is None else [device().index])


def reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum over ranks in the tensor's own dtype, in host memory; `values` is overwritten.

    With NCCL it is the copy to the host that waits for the other ranks. It is made here, where the watchdog knows a
    wait for others from work of one's own.
    """
    if world_size() > 1:
        dist.all_reduce(values, op=dist.ReduceOp.SUM)
    return values.cpu()


def reduce_max(values: torch.Tensor) -> torch.Tensor:
    """Element-wise maximum over ranks, in host memory as with `reduce_sum`; `values` is overwritten."""
    if world_size() > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values.cpu()


def any_rank(flag: bool) -> bool:
    """True on every rank if `flag` is true on at least one. A collective: every rank calls it."""
    return bool(reduce_max(torch.tensor([int(flag)], device=device())).item())


def broadcast(values: torch.Tensor) -> None:
    """Overwrite `values` with global rank 0's. A collective."""
    if world_size() > 1:
        dist.broadcast(values, src=0)


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


def agree_on_main(read: Callable[[], T]) -> T:
    """What `read` returns on global rank 0, which alone calls it, on every rank. A collective.

    Raises:
        UserError: what `read` raised, on every rank.
    """
    return broadcast_object(agree(lambda: read() if is_main() else None))  # type: ignore[arg-type,return-value]
