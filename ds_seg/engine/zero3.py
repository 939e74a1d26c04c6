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
    """

    joint_norm = float("nan")

    def _get_norm_groups(self) -> list[float]:
        return [self.joint_norm]

    def _prepare_fp32_grad_for_sub_group(self, sub_group_id: int) -> None:
        """Give the optimizer the FP32 gradient of a sub-group, without DeepSpeed's copy of it in bf16 first."""
        flat = self.fp32_partitioned_groups_flat[sub_group_id]
        flat.grad = _join(self.averaged_gradients[sub_group_id]).to(flat.dtype)
        self.averaged_gradients[sub_group_id] = None


def use_joint_norm(engine: DeepSpeedEngine) -> None:
    """Let the engine's ZeRO-3 optimizer, which DeepSpeed makes by itself, step as `JointNormZero3`."""
    if type(engine.optimizer) is not DeepSpeedZeroOptimizer_Stage3:
        raise TypeError(f"DeepSpeed made a {type(engine.optimizer).__name__}, want DeepSpeedZeroOptimizer_Stage3")
    engine.optimizer.__class__ = JointNormZero3


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
