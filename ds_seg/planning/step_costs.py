"""What a micro-batch of any size costs with any checkpointing policy."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch

from ds_seg.config import RunConfig
from ds_seg.config.build_errors import describe_error
from ds_seg.errors import ConfigError
from ds_seg.models.checkpointing import POLICIES
from ds_seg.planning.hardware import find_host_ms, find_moved_share
from ds_seg.planning.simulation import Parts, StepSetting, Trace, extrapolate, simulate_backbone, simulate_heads


@dataclass(frozen=True)
class StepCost:
    """Of one micro-batch, on one GPU."""

    peak: Parts
    """Bytes by part at the highest moment of forward and backward."""
    forward_flops: float
    """Of the backbone."""
    backbone_flops: float
    """Forward, backward and what is computed again."""
    attention_flops: float
    """Attention's part of the backbone's."""
    head_flops: float
    moved_bytes: float
    """Read and written by kernels other than attention, products and convolutions."""
    host_ms_a_block: float
    """Python's, forward and backward."""

    @property
    def model_flops(self) -> float:
        """Of the backbone, nothing computed again: three times the forward pass, or less where little of it trains."""
        return min(3 * self.forward_flops, self.backbone_flops)


Known = dict[str, Trace]
"""Traces by what they depend on, so that runs of one backbone share them."""
_NOT_OF_A_STEP = ("type", "pretrained", "pretrain_size", "checkpointing", "with_cp")
BATCH = "images and labels"
_MOST_SIMULATED = 16
"""Images; beyond them every further one is taken to add the same."""


class StepCosts:
    """Costs of every micro-batch and policy, simulated when they are asked for, in seconds and without memory.

    Args:
        run: tells model, crop and dtype.
        policies: those of `models.checkpointing.POLICIES` that are wanted.
        fused_norms: as on GPUs; False for the CPU.
        known: traces of earlier runs, which are used, and which get this run's.

    Raises:
        ConfigError: a head or a loss fails on tensors without data; by `of` and `smallest_alone`.
    """

    def __init__(
        self, run: RunConfig, policies: Sequence[str], *, fused_norms: bool = True, known: Known | None = None
    ) -> None:
        self.run, self.policies = run, tuple(policies)
        zero3_linear = bool(run.deepspeed["zero_optimization"].get("memory_efficient_linear", True))
        self._setting = StepSetting(1, run.train_crop_px, self.policies[0], run.dtype, fused_norms, zero3_linear)
        self._known: Known = {} if known is None else known
        self._heads: dict[int, Trace] = {}

    @cached_property
    def smallest_alone(self) -> int:
        """Images that a single process needs at once: 2 where a head normalises over one position."""
        with _explained(self.run):
            try:
                self._simulate_heads(1)
            except ValueError:  # BatchNorm over a single value
                self._simulate_heads(2)
                return 2
            return 1

    def of(self, policy: str, micro_batch: int) -> StepCost:
        """Cost of one micro-batch."""
        backbone = _find(partial(self._simulate_backbone, policy), 1, micro_batch)
        with _explained(self.run):
            heads = _find(self._simulate_heads, self.smallest_alone, micro_batch)
        return StepCost(
            max(backbone.kept + heads.peak, backbone.peak, key=Parts.total) + self._count_batch(micro_batch),
            backbone.flops["forward"],
            backbone.flops["all"],
            backbone.flops["attention"],
            heads.flops["all"],
            find_moved_share(compiled=self.run.compile) * backbone.moved["bytes"] + heads.moved["bytes"],
            find_host_ms(policy, compiled=self.run.compile),
        )

    def _count_batch(self, micro_batch: int) -> Parts:
        """What images and labels take, from the start of a step to its end."""
        height, width = self._setting.crop_size_px
        image_bytes = int(self.run.model.backbone.get("in_chans", 3)) * self._setting.dtype.itemsize
        label_bytes = torch.int64.itemsize
        return Parts({BATCH: micro_batch * height * width * (image_bytes + label_bytes)})

    def _simulate_backbone(self, policy: str, images: int) -> Trace:
        setting = replace(self._setting, checkpointing=policy, micro_batch=images)
        own = {key: value for key, value in sorted(self.run.model.backbone.items()) if key not in _NOT_OF_A_STEP}
        key = f"{own} {setting}"
        if key not in self._known:
            self._known[key] = simulate_backbone(self.run.model, setting)
        return self._known[key]

    def _simulate_heads(self, images: int) -> Trace:
        if images not in self._heads:
            self._heads[images] = simulate_heads(self.run.model, replace(self._setting, micro_batch=images))
        return self._heads[images]


def _find(simulate: Callable[[int], Trace], least: int, images: int) -> Trace:
    """The trace of so many images: simulated, or what lies behind the two closest that can be."""
    if least <= images <= _MOST_SIMULATED:
        return simulate(images)
    first = least if images < least else _MOST_SIMULATED - 1
    return extrapolate(simulate(first), simulate(first + 1), images - first)


@contextlib.contextmanager
def _explained(run: RunConfig) -> Iterator[None]:
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # whatever a head or loss may raise over its arguments, or over tensors without data
        raise ConfigError(
            f"The memory of the model's heads and losses can't be planned: on {run.train_crop_px[0]}x"
            f"{run.train_crop_px[1]} px crops without data they fail ({describe_error(error)}). Correct them in the "
            "model config; or, if they work on real data alone, leave nothing to the plan: set checkpointing to "
            f"{', '.join(POLICIES[:-1])} or {POLICIES[-1]}, and in the DeepSpeed JSON a number for every size that is "
            '"auto".'
        ) from error
