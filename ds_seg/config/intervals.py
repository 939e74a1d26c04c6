"""How often a run is evaluated and saved, and what stays of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ds_seg.config.dialect import list_ignored_names
from ds_seg.config.faults import Faults, list_fields

KEPT_CHECKPOINTS = 2
"""Where checkpoint_config.max_keep_ckpts is not set."""
SCORES = ("mIoU", "mAcc", "mDice", "aAcc")
"""Means that every evaluation computes."""


@dataclass(frozen=True)
class EvaluationSettings:
    """When the validation set is scored, and how."""

    interval_steps: int
    window_batch: int
    """Windows of an image that are computed at a time."""
    save_best: str | None
    """The score whose highest checkpoint is kept beside the newest, one of SCORES."""


@dataclass(frozen=True)
class CheckpointSettings:
    """When checkpoints are written, how, and which stay."""

    interval_steps: int
    keep: int
    """How many of the newest stay; -1 for all."""
    keep_interval_steps: int | None
    """Those at its multiples are never removed; None for none."""
    in_background: bool
    """Whether training goes on while they are written."""


def read_evaluation(given: Any, max_steps: int, faults: Faults) -> EvaluationSettings:
    """The `evaluation` section; without an interval only the last of `max_steps` is evaluated."""
    known = ("interval", "metric", "save_best", "by_epoch", "window_batch", *list_ignored_names("evaluation"))
    section = faults.section("evaluation", given, known)
    _refuse_epochs("evaluation", section, faults)
    save_best = section.get("save_best")
    if save_best not in (None, False, "auto", *SCORES):
        faults.add("evaluation.save_best", f"got {save_best!r}, want one of {', '.join(SCORES)}, or None.")
    if any(metric not in ("mIoU", "mDice") for _, metric in list_fields("", section.get("metric"))):
        faults.add(
            "evaluation.metric",
            f"got {section['metric']!r}, want 'mIoU' or 'mDice' (both are computed, and mAcc and aAcc with them; mDice "
            "is the F-score of beta 1).",
        )
    return EvaluationSettings(
        interval_steps=faults.integer("evaluation.interval", section, max_steps, minimum=1),
        window_batch=faults.integer("evaluation.window_batch", section, 1, minimum=1),
        save_best="mIoU" if save_best == "auto" else save_best or None,
    )


def read_checkpoints(given: Any, max_steps: int, in_background: bool, faults: Faults) -> CheckpointSettings:
    """The `checkpoint_config` section; without an interval only the last of `max_steps` is saved."""
    known = ("interval", "by_epoch", "max_keep_ckpts", "keep_interval", *list_ignored_names("checkpoint_config"))
    section = faults.section("checkpoint_config", given, known)
    _refuse_epochs("checkpoint_config", section, faults)
    interval = faults.integer("checkpoint_config.interval", section, max_steps, minimum=1)
    keep = faults.integer("checkpoint_config.max_keep_ckpts", section, KEPT_CHECKPOINTS, minimum=-1)
    if keep == 0:
        faults.add("checkpoint_config.max_keep_ckpts", "got 0, want at least 1, or -1 for all.")
    return CheckpointSettings(interval, keep, _read_keep_interval(section, interval, faults), in_background)


def _refuse_epochs(name: str, section: Mapping[str, Any], faults: Faults) -> None:
    if faults.flag(f"{name}.by_epoch", section, False):
        faults.add(f"{name}.by_epoch", "got True; intervals are in iterations here, so it must be False.")


def _read_keep_interval(checkpoint: Mapping[str, Any], interval_steps: int, faults: Faults) -> int | None:
    if checkpoint.get("keep_interval") is None:
        return None
    steps = faults.integer("checkpoint_config.keep_interval", checkpoint, interval_steps, minimum=1)
    if steps % interval_steps:
        faults.add(
            "checkpoint_config.keep_interval",
            f"got {steps}, but checkpoints are saved every {interval_steps} steps. Use a multiple of "
            "checkpoint_config.interval.",
        )
    return steps
