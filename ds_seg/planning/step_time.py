"""How long a step takes, by what it is spent on, and what holds it back."""

from __future__ import annotations

from dataclasses import dataclass

from ds_seg.planning.communication import compute_head_traffic_s, compute_traffic
from ds_seg.planning.hardware import Hardware
from ds_seg.planning.memory import States
from ds_seg.planning.model_size import ModelSize
from ds_seg.planning.step_costs import StepCost

_STATE_TRAFFIC_BYTES = 28
"""Read: gradient, master, two moments; written: parameter, master, two moments; 2 or 4 bytes each."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step; computation and communication overlap."""

    compute_s: float
    communication_s: float
    optimizer_s: float
    head_reduce_s: float

    @property
    def total_s(self) -> float:
        """Of the step."""
        return max(self.compute_s, self.communication_s) + self.optimizer_s + self.head_reduce_s

    @property
    def bound(self) -> str:
        """What holds the step back, in words."""
        longest = max(self.compute_s, self.communication_s)
        if self.optimizer_s > longest:
            return "the optimizer in host memory takes longer than the computation"
        if self.communication_s > self.compute_s:
            return f"communication: it takes {self.communication_s / self.compute_s:.1f} times as long as computation"
        return f"computation: communication takes {self.communication_s / self.compute_s:.0%} of its time"


def compute_step_time(
    size: ModelSize,
    cost: StepCost,
    states: States,
    hardware: Hardware,
    accumulation_steps: int,
    *,
    hpz: bool = False,
) -> StepTime:
    """Time of a step of so many micro-batches."""
    products_s = cost.backbone_flops + 2 * cost.head_flops
    compute_s = products_s / (hardware.peak_tflops * 1e12 * hardware.utilisation)
    traffic = compute_traffic(size, states.zero, states.parameter_bytes, hardware, hpz=hpz)
    return StepTime(
        accumulation_steps * compute_s,
        accumulation_steps * traffic.seconds,
        _compute_optimizer_s(size, states, hardware),
        compute_head_traffic_s(size, hardware),
    )


def _compute_optimizer_s(size: ModelSize, states: States, hardware: Hardware) -> float:
    share = size.trainable / hardware.gpus
    heads_s = _STATE_TRAFFIC_BYTES * size.head_trainable / (hardware.hbm_gb_per_s * 1e9)
    if not states.offload:
        return heads_s + _STATE_TRAFFIC_BYTES * share / (hardware.hbm_gb_per_s * 1e9)
    update_s = _STATE_TRAFFIC_BYTES * share * hardware.gpus_a_node / (hardware.host_gb_per_s * 1e9)
    moved_s = 2 * states.parameter_bytes * share / (hardware.pcie_gb_per_s * 1e9)
    return heads_s + update_s + moved_s
