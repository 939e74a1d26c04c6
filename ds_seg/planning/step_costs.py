"""What a micro-batch of any size costs with any checkpointing policy, from a few simulated ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ds_seg.config import RunConfig
from ds_seg.planning.simulation import (
    BackboneTraces,
    Parts,
    StepSetting,
    Trace,
    extrapolate,
    simulate_backbone,
    simulate_heads,
)


@dataclass(frozen=True)
class StepCost:
    """Of one micro-batch, on one GPU."""

    peak: Parts
    """Bytes by part at the highest moment of forward and backward."""
    kept_bytes: float
    """Of the backbone, between forward and backward."""
    forward_flops: float
    """Of the backbone."""
    backbone_flops: float
    """Forward, backward and what is computed again."""
    head_flops: float


@dataclass(frozen=True)
class StepCosts:
    """Costs of every micro-batch and policy."""

    backbone: Mapping[str, BackboneTraces]
    """By policy."""
    heads: tuple[Trace, Trace]
    """Of `smallest_alone` images, and of one more; every further one adds the same."""
    smallest_alone: int
    """Images that a single process needs at once: 2 where a head normalises over one position."""

    def of(self, policy: str, micro_batch: int) -> StepCost:
        """Cost of one micro-batch."""
        backbone = self.backbone[policy].of(micro_batch)
        heads = extrapolate(*self.heads, micro_batch - self.smallest_alone)
        return StepCost(
            max(backbone.kept + heads.peak, backbone.peak, key=Parts.total),
            backbone.kept.total(),
            backbone.flops["forward"],
            backbone.flops["all"],
            heads.flops["all"],
        )


def simulate_costs(run: RunConfig, policies: Sequence[str], *, fused_norms: bool = True) -> StepCosts:
    """Simulate micro-batches of a run, in seconds and without memory.

    Args:
        run: tells model, crop and dtype.
        policies: those of `models.checkpointing.POLICIES` that are wanted.
        fused_norms: as on GPUs; False for the CPU.
    """
    dtype = torch.bfloat16 if run.bf16 else torch.float32
    setting = StepSetting(1, run.train_crop_px, policies[0], dtype, fused_norms)
    backbone = {policy: simulate_backbone(run.model, replace(setting, checkpointing=policy)) for policy in policies}
    try:
        heads, smallest_alone = [simulate_heads(run.model, setting)], 1
    except ValueError:  # BatchNorm over a single value
        heads, smallest_alone = [simulate_heads(run.model, replace(setting, micro_batch=2))], 2
    heads.append(simulate_heads(run.model, replace(setting, micro_batch=smallest_alone + 1)))
    return StepCosts(backbone, (heads[0], heads[1]), smallest_alone)
