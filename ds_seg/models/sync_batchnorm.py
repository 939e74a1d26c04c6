"""SyncBatchNorm that also runs on CPU processes.

Shape legend: B images, C channels; trailing dimensions are free.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import ds_seg.openmmlab  # noqa: F401  (before mmcv)

from mmcv.cnn.bricks.registry import NORM_LAYERS  # isort: skip


class _SumOverRanks(torch.autograd.Function):
    """Sum over ranks whose gradient is summed over ranks: each rank's loss depends on every rank's value.

    torch's own (torch.distributed.nn.functional.all_reduce) is deprecated since torch 2.13, and the gradient
    of what replaces it differs between the releases that we support.
    """

    @staticmethod
    def forward(_ctx: Any, values: Tensor) -> Tensor:  # type: ignore[override]
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_ctx: Any, grad_total: Tensor) -> Tensor:  # type: ignore[override]
        grad_values = grad_total.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad_values)
        return grad_values


@NORM_LAYERS.register_module("SyncBN", force=True)
class SyncBatchNorm(_BatchNorm):
    """torch's SyncBatchNorm, with the same statistics and gradients over gloo for CPU tensors.

    On any other device, in evaluation, and in a world of one it is torch's own code. It borrows that code
    and does not inherit it, because DistributedDataParallel refuses CPU modules that hold an instance of
    torch's class (torch 2.13).

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: weight of a new batch in the running statistics; None for their plain mean.
        affine: learn a scale and a shift a channel.
        track_running_stats: keep running statistics for evaluation.
    """

    process_group = None
    """All ranks; torch's own code asks for it."""
    _check_input_dim = nn.SyncBatchNorm._check_input_dim
    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels

    def forward(self, input: Tensor) -> Tensor:
        """Normalise every channel over the batch and the positions of all ranks.

        Args:
            input: (B, C, ...); B and the positions may differ between ranks, C may not.

        Returns:
            The same shape and dtype.

        Raises:
            ValueError: a single value a channel over all ranks in training: its variance is undefined.
        """
        if input.device.type != "cpu":
            return nn.SyncBatchNorm.forward(self, input)  # type: ignore[arg-type]
        if not self._must_reduce():
            return super().forward(input)
        self._check_input_dim(input)
        wide = input.to(torch.promote_types(input.dtype, torch.float32))
        dims = [0, *range(2, wide.dim())]
        mean_C, var_C, count = self._compute_statistics(wide, dims)
        if self.track_running_stats:
            self._update_running_statistics(mean_C.detach(), var_C.detach(), count)
        shape = [1, -1] + [1] * (wide.dim() - 2)
        out = (wide - mean_C.view(shape)) * torch.rsqrt(var_C + self.eps).view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(input.dtype)

    def _must_reduce(self) -> bool:
        if not self.training or not (dist.is_available() and dist.is_initialized()):
            return False
        return dist.get_world_size() > 1

    def _compute_statistics(self, x: Tensor, dims: list[int]) -> tuple[Tensor, Tensor, float]:
        """Mean, biased variance and number of values a channel, over all ranks.

        Two passes, and sums carried in FP64: E[x^2] - E[x]^2 would cancel, and FP32 counts to 2^24 only.
        """
        count_local = x.numel() // x.shape[1]
        total_C1 = torch.cat([x.sum(dims).double(), x.new_tensor([count_local], dtype=torch.float64)])
        total_C1 = _SumOverRanks.apply(total_C1)
        count = total_C1[-1].item()
        if count <= 1:
            raise ValueError(f"SyncBatchNorm needs more than 1 value a channel over all ranks, got {count:g}.")
        mean_C = (total_C1[:-1] / count).to(x.dtype)
        centred = x - mean_C.view([1, -1] + [1] * (x.dim() - 2))
        var_C = _SumOverRanks.apply(centred.square().sum(dims).double()) / count
        return mean_C, var_C.to(x.dtype), count

    @torch.no_grad()
    def _update_running_statistics(self, mean_C: Tensor, var_C: Tensor, count: float) -> None:
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None and self.running_var is not None
        self.num_batches_tracked.add_(1)
        momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean_C.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_((var_C * (count / (count - 1))).to(self.running_var.dtype), momentum)
