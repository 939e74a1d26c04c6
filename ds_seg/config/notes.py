"""Lines for the log about what a config says and what comes of it here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_seg.config.intervals import KEPT_CHECKPOINTS
from ds_seg.config.schedule import ScheduleSettings


def of_ignored(reasons: Mapping[str, str]) -> list[str]:
    """Dotted keys that mean nothing here, with the reason."""
    return [f"config key '{key}' has no effect: {why}" for key, why in reasons.items()]


def of_config(config: Mapping[str, Any], schedule: ScheduleSettings, cumulative_iters: int | None) -> list[str]:
    """What a user of MMCV may not expect of this config."""
    return [
        *_of_warm_up(schedule),
        *_of_accumulation(cumulative_iters, schedule.max_steps),
        *_of_kept_checkpoints(config.get("checkpoint_config")),
    ]


def _of_warm_up(schedule: ScheduleSettings) -> list[str]:
    """A warm-up that the run does not outlast."""
    if schedule.warmup_steps < schedule.max_steps:
        return []
    return [
        f"lr_config.warmup_iters={schedule.warmup_steps} is no less than the run's {schedule.max_steps} steps: the "
        "learning rate never reaches optimizer.lr. Set lr_config.warmup_iters to a small part of them."
    ]


def _of_accumulation(cumulative_iters: int | None, max_steps: int) -> list[str]:
    """MMCV counts micro-batches where steps are counted here."""
    if cumulative_iters in (None, 1):
        return []
    theirs = -(-max_steps // cumulative_iters)
    return [
        f"runner.max_iters={max_steps} and all intervals count optimizer steps, of {cumulative_iters} micro-batches "
        f"each (optimizer_config.cumulative_iters). MMCV counts micro-batches, and makes {theirs} steps of them: "
        f"divide by {cumulative_iters} for a run of the same length."
    ]


def _of_kept_checkpoints(checkpoint: Mapping[str, Any] | None) -> list[str]:
    """How many checkpoints stay where the config leaves it open."""
    if "max_keep_ckpts" in (checkpoint or {}):
        return []
    return [
        f"checkpoint_config.max_keep_ckpts is not set: the newest {KEPT_CHECKPOINTS} checkpoints stay, where MMCV "
        "keeps all. Set it to -1 to keep all."
    ]
