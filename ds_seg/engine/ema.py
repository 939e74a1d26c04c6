"""Exponential moving averages of both engines' weights: kept in FP32, sharded like the weights they follow."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from deepspeed.accelerator import get_accelerator

from ds_seg.config import EmaSettings
from ds_seg.engine.engines import Engines, own_stretch
from ds_seg.engine.zero3 import local_master


def compute_momentum(step: int, settings: EmaSettings) -> float:
    """The share that the weights after a step get in their average.

    Args:
        step: optimizer steps done before this one, from 0.
        settings: momentum, interval and warm-up.

    Returns:
        `min(momentum ** interval, (1 + step) / (warm_up + step))`: with an interval above 1 the published formula
        makes the share smaller, not larger.

    Source: mmcv 1.7 `mmcv/runner/hooks/ema.py`, EMAHook.after_train_iter.
    """
    return min(settings.momentum**settings.interval_steps, (1 + step) / (settings.warm_up_steps + step))


class WeightAverages:
    """Averages of every trainable weight of both engines, from the weights that the engines have now.

    The backbone's follow the FP32 masters of DeepSpeed's optimizer, not the bf16 weights: a step of the average is
    far below half an ulp of bf16. Buffers are not averaged, and frozen weights equal their average.

    Attributes:
        backbone: name -> this rank's part of the flat average, FP32, without DeepSpeed's padding; beside its master,
            on the GPU or in host memory.
        heads: name -> average, FP32, the same on every rank.

    Source: mmcv 1.7 `mmcv/runner/hooks/ema.py`. It swaps averages in by epoch, so that its IterBasedRunner keeps
    them but never evaluates them; here every evaluation is made on them.
    """

    def __init__(self, engines: Engines, settings: EmaSettings) -> None:
        self.engines, self.settings = engines, settings
        backbone = engines.backbone.module.named_parameters() if engines.trainable_backbone else ()
        self._backbone = {name: parameter for name, parameter in backbone if parameter.requires_grad}
        self._heads = {name: p.data for name, p in engines.heads.named_parameters() if p.requires_grad}
        self.backbone = {name: self._read_master(name).clone() for name in self._backbone}
        self.heads = {name: weight.clone() for name, weight in self._heads.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the averages towards the weights, after a step that was not skipped.

        Args:
            step: optimizer steps done before this one, from 0.
        """
        if step % self.settings.interval_steps:
            return
        momentum = compute_momentum(step, self.settings)
        for name, average in self.backbone.items():
            average.lerp_(self._read_master(name), momentum)
        for name, average in self.heads.items():
            average.lerp_(self._heads[name], momentum)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Let both engines compute with the averages; on leaving they get their own weights back, bit for bit.

        A bf16 shard is the rounding of its FP32 master and is made anew from that, so only FP32 weights are copied
        aside. No collective.
        """
        shards = {
            name: self._own_part(name, parameter.ds_tensor).clone()
            for name, parameter in self._backbone.items()
            if parameter.ds_tensor.dtype == torch.float32
        }
        heads = {name: weight.clone() for name, weight in self._heads.items()}
        self._write(self.backbone.__getitem__, self.heads)
        try:
            yield
        finally:
            self._write(lambda name: shards[name] if name in shards else self._read_master(name), heads)

    def load(self, read: Callable[[str, int, int], torch.Tensor], heads: Mapping[str, torch.Tensor]) -> None:
        """Take over averages that were saved.

        Args:
            read: of the backbone, elements start..stop - 1 of the flat average of that name.
            heads: name -> average.
        """
        for name, average in self.backbone.items():
            average.copy_(read(name, *own_stretch(self._backbone[name])))
        for name, average in self.heads.items():
            average.copy_(heads[name])

    def _read_master(self, name: str) -> torch.Tensor:
        return self._own_part(name, local_master(self._backbone[name]))

    def _own_part(self, name: str, shard: torch.Tensor) -> torch.Tensor:
        """A shard without the padding that makes it as long as every other rank's."""
        start, stop = own_stretch(self._backbone[name])
        return shard[: stop - start]

    @torch.no_grad()
    def _write(self, shards: Callable[[str], torch.Tensor], heads: Mapping[str, torch.Tensor]) -> None:
        if self._backbone:
            # what was gathered from the old shards, and the copies that hpZ keeps of them, must not be used again
            self.engines.backbone.empty_partition_cache()
            self.engines.backbone.optimizer.invalidate_secondary_tensor()
        for name, parameter in self._backbone.items():
            self._own_part(name, parameter.ds_tensor).copy_(shards(name))
        for name, weight in self._heads.items():
            weight.copy_(heads[name])
        get_accelerator().synchronize()  # DeepSpeed gathers on streams of its own
