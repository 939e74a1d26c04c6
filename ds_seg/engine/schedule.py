"""The learning-rate schedule: linear warm-up times poly decay, both by optimizer step."""

from __future__ import annotations

from ds_seg.config import ScheduleSettings


def compute_lr(base_lr: float, step: int, schedule: ScheduleSettings) -> float:
    """The rate that optimizer step `step` uses.

    Args:
        base_lr: rate of the parameter group before any schedule.
        step: optimizer steps done so far, from 0.
        schedule: poly power, floor and warm-up.

    Returns:
        `(base_lr - min_lr) * (1 - step / max_steps) ** power + min_lr`, during warm-up multiplied by a
        factor that rises linearly from `warmup_ratio` to 1. The poly part runs from step 0, so warm-up
        multiplies an already decaying rate.

    Source: mmcv 1.7 `mmcv/runner/hooks/lr_updater.py`, PolyLrUpdaterHook with warmup='linear'.
    """
    remaining = max(0.0, 1.0 - step / schedule.max_steps)
    lr = (base_lr - schedule.min_lr) * remaining**schedule.power + schedule.min_lr
    if step < schedule.warmup_steps:
        lr *= 1.0 - (1.0 - step / schedule.warmup_steps) * (1.0 - schedule.warmup_ratio)
    return lr
