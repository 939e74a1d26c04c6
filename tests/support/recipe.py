"""A tiny training, described once for everyone who trains it: the engines here, plain PyTorch in tests/parity."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from ds_seg.data.training_batches import MicroBatch

SIDE_PX, CLASSES, IGNORED_LABEL = 56, 6, 255
WIDTH, DEPTH, HEADS = 84, 2, 2  # ZeRO-3 shards matrices of this width unevenly: 84 x 84 over 4 ranks, biases of 84
MICRO_BATCH = 8  # crops of one micro-batch over all ranks


@dataclass(frozen=True)
class Recipe:
    """What is trained and how; the defaults leave everything out that can be left out."""

    steps: int = 20
    bf16: bool = False
    accumulation: int = 1
    lr: float = 3e-3
    warmup_steps: int = 5
    warmup_ratio: float = 0.1
    layer_decay: float | None = None
    weight_decay: float = 0.0
    decay_embeddings: bool = False
    clip_norm: float | None = None
    drop_path: float = 0.3
    """Without it the last MLP's bias is the same for all positions: BatchNorm takes it out, its gradient is rounding
    noise, and AdamW makes steps of full size out of noise."""
    auxiliary_weight: float | None = None
    class_weights: tuple[float, ...] | None = None
    ignored_pixels: bool = False
    checkpointing: str = "none"
    bad_steps: tuple[int, ...] = ()
    """Global batches that one rank finds not finite: every trainer leaves them out."""
    ema_momentum: float | None = None
    fp32_accumulation: bool = False
    """Whether DeepSpeed adds up the micro-batches of a bf16 backbone in FP32."""
    offloaded: float = 0.0
    """Share of the backbone's optimizer state in host memory."""

    @property
    def max_steps(self) -> int:
        """Steps of the schedule, which goes on beyond what is trained."""
        return 3 * self.steps // 2

    @property
    def global_batch(self) -> int:
        """Crops an optimizer step."""
        return MICRO_BATCH * self.accumulation

    def replace(self, **changes: Any) -> Recipe:
        """The same recipe but for some values."""
        return dataclasses.replace(self, **changes)


def make_sample(recipe: Recipe, position: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Image and label at a position of the global stream: the label tells how bright 7 x 7 pixels are.

    With ignored pixels, a tenth of them is ignored, and in every other pair of steps eight tenths: that makes
    gradients small.
    """
    generator = torch.Generator().manual_seed(position)
    image_3HW = torch.randn(3, SIDE_PX, SIDE_PX, generator=generator)
    coarse_1hw = torch.nn.functional.avg_pool2d(image_3HW.mean(0, keepdim=True), 7)
    label_1hw = (coarse_1hw * 12 + CLASSES / 2).clamp(0, CLASSES - 1).long()
    label_1HW = label_1hw.repeat_interleave(7, 1).repeat_interleave(7, 2)
    if recipe.ignored_pixels:
        share = 0.8 if position // (2 * recipe.global_batch) % 2 else 0.1
        label_1HW[torch.rand(1, SIDE_PX, SIDE_PX, generator=generator) < share] = IGNORED_LABEL
    return image_3HW, label_1HW


def make_micro_batch(recipe: Recipe, positions: range) -> MicroBatch:
    """The samples at some positions, stacked."""
    images, labels = zip(*(make_sample(recipe, position) for position in positions), strict=True)
    return MicroBatch(torch.stack(images), torch.stack(labels), list(positions), [{}] * len(positions))


def make_micro_batches(recipe: Recipe, step: int, rank: int = 0, world_size: int = 1) -> list[MicroBatch]:
    """A rank's share of global batch `step`: micro-batch after micro-batch, within each rank after rank."""
    size = MICRO_BATCH // world_size
    starts = [(step * recipe.accumulation + a) * MICRO_BATCH + rank * size for a in range(recipe.accumulation)]
    return [make_micro_batch(recipe, range(start, start + size)) for start in starts]
