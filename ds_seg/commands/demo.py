"""`ds-seg demo`: the main job on generated images, on whatever this machine has."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from ds_seg.collector import resume_collector
from ds_seg.errors import EXIT_OK

CPU_PROCESSES = 2


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Describe the command."""
    parser = subparsers.add_parser(
        "demo",
        help="fine-tune a small InternViT on generated scenes, in minutes",
        description="Generate a dataset, fine-tune a small InternViT in full under ZeRO-3 (on all GPUs, or two "
        "processes on CPUs where there is none or DS_ACCELERATOR=cpu), evaluate it and draw its predictions.",
    )
    parser.add_argument("--work-dir", metavar="D", type=Path, default=Path("work_dirs/demo"))
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Generate the dataset and start the training with the deepspeed launcher."""
    from ds_seg.data.demo_scenes import write_demo_dataset

    resume_collector()
    started = time.perf_counter()
    data_root = Path(os.environ.setdefault("DS_SEG_DEMO_ROOT", str(args.work_dir.absolute().parent / "demo_data")))
    print(f"demo 1/3: generating images in {data_root}", flush=True)
    write_demo_dataset(data_root)
    command = [*_launcher(), "--module", "ds_seg", "train", "demo", "--work-dir", str(args.work_dir)]
    print(f"demo 2/3: {' '.join(['deepspeed', *command[1:]])}", flush=True)
    code = subprocess.run(command, check=False).returncode
    if code == EXIT_OK:
        print(f"demo 3/3: done in {time.perf_counter() - started:.0f} s. Look at:")
        for name in ("predictions", "report.html", "loss_curve.png", "summary.json"):
            print(f"  {args.work_dir / name}")
    return code


def _launcher() -> list[str]:
    import torch

    processes = torch.cuda.device_count() if os.environ.get("DS_ACCELERATOR") != "cpu" else 0
    if processes == 0:
        processes = CPU_PROCESSES
        os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    beside_python = Path(sys.executable).with_name("deepspeed")
    deepspeed = str(beside_python) if beside_python.exists() else shutil.which("deepspeed") or "deepspeed"
    from ds_seg.distributed import free_port

    return [deepspeed, "--log_level", "error", "--num_accelerators", str(processes), "--master_port", str(free_port())]
