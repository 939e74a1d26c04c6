"""Memory of one training step by part, on a GPU and in a node's host memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ds_seg.checkpoint import checkpoint_bytes
from ds_seg.planning.communication import count_copied_parameters, count_live_parameters
from ds_seg.planning.hardware import GIB, Hardware
from ds_seg.planning.model_size import ModelSize
from ds_seg.planning.step_costs import StepCost


@dataclass(frozen=True)
class States:
    """How the states of a run are kept."""

    bf16: bool
    offloaded: float
    """Share of the optimizer's state in host memory, 0 to 1."""
    pin_memory: bool
    ema: bool
    zero: Mapping[str, Any]
    """`zero_optimization` of the DeepSpeed JSON, its sizes as numbers."""
    sum_bytes: int = 2
    """Of a gradient that is summed over micro-batches (`data_types.grad_accum_dtype`)."""
    sent_bytes: int = 2
    """Of a gradient that processes send each other (`communication_data_type`)."""

    @property
    def parameter_bytes(self) -> int:
        """Of one parameter of the backbone."""
        return 2 if self.bf16 else 4

    @property
    def gradient_bytes(self) -> int:
        """Of the gradient of a parameter whose state is on a GPU; DeepSpeed 0.19.8 casts it early when it offloads."""
        return 4 if self.offloaded else self.sum_bytes


def compute_gpu_memory(size: ModelSize, cost: StepCost, states: States, hardware: Hardware) -> dict[str, float]:
    """Bytes a GPU by part, at the highest moment of a step.

    Args:
        size: of the model.
        cost: what a micro-batch allocates.
        states: how states are kept.
        hardware: what they are spread over.
    """
    world_size, width = hardware.gpus, states.parameter_bytes
    share = size.trainable / world_size
    on_gpu = (1 - states.offloaded) * share
    resident = {
        "parameters": width * size.backbone / world_size,
        "gradients": states.gradient_bytes * on_gpu,
        "master": 4 * on_gpu,  # DeepSpeed 0.19.8 makes a copy of FP32 parameters too
        "moments": 8 * on_gpu,
        "reduce buckets": _compute_buckets(size, states),
        "live parameters": width * count_live_parameters(size, states.zero, world_size),
        "copies inside the node (hpZ)": width * count_copied_parameters(size, states.zero, world_size),
        "head": _compute_head_states(size),
        "averages (EMA)": 4 * (on_gpu + size.head_trainable) if states.ema else 0.0,
    }
    working: dict[str, float] = dict(cost.peak)
    step_bytes = (
        0 if states.offloaded or states.sum_bytes == 4 else 4 * min(share, _sub_group(size, states, world_size))
    )
    # while the optimizer steps nothing is whole, not even what persists: DeepSpeed 0.19.8 lets go of it before
    working["optimizer step"] = max(0.0, step_bytes - resident["live parameters"] - sum(working.values()))
    loss = hardware.fragmentation * sum(working.values())
    context = hardware.context_gib * (4 / 3 if world_size > 1 else 1) * GIB
    return {**resident, **working, "CUDA context and fragmentation": context + loss}


def compute_host_memory(size: ModelSize, states: States, hardware: Hardware, workers: int) -> dict[str, float]:
    """Bytes of host memory a node by part.

    Args:
        size: of the model.
        states: how states are kept.
        hardware: what they are spread over.
        workers: data loading processes of each training process.
    """
    processes = hardware.gpus_a_node
    share = size.trainable / hardware.gpus if states.offloaded else 0.0
    on_host = states.offloaded * share
    parts = {
        "processes": (hardware.process_gib + workers * hardware.worker_gib) * GIB,
        "master": 4 * on_host,
        "moments": 8 * on_host,
        "gradients": states.sum_bytes * share + 4 * on_host,
        "pinned memory's rounding": _compute_rounding(size, states, share, hardware.gpus) if states.pin_memory else 0.0,
        "averages (EMA)": 4 * on_host if states.ema else 0.0,
    }
    # at the start, without workers: DeepSpeed 0.19.8 puts the shards behind one another in host memory (`defragment`)
    building = hardware.process_gib * GIB + states.parameter_bytes * size.trainable / hardware.gpus
    parts["weights at the start"] = max(0.0, building - sum(parts.values()))
    return {name: processes * size_bytes for name, size_bytes in parts.items()}


def compute_checkpoint_bytes(size: ModelSize, states: States) -> float:
    """One checkpoint over all processes."""
    return float(
        checkpoint_bytes(
            trained=size.trainable,
            frozen=size.backbone - size.trainable,
            heads=size.head_trainable,
            head_buffers=size.head_buffers + size.head - size.head_trainable,
            frozen_dtype_bytes=states.parameter_bytes,
            averaged=states.ema,
        )
    )


def compute_copy_bytes(size: ModelSize, states: States, hardware: Hardware) -> float:
    """Host memory a node for a copy of its part of a checkpoint (`--checkpoint async`); what is on a GPU is pinned."""
    on_gpu = (1 - states.offloaded) * size.trainable / hardware.gpus
    group = min(_sub_group(size, states, hardware.gpus), on_gpu)
    rounding = 3 * on_gpu / group * (_round_up(4 * group) - 4 * group) if group else 0.0
    return hardware.gpus_a_node * (compute_checkpoint_bytes(size, states) / hardware.gpus + rounding)


def _compute_buckets(size: ModelSize, states: States) -> float:
    """The bucket, and the padded copy that DeepSpeed 0.19.8's reduce_scatter_coalesced makes of what is in it."""
    if not size.trainable:
        return 0.0
    bucket = int(states.zero.get("reduce_bucket_size", 500_000_000))
    filled = min(max(bucket, size.largest), size.trainable)
    copied = filled if states.zero.get("reduce_scatter", True) else 0
    return states.sent_bytes * (bucket + copied)


def _compute_head_states(size: ModelSize) -> float:
    """Weights and buffers; of what is trained also gradients, DistributedDataParallel's copy of them, and moments."""
    return 4.0 * (size.head + size.head_buffers) + 16.0 * size.head_trainable


def _sub_group(size: ModelSize, states: States, world_size: int) -> float:
    """Elements of a sub-group: it ends with the parameter that makes it as large as asked for; half of one, say."""
    return int(states.zero.get("sub_group_size", 1_000_000_000)) + size.largest / world_size / 2


def _compute_rounding(size: ModelSize, states: States, share: float, world_size: int) -> float:
    """Torch pins memory in powers of two: a tensor of all gradients, and an FP32 one for each offloaded sub-group."""
    if not share:
        return 0.0
    group = min(_sub_group(size, states, world_size), share)
    flat, part = states.sum_bytes * share, 4 * group
    return _round_up(flat) - flat + states.offloaded * share / group * (_round_up(part) - part)


def _round_up(size_bytes: float) -> float:
    return 2.0 ** math.ceil(math.log2(size_bytes))
