"""Who this process is among the ranks, how they meet and part, and the few collectives outside DeepSpeed and DDP."""

from ds_seg.distributed.collectives import (
    agree,
    any_rank,
    barrier,
    broadcast_object,
    gather_objects,
    reduce_max,
    reduce_sum,
)
from ds_seg.distributed.ending import claim_failure_report, count_absent_by, end_all_ranks, end_this_rank, is_ending
from ds_seg.distributed.group import initialize, open_store, shutdown
from ds_seg.distributed.world import (
    alone,
    backend,
    device,
    free_port,
    is_main,
    local_rank,
    rank,
    world_size,
)

__all__ = [
    "agree",
    "alone",
    "any_rank",
    "backend",
    "barrier",
    "broadcast_object",
    "claim_failure_report",
    "count_absent_by",
    "device",
    "end_all_ranks",
    "end_this_rank",
    "free_port",
    "gather_objects",
    "initialize",
    "is_ending",
    "is_main",
    "local_rank",
    "open_store",
    "rank",
    "reduce_max",
    "reduce_sum",
    "shutdown",
    "world_size",
]
