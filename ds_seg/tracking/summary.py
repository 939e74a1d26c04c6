"""summary.json: what a run measured, written last."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_seg.errors import DsSegError
from ds_seg.tracking.files import write_json_atomic

SUMMARY_KEYS: dict[str, tuple[str, ...]] = {
    "status": (),
    "steps": (),
    "world_size": (),
    "global_batch": (),
    "zero_stage": (),
    "backbone": ("dtype", "parameters", "trainable", "parameters_held_per_rank"),
    "head": ("type", "dtype", "parameters", "replicas_identical"),
    "loss_first": (),
    "loss_last": (),
    "mIoU": (),
    "mAcc": (),
    "aAcc": (),
    "IoU": (),
    "images_per_s": (),
    "step_time_s": ("median", "p95"),
    "peak_memory_gib_per_rank": (),
    "skipped_steps": (),
    "resumed_from": (),
}
"""The promised keys and, where the value is an object, the keys inside it."""


def write_summary(work_dir: Path, summary: Mapping[str, Any]) -> Path:
    """Write a run's summary.json atomically.

    Args:
        work_dir: Folder of the run.
        summary: Holds at least every key of `SUMMARY_KEYS`; values may be None.

    Returns:
        The path of the file.

    Raises:
        DsSegError: the file can't be written.
    """
    missing = [key for key in SUMMARY_KEYS if key not in summary]
    for key, inner in SUMMARY_KEYS.items():
        missing += [f"{key}.{name}" for name in inner if key in summary and name not in summary[key]]
    assert not missing, f"summary.json would lack {missing}"
    path = work_dir / "summary.json"
    try:
        write_json_atomic(path, summary)
    except OSError as error:
        raise DsSegError(
            f"{path} can't be written ({error}). Training itself is over ({summary['status']} after {summary['steps']} "
            "steps) and its checkpoints are complete: `ds-seg evaluate` measures the scores again."
        ) from error
    return path
