"""One way to run a training on given machines: what it takes, and whether it fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ds_seg.config import RunConfig
from ds_seg.config.deepspeed_json import FP32_NAMES, offloaded_share
from ds_seg.config.zero_sizes import settle_zero_sizes
from ds_seg.planning.communication import Traffic, compute_traffic
from ds_seg.planning.hardware import GIB, Hardware
from ds_seg.planning.memory import (
    States,
    compute_checkpoint_bytes,
    compute_copy_bytes,
    compute_gpu_memory,
    compute_host_memory,
)
from ds_seg.planning.model_size import ModelSize
from ds_seg.planning.step_costs import StepCost
from ds_seg.planning.step_time import StepTime, compute_step_time

OFFLOAD = {"device": "cpu", "pin_memory": True}


@dataclass(frozen=True)
class Batch:
    """How the crops of a step are spread, and how many steps there are."""

    gpus: int
    micro_batch: int
    accumulation_steps: int
    max_steps: int

    @property
    def images(self) -> int:
        """Crops a step."""
        return self.gpus * self.micro_batch * self.accumulation_steps


@dataclass(frozen=True)
class Candidate:
    """One way to run a training, with all that is predicted of it."""

    hardware: Hardware
    batch: Batch
    checkpointing: str
    deepspeed: Mapping[str, Any]
    """With numbers for the sizes that were "auto"."""
    states: States
    gpu_bytes: Mapping[str, float]
    host_bytes: Mapping[str, float]
    time: StepTime
    traffic: Traffic
    cost: StepCost
    checkpoint_bytes: float
    copy_bytes: float
    """Host memory of a node for `--checkpoint async`."""

    @property
    def gpu_gib(self) -> float:
        """Memory of a GPU."""
        return sum(self.gpu_bytes.values()) / GIB

    @property
    def host_gib(self) -> float:
        """Host memory of a node."""
        return sum(self.host_bytes.values()) / GIB

    @property
    def gpu_spare_gib(self) -> float:
        """Memory left on a GPU; negative where it does not fit."""
        return self.hardware.usable * self.hardware.gpu_memory_gib - self.gpu_gib

    @property
    def host_spare_gib(self) -> float:
        """Memory left on a node; negative where it does not fit, infinite where nothing is known of it."""
        limit = self.hardware.host_memory_gib
        return float("inf") if limit is None else limit - self.host_gib

    @property
    def fits(self) -> bool:
        """Whether both memories suffice."""
        return self.gpu_spare_gib >= 0 and self.host_spare_gib >= 0

    @property
    def images_per_s(self) -> float:
        """Over all GPUs."""
        return self.batch.images / self.time.total_s

    @property
    def hours(self) -> float:
        """Of the whole schedule, without evaluations and checkpoints."""
        return self.batch.max_steps * self.time.total_s / 3600

    @property
    def model_flops_utilisation(self) -> float:
        """Of the backbone, recomputation not counted."""
        flops = self.cost.model_flops * self.batch.accumulation_steps
        return flops / self.time.total_s / (self.hardware.peak_tflops * 1e12)


def build_candidate(
    run: RunConfig,
    size: ModelSize,
    cost: StepCost,
    hardware: Hardware,
    batch: Batch,
    checkpointing: str,
    deepspeed: Mapping[str, Any],
) -> Candidate:
    """Predict one way to run; sizes that are "auto" use what memory there is to spare.

    Args:
        run: the run, of any world size.
        size: of its model.
        cost: of a micro-batch of this size and policy.
        hardware: where it runs.
        batch: how the crops are spread.
        checkpointing: the policy that `cost` is for.
        deepspeed: the DeepSpeed config, with or without an optimizer in host memory.
    """
    states = read_states(deepspeed, run)
    if run.auto_sizes:
        live_bytes = compute_live_bytes(run, size, cost, hardware, deepspeed)
        deepspeed = settle_zero_sizes(deepspeed, run.auto_sizes, run.model.backbone, live_bytes)
        states = read_states(deepspeed, run)
    return Candidate(
        hardware,
        batch,
        checkpointing,
        deepspeed,
        states,
        compute_gpu_memory(size, cost, states, hardware),
        compute_host_memory(size, states, hardware, run.workers),
        compute_step_time(size, cost, states, hardware, batch.accumulation_steps),
        compute_traffic(size, states.zero, states.parameter_bytes, hardware, sent_bytes=states.sent_bytes),
        cost,
        compute_checkpoint_bytes(size, states),
        compute_copy_bytes(size, states, hardware),
    )


def compute_live_bytes(
    run: RunConfig, size: ModelSize, cost: StepCost, hardware: Hardware, deepspeed: Mapping[str, Any]
) -> float:
    """Memory that whole parameters may take: what all else leaves of a GPU."""
    least = settle_zero_sizes(deepspeed, run.auto_sizes, run.model.backbone, 0)
    parts = compute_gpu_memory(size, cost, read_states(least, run), hardware)
    return hardware.usable * hardware.gpu_memory_gib * GIB - sum(parts.values()) + parts["live parameters"]


def read_states(deepspeed: Mapping[str, Any], run: RunConfig) -> States:
    """How a DeepSpeed config and a run keep their states."""
    zero = deepspeed["zero_optimization"]
    offload = zero.get("offload_optimizer") or {}
    own = "bf16" if run.bf16 else "fp32"
    sums = (deepspeed.get("data_types") or {}).get("grad_accum_dtype") or own
    sent = deepspeed.get("communication_data_type") or own
    return States(
        bf16=run.bf16,
        offloaded=offloaded_share(deepspeed),
        pin_memory=bool(offload.get("pin_memory", True)),
        ema=run.ema is not None,
        zero=zero,
        sum_bytes=4 if sums in FP32_NAMES else 2,
        sent_bytes=4 if sent.lower() in FP32_NAMES else 2,
    )


def with_offload(deepspeed: Mapping[str, Any], offload: Mapping[str, Any] | None) -> dict[str, Any]:
    """The DeepSpeed config with this `offload_optimizer` section, or none."""
    zero = {key: value for key, value in deepspeed["zero_optimization"].items() if key != "offload_optimizer"}
    return {**deepspeed, "zero_optimization": {**zero, "offload_optimizer": dict(offload)} if offload else zero}
