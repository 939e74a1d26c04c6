"""The rows that a run in another process has logged."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

from ds_seg.tracking.metrics_log import read_metrics

TIMES = ("images_per_s", "data_wait_s", "memory_gib")


def read_rows(work_dir: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl without what depends on the clock."""
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(work_dir / "metrics.jsonl")]


def wait_for_step(process: subprocess.Popen, work_dir: Path, step: int, timeout_s: float = 240) -> None:
    """Wait until a running process has logged a step."""
    end = time.monotonic() + timeout_s
    while not any(row["step"] >= step for row in read_metrics(work_dir / "metrics.jsonl")):
        assert process.poll() is None, "the run ended before it could be stopped"
        assert time.monotonic() < end, f"step {step} was not reached in {timeout_s} s"
        time.sleep(0.05)
