"""How a step's crops are shared: by processes, and by micro-batches of one process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ds_seg.config.faults import Faults
from ds_seg.errors import count


class Batches(NamedTuple):
    """What one process does in a step."""

    micro_batch: int
    """Crops at once."""
    accumulation_steps: int
    """Micro-batches a step."""
    notes: tuple[str, ...] = ()
    """Lines for the log."""


def describe_batch(global_batch: int, micro_batch: int, world_size: int) -> str:
    """How a step's crops are shared, in words."""
    micro_batches = count(global_batch // (world_size * micro_batch), "micro-batch")
    return f"{global_batch} = {count(micro_batch, 'crop')} x {micro_batches} x {count(world_size, 'process')}"


def resolve_batches(
    config: Mapping[str, Any], *, cumulative_iters: int | None, world_size: int, kept: int | None, faults: Faults
) -> Batches:
    """Share out the global batch, or let it follow from the number of processes where nothing fixes it.

    With a fixed global batch `data.samples_per_gpu` is the most that a process takes at once: it takes the largest
    divisor of its share that is no larger, and accumulates the rest.

    Args:
        config: the run's; `global_batch` fixes the crops of a step.
        cumulative_iters: micro-batches a step as `optimizer_config` has them; None where it says nothing.
        world_size: number of processes.
        kept: the global batch of the checkpoint that the run goes on from, which comes before the config's; None
            where there is none.
        faults: gets a message where the processes can't share it.
    """
    most = faults.integer("data.samples_per_gpu", config["data"], 1, minimum=1)
    if kept is None and config.get("global_batch") is None:
        return Batches(most, cumulative_iters or 1)
    global_batch = kept or faults.integer("global_batch", config, most * world_size, minimum=1)
    share, remainder = divmod(global_batch, world_size)
    if remainder:
        fitting = ", ".join(str(count) for count in range(1, global_batch + 1) if global_batch % count == 0)
        source = "that of the checkpoint to resume from, which" if kept else "which"
        faults.add(
            "global_batch",
            f"got {global_batch}, {source} {world_size} processes can't share evenly. Start a number of "
            f"processes that divides it: {fitting}.",
        )
        return Batches(most, cumulative_iters or 1)
    micro_batch = max(size for size in range(1, min(most, share) + 1) if share % size == 0)
    steps = share // micro_batch
    if kept is None and cumulative_iters not in (None, steps):
        faults.add("optimizer_config.cumulative_iters", f"got {cumulative_iters}, but global_batch makes it {steps}.")
    at_once = f"{count(micro_batch, 'crop')} at once, not data.samples_per_gpu={most}"
    note = f"{at_once}: a process has {share} of the {global_batch}"
    return Batches(micro_batch, steps, () if micro_batch == most else (note,))
