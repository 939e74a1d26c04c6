"""Who this process is among the ranks, how they meet and part, and the few collectives outside DeepSpeed and DDP.

What needs torch is imported when it is first asked for: `ds-seg --help` and a mistake in a config's path do without.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ds_seg.distributed.ending import claim_failure_report, count_absent_by, end_all_ranks, end_this_rank, is_ending
from ds_seg.distributed.printing import notify, print_on_main
from ds_seg.distributed.world import (
    alone,
    backend,
    cores_per_process,
    device,
    free_port,
    is_main,
    local_rank,
    rank,
    usable_cores,
    world_size,
)

if TYPE_CHECKING:
    from ds_seg.distributed.collectives import (
        agree,
        agree_on_main,
        any_rank,
        barrier,
        broadcast,
        broadcast_object,
        gather_objects,
        reduce_max,
        reduce_sum,
    )
    from ds_seg.distributed.group import initialize, open_store, shutdown

__all__ = [
    "agree",
    "agree_on_main",
    "alone",
    "any_rank",
    "backend",
    "barrier",
    "broadcast",
    "broadcast_object",
    "claim_failure_report",
    "cores_per_process",
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
    "notify",
    "open_store",
    "print_on_main",
    "rank",
    "reduce_max",
    "reduce_sum",
    "shutdown",
    "usable_cores",
    "world_size",
]
_GROUP = ("initialize", "open_store", "shutdown")


def __getattr__(name: str) -> Any:
    """What needs torch, imported now."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{'group' if name in _GROUP else 'collectives'}")
    return getattr(module, name)
