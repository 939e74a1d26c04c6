"""What ZeRO-3 sends: whole parameters before each use, gradients after the backward pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ds_seg.planning.hardware import Hardware
from ds_seg.planning.model_size import ModelSize

HPZ = "zero_hpz_partition_size"
"""Key of `zero_optimization`."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that a GPU receives for one micro-batch, and how long that takes."""

    gathered_forward: float
    gathered_backward: float
    reduced: float
    seconds: float

    @property
    def total(self) -> float:
        """Bytes a GPU a micro-batch."""
        return self.gathered_forward + self.gathered_backward + self.reduced


def count_live_parameters(size: ModelSize, zero: Mapping[str, Any], world_size: int) -> float:
    """Parameters that are whole at once, or on their way; none are where one process has all of them anyway.

    By the time of the first block DeepSpeed 0.19.8 has begun three gathers ahead, and a block that ends in the next
    gather makes all of that whole too. What is gathered arrives in a buffer that stays until the last parameter in it
    is used; it is gone when the backward pass begins, unless parameters are gathered again then.
    """
    if world_size == 1:
        return 0.0
    kept = count_kept_parameters(size, zero)
    persistent = count_persistent_parameters(size, zero)
    bucket = int(zero.get("stage3_prefetch_bucket_size", 50_000_000))
    in_use = kept + persistent + size.block
    ahead = min(3 * bucket, max(0, int(zero.get("stage3_max_live_parameters", 1_000_000_000)) - in_use))
    buffer = min(size.backbone - persistent, max(bucket, size.block)) if kept < size.backbone else 0
    return min(size.backbone, in_use + ahead) + buffer


def count_persistent_parameters(size: ModelSize, zero: Mapping[str, Any]) -> int:
    """Parameters that are whole from step to step: the small ones, as many as the model's own threshold lets in."""
    largest = int(zero.get("stage3_param_persistence_threshold", 100_000))
    most = int(zero.get("stage3_model_persistence_threshold", size.backbone))
    return min(most, sum(part for part in size.parts if part <= largest))


def count_kept_parameters(size: ModelSize, zero: Mapping[str, Any]) -> float:
    """Parameters that stay whole from the forward to the backward pass: the last half of the reuse distance."""
    if not size.trainable:
        return 0.0
    # a frozen trunk too: DeepSpeed 0.19.8 takes the backbone, when its backward pass begins, for a use of all of it
    return min(size.backbone, int(zero.get("stage3_max_reuse_distance", 1_000_000_000)) / 2)


def count_copied_parameters(size: ModelSize, zero: Mapping[str, Any], world_size: int) -> float:
    """Parameters that hpZ has a process hold once more, from where the forward pass lets go of them."""
    sharing = min(_count_sharing(zero), world_size)
    return (size.backbone - count_kept_parameters(size, zero)) / sharing if sharing > 1 else 0.0


def compute_traffic(
    size: ModelSize,
    zero: Mapping[str, Any],
    parameter_bytes: int,
    hardware: Hardware,
    *,
    sent_bytes: int,
) -> Traffic:
    """Traffic of one micro-batch: a gather for each block, a reduction for each bucket.

    With hpZ (`zero_hpz_partition_size`) the backward pass gathers from copies inside the node.

    Args:
        size: of the model.
        zero: `zero_optimization` of the DeepSpeed JSON, its sizes as numbers.
        parameter_bytes: of a parameter.
        hardware: what the model is spread over.
        sent_bytes: of a gradient on its way.
    """
    others = (hardware.gpus - 1) / hardware.gpus
    again = max(0.0, size.used_again - count_kept_parameters(size, zero))
    forward, backward = parameter_bytes * others * size.backbone, parameter_bytes * others * again
    reduced = sent_bytes * others * size.trainable
    over_all, ring_s = hardware.collective_gb_per_s * 1e9, hardware.ring_s
    in_node, ring_in_node_s = hardware.nvlink_gb_per_s * 1e9, hardware.ring_in_node_s
    bucket = max(size.block, int(zero.get("reduce_bucket_size", 500_000_000)))
    seconds = (forward + reduced) / over_all + ring_s * (size.backbone / size.block + size.trainable / bucket)
    gathers = again / size.block
    copied = 1 < _count_sharing(zero) <= hardware.gpus_a_node
    seconds += backward / in_node + gathers * ring_in_node_s if copied else backward / over_all + gathers * ring_s
    return Traffic(forward, backward, reduced, seconds)


def compute_head_traffic_s(size: ModelSize, hardware: Hardware) -> float:
    """Seconds of the heads' all-reduce, once a step."""
    sent = 2 * 4 * size.head_trainable * (hardware.gpus - 1) / hardware.gpus
    return sent / (hardware.collective_gb_per_s * 1e9)


def _count_sharing(zero: Mapping[str, Any]) -> int:
    """Processes that share a copy of the parameters (hpZ); 1 for no copy."""
    return int(zero.get(HPZ, 1))
