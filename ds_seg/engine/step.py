"""The two-engine step: one loss, one backward through both engines, and both step or neither does."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from ds_seg import distributed
from ds_seg.config import RunConfig
from ds_seg.data.training_batches import MicroBatch
from ds_seg.engine.engines import Engines
from ds_seg.engine.gradients import (
    backbone_squared_norm,
    clip_factor,
    head_squared_norm,
    scale_gradients,
    skip_step,
    step_scaled,
)
from ds_seg.engine.precision import validate_head_gradients
from ds_seg.models.heads import list_losses
from ds_seg.supervision.progress import SLOW, enter_phase


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, the same on every rank."""

    losses: dict[str, float]
    """`loss` and every `loss_*` and `acc_*` entry, means over ranks and micro-batches."""
    grad_norm: float
    """Joint 2-norm of both engines' gradients before clipping."""
    clip_factor: float
    skipped: bool
    """True if the loss or the norm was not finite somewhere, so that nothing moved."""


class TwoEngineStep:
    """Drives both engines through training steps."""

    def __init__(self, engines: Engines, run: RunConfig) -> None:
        self.engines = engines
        self.run = run
        self._patience = SLOW  # the first step allocates and compiles

    def __call__(self, step: int, micro_batches: Iterable[MicroBatch], *, scheduled_steps: int) -> StepResult:
        """Train on one global batch; a collective over all ranks.

        Args:
            step: index of the global batch; together with the run's seed it fixes all noise.
            micro_batches: this rank's `accumulation_steps` micro-batches.
            scheduled_steps: how often the schedule has moved: the steps so far that were not skipped.
        """
        self.engines.train()
        self.run.schedule.set_rates(self.engines.param_groups, scheduled_steps)
        buffers_before = [buffer.clone() for buffer in self.engines.heads.buffers()]
        accumulation_steps = self.run.accumulation_steps
        sums: dict[str, torch.Tensor] = {}
        for index, batch in enumerate(micro_batches):
            self._enter(f"micro-batch {index + 1} of {accumulation_steps} of step {step + 1}")
            losses = self._forward_backward(step, index, batch, last=index == accumulation_steps - 1)
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value / accumulation_steps
        self._enter(f"the update of step {step + 1}")
        result = self._update(sums)
        self._patience = 1.0
        if result.skipped:  # the forward has moved BatchNorm's running statistics, to NaN if an image is NaN
            for buffer, before in zip(self.engines.heads.buffers(), buffers_before, strict=True):
                buffer.copy_(before)
        return result

    def _enter(self, phase: str) -> None:
        enter_phase(phase, patience=self._patience)

    def _forward_backward(self, step: int, index: int, batch: MicroBatch, *, last: bool) -> dict[str, torch.Tensor]:
        engines, seed = self.engines, self.run.seed
        torch.manual_seed(noise_seed(seed, step, index, distributed.rank()))
        images = batch.images_B3HW.to(engines.device, engines.dtype, non_blocking=True)
        labels = batch.labels_B1HW.to(engines.device, non_blocking=True)
        if engines.trainable_backbone:
            engines.backbone.set_gradient_accumulation_boundary(last)
        with contextlib.nullcontext() if last else engines.heads_ddp.no_sync():
            sample_seeds = [noise_seed(seed, position) for position in batch.positions]
            features = engines.backbone(images, sample_seeds=sample_seeds)
            entries = engines.heads_ddp(features, batch.metas, labels)
            losses = {name: value.float().mean() for name, value in entries.items()}
            losses["loss"] = total_loss(losses)
            scaled = losses["loss"] / self.run.accumulation_steps
            if engines.trainable_backbone:
                engines.backbone.backward(scaled, scale_wrt_gas=False)
            else:
                scaled.backward()
        return {name: value.detach() for name, value in losses.items()}

    def _update(self, losses: Mapping[str, torch.Tensor]) -> StepResult:
        engines = self.engines
        validate_head_gradients(engines.heads)
        names = sorted(losses)
        reduced = distributed.reduce_sum(
            torch.stack(
                [
                    backbone_squared_norm(engines.backbone, engines.device),
                    # equal on all ranks but for the last bit, where their GPUs differ; their factors must not
                    head_squared_norm(engines.head_parameters, engines.device) / self.run.world_size,
                    *(losses[name].to(torch.float64) / self.run.world_size for name in names),
                ]
            )
        )
        backbone_square, head_square, *means = reduced.tolist()
        means_by_name = dict(zip(names, means, strict=True))
        norm = math.sqrt(backbone_square + head_square) if backbone_square + head_square >= 0 else math.nan
        skipped = not (math.isfinite(norm) and math.isfinite(means_by_name["loss"]))
        factor = 1.0 if skipped else clip_factor(norm, self.run.clip_norm)
        if skipped:
            self._skip()
        else:
            self._step(norm, factor)
        return StepResult(means_by_name, norm, factor, skipped)

    def _step(self, norm: float, factor: float) -> None:
        if self.engines.trainable_backbone:
            step_scaled(self.engines.backbone, norm, factor)
        scale_gradients(self.engines.head_parameters, factor)
        self.engines.head_optimizer.step()
        self.engines.head_optimizer.zero_grad(set_to_none=True)

    def _skip(self) -> None:
        if self.engines.trainable_backbone:
            skip_step(self.engines.backbone)
        self.engines.head_optimizer.zero_grad(set_to_none=True)


def total_loss(losses: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The sum of the entries that are trained on, as MMSeg's segmentors compute it."""
    return torch.stack(list_losses(losses)).sum()


def noise_seed(*key: int) -> int:
    """A seed for torch that depends on the whole key and nothing else."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> 1
