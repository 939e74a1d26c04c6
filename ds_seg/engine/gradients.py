"""The joint gradient of both engines: its norm, its clipping, and a step that nobody takes.

Gradients are valid on the last micro-batch, between backward and `engine.step`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import nn

from ds_seg.engine.zero3 import gradient_norms

_CLIP_EPSILON = 1e-6
"""As in `torch.nn.utils.clip_grad_norm_`."""


def backbone_squared_norm(backbone: DeepSpeedEngine, device: torch.device) -> torch.Tensor:
    """Sum of squares over this rank's shard of the backbone's gradient; 0 if the backbone is frozen.

    Returns:
        FP64 scalar; sum it over ranks for the whole backbone.
    """
    optimizer = backbone.optimizer
    norms = gradient_norms(optimizer) if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3) else []
    return _sum_of_squares(norms, device)


def head_squared_norm(parameters: Sequence[nn.Parameter], device: torch.device) -> torch.Tensor:
    """Sum of squares over the heads' gradients, which DDP has made equal on all ranks.

    Returns:
        FP64 scalar.
    """
    norms = [parameter.grad.norm() for parameter in parameters if parameter.grad is not None]
    return _sum_of_squares(norms, device)


def clip_factor(norm: float, clip_norm: float | None) -> float:
    """What both engines' gradients are multiplied by: `clip_grad_norm_` over the whole model."""
    if clip_norm is None:
        return 1.0
    return min(1.0, clip_norm / (norm + _CLIP_EPSILON))


def scale_gradients(heads: Sequence[nn.Parameter], factor: float) -> None:
    """Multiply the heads' gradients."""
    if factor == 1.0:
        return
    for parameter in heads:
        if parameter.grad is not None:
            parameter.grad.mul_(factor)


def step_scaled(backbone: DeepSpeedEngine, norm: float, factor: float) -> None:
    """Step the backbone with its gradients times a factor.

    DeepSpeed divides the FP32 copies that its optimizer steps with by the loss scale, which costs nothing more and
    rounds less than writing bf16 gradients anew.

    Args:
        backbone: after `use_joint_norm`.
        norm: joint norm of both engines' gradients.
        factor: what `clip_factor` says of it.
    """
    optimizer = backbone.optimizer
    if not optimizer.optimizer.state:
        # moments are made in this step and stay: not amid the memory that the backward pass has just freed, of which
        # only what is free in whole segments could ever be used for something larger again
        get_accelerator().empty_cache()
    optimizer.joint_norm = norm
    optimizer.override_loss_scale(1.0 / factor)
    backbone.step()
    optimizer.override_loss_scale(1.0)
    get_accelerator().synchronize()  # DeepSpeed gathers on streams of its own, which do not wait for new weights


def skip_step(backbone: DeepSpeedEngine) -> None:
    """Let DeepSpeed leave out a step as it does after an overflow: it clears gradients, counts, and moves nothing."""
    backbone.optimizer.joint_norm = math.nan
    backbone.step()


def _sum_of_squares(norms: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """A sum in FP64 of squares that are infinite where FP32 can't hold them, as AdamW's second moments are then."""
    if not norms:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(norms).to(device, torch.float32).square().sum(dtype=torch.float64)
