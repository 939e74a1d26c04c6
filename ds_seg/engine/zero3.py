"""DeepSpeed's ZeRO-3 optimizer, stepping with what our step already knows."""

from __future__ import annotations

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3


class JointNormZero3(DeepSpeedZeroOptimizer_Stage3):
    """ZeRO-3 that is told the norm of the gradient and takes gradients from where they lie (decision 018).

    DeepSpeed 0.19.8 computes a norm of the backbone alone, in FP64 and with a collective of its own, to skip a step
    whose norm is not finite. The step here has the joint norm of backbone and heads, whose verdict holds for both.

    Attributes:
        joint_norm: for the coming step; where it is not finite DeepSpeed skips, clears gradients and counts.
        resident_optimizer: steps the first sub-groups, whose state stays on the GPU, where only a part of them is
            offloaded (decision 019); None elsewhere.
    """

    joint_norm = float("nan")
    resident_optimizer: torch.optim.Optimizer | None = None

    def optimizer_of(self, sub_group_id: int) -> torch.optim.Optimizer:
        """What steps a sub-group: DeepSpeed's optimizer, or `resident_optimizer` if the sub-group is not offloaded."""
        resident = int((1 - self.partial_offload) * len(self.fp16_groups)) if self.resident_optimizer else 0
        return self.resident_optimizer if sub_group_id < resident else self.optimizer

    def _get_norm_groups(self) -> list[float]:
        return [self.joint_norm]

    def _prepare_fp32_grad_for_sub_group(self, sub_group_id: int) -> None:
        """Give the optimizer the FP32 gradient of a sub-group, without DeepSpeed's copy of it in bf16 first."""
        flat = self.fp32_partitioned_groups_flat[sub_group_id]
        flat.grad = _join(self.averaged_gradients[sub_group_id]).to(flat.dtype)
        self.averaged_gradients[sub_group_id] = None

    def unscale_and_clip_grads(self, sub_group_id: int, total_norm: float) -> None:
        """Multiply the FP32 gradient of a sub-group by what clips it; DeepSpeed multiplies by 1 too."""
        if self.loss_scale != 1.0 or self.clip_grad > 0.0:
            super().unscale_and_clip_grads(sub_group_id, total_norm)

    def _constant_buffered_norm2(self, input: torch.Tensor, buffer_size: int = 0) -> torch.Tensor:
        """Norm of an offloaded gradient, summed in FP32 as on a GPU, not over an FP64 copy of it on the GPU."""
        return torch.linalg.vector_norm(input, dtype=torch.float32)

    def _optimizer_step(self, sub_group_id: int) -> None:
        """Step a sub-group with the optimizer that has its rates; DeepSpeed's own second optimizer has none."""
        optimizer = self.optimizer_of(sub_group_id)
        group = optimizer.param_groups[self.sub_group_to_group_id[sub_group_id]]
        group["params"] = [self.fp32_partitioned_groups_flat[sub_group_id]]
        optimizer.step()
        group["params"] = []


def gradient_norms(optimizer: DeepSpeedZeroOptimizer_Stage3) -> list[torch.Tensor]:
    """2-norms in FP32 of this rank's parts of the gradient, one of each parameter; valid before a step.

    With an offloaded optimizer DeepSpeed takes them on the GPU before it moves the gradients to host memory.
    """
    if optimizer.offload_optimizer:
        return list(optimizer.norm_for_param_grads.values())
    return [
        torch.linalg.vector_norm(part, dtype=torch.float32)
        for parts in optimizer.averaged_gradients.values()
        for part in parts
    ]


def local_master(parameter: torch.nn.Parameter) -> torch.Tensor:
    """This rank's part of a parameter's FP32 master, padded, where the optimizer keeps it.

    DeepSpeed's `safe_get_local_fp32_param` takes what is offloaded to the GPU first.
    """
    optimizer = parameter._z3_optimizer  # type: ignore[attr-defined]
    sub_group_id, start, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
    return optimizer.fp32_partitioned_groups_flat[sub_group_id].narrow(0, start, length)


def use_joint_norm(engine: DeepSpeedEngine, resident_optimizer: torch.optim.Optimizer | None) -> None:
    """Let the engine's ZeRO-3 optimizer, which DeepSpeed makes by itself, step as `JointNormZero3`."""
    if type(engine.optimizer) is not DeepSpeedZeroOptimizer_Stage3:
        raise TypeError(f"DeepSpeed made a {type(engine.optimizer).__name__}, want DeepSpeedZeroOptimizer_Stage3")
    engine.optimizer.__class__ = JointNormZero3
    engine.optimizer.resident_optimizer = resident_optimizer


def _join(parts: list[torch.Tensor]) -> torch.Tensor:
    """The stretch of memory that `parts` fill one after another.

    Raises:
        RuntimeError: there is a gap, or they are not parts of one tensor.
    """
    end = parts[0].data_ptr()
    for part in parts:
        if part.data_ptr() != end:
            raise RuntimeError("ZeRO-3's gradients do not lie one after another: not the DeepSpeed that was tested.")
        end += part.nbytes
    return parts[0].as_strided((sum(part.numel() for part in parts),), (1,))
