"""One rank of test_elastic_samples.py: trains as `ds-seg train` does and writes down every sample that a step gets.

A single rank first runs through without a stop. Usage: samples_worker.py CONFIG OUT_FOLDER WORKERS NAME STOP_AFTER
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from unittest import mock

from ds_seg import distributed
from ds_seg.commands.train import train
from ds_seg.config import RunOptions
from ds_seg.engine.step import TwoEngineStep
from ds_seg.errors import StoppedBySignal
from ds_seg.resumption import resolve_run
from ds_seg.supervision import stop
from ds_seg.supervision.signals import listening

CONFIG, OUT, WORKERS, NAME = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
STOP_AFTER = int(sys.argv[5])


def hash_sample(image_3HW, label_1HW, meta) -> str:
    pixels = hashlib.sha256(image_3HW.numpy().tobytes() + label_1HW.numpy().tobytes()).hexdigest()
    return f"{meta['ori_filename']} {pixels[:16]}"


def run(work_dir: Path, name: str, stop_after: int, **overrides: int) -> None:
    """Train; SIGTERM comes after a step has been counted that often."""
    seen = {}

    def watch(self, step, micro_batches, **position):
        micro_batches = list(micro_batches)
        samples = (zip(b.images_B3HW, b.labels_B1HW, b.metas, strict=True) for b in micro_batches)
        seen[step] = [hash_sample(*sample) for batch in samples for sample in batch]
        if step + 1 == stop_after and distributed.rank() == distributed.world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
            while stop.requested() is None:
                time.sleep(0.01)
        return real(self, step, micro_batches, **position)

    real = TwoEngineStep.__call__
    overrides = {"data.workers_per_gpu": WORKERS, **overrides}
    options = RunOptions(CONFIG, work_dir=str(work_dir), resume="auto", cfg_options=overrides)
    with mock.patch.object(TwoEngineStep, "__call__", watch):
        resolved = resolve_run(options)
        try:
            with listening(lambda: None):
                train(resolved)
            stopped = False
        except StoppedBySignal:
            stopped = True
    report = {"seen": seen, "stopped": stopped, "notes": resolved.notes, "micro_batch": resolved.micro_batch}
    ranks = distributed.gather_objects(report)
    if distributed.is_main():
        (OUT / f"{name}.json").write_text(json.dumps(ranks))


if __name__ == "__main__":
    distributed.initialize()
    if distributed.world_size() == 1:
        run(OUT / "through", "through", 0, global_batch=4)
    run(OUT / "run", NAME, STOP_AFTER)
    distributed.shutdown()
