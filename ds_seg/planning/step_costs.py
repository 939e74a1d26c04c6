"""What a micro-batch of any size costs with any checkpointing policy, from a few simulated ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ds_seg.config import RunConfig
from ds_seg.errors import ConfigError
from ds_seg.models.checkpointing import POLICIES
from ds_seg.models.head_building import describe_error
from ds_seg.planning.hardware import find_host_ms
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
    host_ms_a_block: float
    """Python's, forward and backward."""

    @property
    def model_flops(self) -> float:
        """Of the backbone, nothing computed again: three times the forward pass, or less where little of it trains."""
        return min(3 * self.forward_flops, self.backbone_flops)


@dataclass(frozen=True)
class StepCosts:
    """Costs of every micro-batch and policy."""

    backbone: Mapping[str, BackboneTraces]
    """By policy."""
    heads: tuple[Trace, Trace]
    """Of `smallest_alone` images, and of one more; every further one adds the same."""
    smallest_alone: int
    """Images that a single process needs at once: 2 where a head normalises over one position."""
    compiled: bool

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
            find_host_ms(policy, compiled=self.compiled),
        )


Known = dict[str, BackboneTraces]
"""Traces by what they depend on, so that runs of one backbone share them."""
_NOT_OF_A_STEP = ("type", "pretrained", "pretrain_size", "checkpointing", "with_cp")


def simulate_costs(
    run: RunConfig, policies: Sequence[str], *, fused_norms: bool = True, known: Known | None = None
) -> StepCosts:
    """Simulate micro-batches of a run, in seconds and without memory.

    Args:
        run: tells model, crop and dtype.
        policies: those of `models.checkpointing.POLICIES` that are wanted.
        fused_norms: as on GPUs; False for the CPU.
        known: traces of earlier runs, which are used, and which get this run's.

    Raises:
        ConfigError: a head or a loss fails on tensors without data.
    """
    dtype = torch.bfloat16 if run.bf16 else torch.float32
    setting = StepSetting(1, run.train_crop_px, policies[0], dtype, fused_norms)
    known = {} if known is None else known
    own = {key: value for key, value in sorted(run.model.backbone.items()) if key not in _NOT_OF_A_STEP}
    backbone = {}
    for policy in policies:
        one = replace(setting, checkpointing=policy)
        key = f"{own} {one}"
        if key not in known:
            known[key] = simulate_backbone(run.model, one)
        backbone[policy] = known[key]
    with _explained(run):
        try:
            heads, smallest_alone = [simulate_heads(run.model, setting)], 1
        except ValueError:  # BatchNorm over a single value
            heads, smallest_alone = [simulate_heads(run.model, replace(setting, micro_batch=2))], 2
        heads.append(simulate_heads(run.model, replace(setting, micro_batch=smallest_alone + 1)))
    return StepCosts(backbone, (heads[0], heads[1]), smallest_alone, run.compile)


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
