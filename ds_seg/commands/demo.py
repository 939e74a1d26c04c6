"""`ds-seg demo`: the main job on generated images, on whatever this machine has."""

from __future__ import annotations

import argparse
import os
import subprocess
import time
from pathlib import Path

from ds_seg.collector import resume_collector
from ds_seg.errors import EXIT_OK, count

CPU_PROCESSES = 2
GPU_PROCESSES = (1, 2, 4, 8)
"""What shares its 8 crops a step evenly."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Describe the command."""
    parser = subparsers.add_parser(
        "demo",
        help="fine-tune a small InternViT on generated scenes, in minutes",
        description="Generate a dataset, fine-tune a small InternViT in full under ZeRO-3 (on 1, 2, 4 or 8 GPUs, or "
        "two CPU processes without GPUs or with DS_ACCELERATOR=cpu), evaluate it and draw its predictions.",
    )
    parser.add_argument(
        "--work-dir",
        metavar="D",
        type=Path,
        default=Path("work_dirs/demo"),
        help="where everything is written (default: work_dirs/demo)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Generate the dataset and start the training with DeepSpeed's launcher."""
    from ds_seg.data.demo_scenes import write_demo_dataset

    resume_collector()
    started = time.perf_counter()
    data_root = Path(os.environ.setdefault("DS_SEG_DEMO_ROOT", str(args.work_dir.absolute().parent / "demo_data")))
    print(f"demo 1/3: generating images in {data_root}", flush=True)
    write_demo_dataset(data_root)
    processes, launcher = _prepare_launch()
    training = ["train", "demo", "--work-dir", str(args.work_dir)]
    print(f"demo 2/3: ds-seg {' '.join(training)}, on {count(processes, 'process')}", flush=True)
    code = subprocess.run([*launcher, *training], check=False).returncode
    if code == EXIT_OK:
        print(f"demo 3/3: done in {time.perf_counter() - started:.0f} s. Look at:")
        for name in ("predictions", "report.html", "loss_curve.png", "summary.json"):
            print(f"  {args.work_dir / name}")
    return code


def _prepare_launch() -> tuple[int, list[str]]:
    from ds_seg.distributed.launching import build_launcher, list_gpus

    gpus = list_gpus()
    processes = max((number for number in GPU_PROCESSES if number <= len(gpus)), default=CPU_PROCESSES)
    if not gpus:
        os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    return processes, build_launcher(processes, gpus)
