"""How long a step takes, by what it is spent on, and what holds it back."""

from __future__ import annotations

from dataclasses import dataclass

from ds_seg.planning.communication import compute_head_traffic_s, compute_traffic
from ds_seg.planning.hardware import FORWARD_MS, Hardware
from ds_seg.planning.memory import States
from ds_seg.planning.model_size import ModelSize
from ds_seg.planning.step_costs import StepCost

_STATE_TRAFFIC_BYTES = 48
"""Of a bf16 parameter: FP32 gradient from the bf16 one 6, clipping 8, AdamW 28, bf16 weight from its master 6."""
_AVERAGE_TRAFFIC_BYTES = 12
"""Of an average: master read, average read and written."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step; on GPUs computation, communication, Python and gradients offloaded overlap."""

    compute_s: float
    communication_s: float
    offload_s: float
    """Gradients on their way between GPU and host memory, behind the computation."""
    host_s: float
    """Python: ZeRO-3's hooks and launching kernels."""
    optimizer_s: float
    head_reduce_s: float
    overlaps: bool = True

    @property
    def total_s(self) -> float:
        """Of the step."""
        meanwhile_s = self._longest_s if self.overlaps else sum(self._meanwhile_s)
        return meanwhile_s + self.optimizer_s + self.head_reduce_s

    @property
    def _meanwhile_s(self) -> tuple[float, ...]:
        return self.compute_s, self.communication_s, self.offload_s, self.host_s

    @property
    def _longest_s(self) -> float:
        return max(self._meanwhile_s)

    @property
    def is_communication_bound(self) -> bool:
        """Whether nothing that overlaps with communication takes longer."""
        return self.communication_s == self._longest_s

    @property
    def bound(self) -> str:
        """What holds the step back, in words."""
        if self.optimizer_s > self._longest_s:
            return "the optimizer in host memory, which takes longer than the computation"
        if self.offload_s == self._longest_s:
            return f"PCIe: gradients move for {self.offload_s / self.compute_s:.1f} times as long as computation takes"
        if self.host_s == self._longest_s:
            return f"Python: hooks and launches take {self.host_s / self.compute_s:.1f} times as long as computation"
        if self.is_communication_bound:
            return f"communication: it takes {self.communication_s / self.compute_s:.1f} times as long as computation"
        return f"computation: communication takes {self.communication_s / self.compute_s:.0%} of its time"


def compute_step_time(
    size: ModelSize,
    cost: StepCost,
    states: States,
    hardware: Hardware,
    accumulation_steps: int,
) -> StepTime:
    """Time of a step of so many micro-batches."""
    traffic = compute_traffic(size, states.zero, states.parameter_bytes, hardware, sent_bytes=states.sent_bytes)
    gradients_s = _compute_gradients_s(size, states, hardware, accumulation_steps)
    behind_s, alone_s = (gradients_s, 0.0) if states.pin_memory else (0.0, gradients_s)
    return StepTime(
        accumulation_steps * _compute_device_s(cost, hardware),
        accumulation_steps * traffic.seconds,
        behind_s,
        accumulation_steps * _compute_host_s(size, cost),
        _compute_optimizer_s(size, states, hardware) + alone_s,
        compute_head_traffic_s(size, hardware),
        hardware.overlaps,
    )


def _compute_device_s(cost: StepCost, hardware: Hardware) -> float:
    """Of one micro-batch; the head's FP32 products are half as fast."""
    products = cost.backbone_flops - cost.attention_flops + 2 * cost.head_flops
    at_peak = products / hardware.utilisation + cost.attention_flops / hardware.attention_utilisation
    return at_peak / (hardware.peak_tflops * 1e12) + cost.moved_bytes / (hardware.elementwise_gb_per_s * 1e9)


def _compute_host_s(size: ModelSize, cost: StepCost) -> float:
    """Of one micro-batch."""
    block_ms = cost.host_ms_a_block if size.used_again == size.backbone else FORWARD_MS
    return size.depth * block_ms / 1e3


def _compute_optimizer_s(size: ModelSize, states: States, hardware: Hardware) -> float:
    """The update where its state is, the averages, and the new weights' way to the GPU."""
    share = size.trainable / hardware.gpus
    on_host = states.offloaded * share
    bytes_a_parameter = _STATE_TRAFFIC_BYTES + (_AVERAGE_TRAFFIC_BYTES if states.ema else 0)
    gpu_bytes = bytes_a_parameter * (size.head_trainable + share - on_host)
    host_s = bytes_a_parameter * on_host * hardware.gpus_a_node / (hardware.host_gb_per_s * 1e9)
    weights_s = states.parameter_bytes * on_host / (hardware.pageable_gb_per_s * 1e9)
    return gpu_bytes / (hardware.hbm_gb_per_s * 1e9) + host_s + weights_s


def _compute_gradients_s(size: ModelSize, states: States, hardware: Hardware, accumulation_steps: int) -> float:
    """The gradients' way between GPU and host memory where anything is offloaded.

    DeepSpeed 0.19.8 keeps the sum of all gradients in host memory and takes it to the GPU and back for every
    micro-batch; of what is offloaded it moves an FP32 copy at last. Only pinned memory lets it do so in the background.
    """
    if not states.offloaded:
        return 0.0
    bytes_a_parameter = 2 * states.sum_bytes * accumulation_steps + 4 * states.offloaded
    return bytes_a_parameter * size.trainable / hardware.gpus / (hardware.pcie_gb_per_s * 1e9)
