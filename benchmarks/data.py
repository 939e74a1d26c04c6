"""Training crops a second that data workers deliver: a run's own pipeline, on its images or on generated ones.

One H100 takes about 10 crops of 504 px a second from the 6B model (docs/plans.md). Without --data-root, scenes of
683 x 512 px on average (ADE20K's usual size) are drawn into ADE20K's folders; they stay in the page cache, so that
decoding and augmentation are measured and no disk is.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ds_seg.config import RunOptions, build_run_config
from ds_seg.data.build import build_dataset
from ds_seg.data.demo_scenes import write_demo_dataset
from ds_seg.data.training_batches import build_train_loader
from ds_seg.errors import UserError

_SCENES = 48
_WIDTH_PX = 683


def measure(config: str, data_root: Path, workers: int, images: int) -> dict[str, Any]:
    """Crops a second once the workers are up.

    Args:
        config: a run file with one data_root.
        data_root: of its training set.
        workers: data loading processes.
        images: crops to take.
    """
    options = {"data.train.data_root": str(data_root), "data.samples_per_gpu": 2}
    run = build_run_config(RunOptions(config, cfg_options=options), 1)
    dataset = build_dataset(run.data.train, role="train")
    batches = build_train_loader(
        dataset,
        seed=run.seed,
        micro_batch=run.micro_batch,
        accumulation_steps=1,
        rank=0,
        world_size=1,
        stop_step=10**6,
        num_workers=workers,
    )
    warm_up = 4 * max(workers, 1)
    for _ in range(warm_up):
        next(batches)
    started = time.perf_counter()
    taken = sum(len(next(batches).positions) for _ in range(images // run.micro_batch))
    seconds = time.perf_counter() - started
    return {"workers": workers, "crops": taken, "crops_per_s": taken / seconds, "images_in_set": len(dataset)}


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("config", nargs="?", default="internvit6b_224_full_linear_ade20k", metavar="CONFIG")
    parser.add_argument("--data-root", type=Path, metavar="D", help="the training set's (default: generated scenes)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], metavar="N")
    parser.add_argument("--images", type=int, default=200, help="crops to take for each number of workers")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ds_seg_bench_") as folder:
        root = args.data_root
        try:
            if root is None:
                root = Path(folder) / "scenes"
                write_demo_dataset(root, train_images=_SCENES, val_images=1, size_px=_WIDTH_PX)
            figures = {
                "config": args.config,
                "data": "generated" if args.data_root is None else "given",
                "cores": os.cpu_count(),
                "rates": [measure(args.config, root, workers, args.images) for workers in args.workers],
            }
        except UserError as error:
            print(error, file=sys.stderr)
            return error.exit_code
    for rate in figures["rates"]:
        print(f"{rate['workers']} workers: {rate['crops_per_s']:.1f} crops/s")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
