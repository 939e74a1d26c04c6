"""What a hundred parameter groups cost: time of DeepSpeed's `engine.step` with layer-wise decay and without.

Four engines of the same small model, in the same processes, take turns step by step: layer-wise decay (48 blocks make
98 groups) or none (2 groups), each as ds_seg builds its optimizer (one DeepSpeed group) and as a plain AdamW does
(a DeepSpeed group for each). It starts its processes itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import set_z3_leaf_modules
from prettytable import PrettyTable
from workload import Workload

from ds_seg import distributed
from ds_seg.config import RunConfig
from ds_seg.engine.adamw import RATE_GROUPS, build_adamw, build_backbone_adamw
from ds_seg.engine.engines import build_modules
from ds_seg.engine.groups import build_param_groups
from ds_seg.models.layers import Block

VARIANTS = {
    "ds_seg, layer decay": (True, True),
    "ds_seg, none": (True, False),
    "plain, layer decay": (False, True),
    "plain, none": (False, False),
}
"""Name -> (optimizer of ds_seg, layer-wise decay)."""
BASELINE = "ds_seg, none"
COLUMNS = {
    "groups": "groups",
    "sub_groups": "DeepSpeed's",
    "step_ms": "step ms",
    "cpu_ms": "CPU ms",
    "step_ms_over_none": "over none",
    "cpu_ms_over_none": "CPU over none",
}
"""Key of a figure -> its heading."""


def build_engine(run: RunConfig, *, ours: bool, layer_decay: bool) -> deepspeed.DeepSpeedEngine:
    """The backbone under DeepSpeed, with one of the four optimizers."""
    settings = run.optimizer if layer_decay else dataclasses.replace(run.optimizer, layer_decay_rate=1.0)
    backbone, _ = build_modules(run)
    set_z3_leaf_modules(backbone, [Block])
    groups = build_param_groups(backbone.named_modules(prefix="backbone"), len(backbone.blocks), settings)
    optimizer = build_backbone_adamw(groups, settings, offloaded=False) if ours else build_adamw(groups, settings)
    engine, *_ = deepspeed.initialize(
        model=backbone, optimizer=optimizer, config=run.deepspeed, dist_init_required=False
    )
    return engine


def train_step(engine: deepspeed.DeepSpeedEngine, images_B3HW: torch.Tensor) -> tuple[float, float]:
    """One forward, backward and step; wall-clock and CPU seconds of the step alone."""
    (features_BDhw,) = engine(images_B3HW)
    engine.backward(features_BDhw.float().square().mean())
    distributed.barrier()
    _synchronize()
    started, cpu_started = time.perf_counter(), time.process_time()
    engine.step()
    _synchronize()
    return time.perf_counter() - started, time.process_time() - cpu_started


def _synchronize() -> None:
    if distributed.device().type == "cuda":
        torch.cuda.synchronize()


def measure(args: argparse.Namespace) -> None:
    """One rank: let the variants take turns, and write what the slowest rank needed."""
    distributed.initialize()
    with tempfile.TemporaryDirectory(prefix="ds_seg_bench_") as folder:
        workload = Workload(args.preset, args.depth, args.crop, args.batch, distributed.world_size(), args.device)
        workload.write(Path(folder))
        run = workload.build_run(Path(folder))
    engines = {name: build_engine(run, ours=ours, layer_decay=decay) for name, (ours, decay) in VARIANTS.items()}
    images_B3HW = workload.draw_batch(run, 0).images_B3HW.to(distributed.device(), torch.bfloat16)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in VARIANTS}
    for turn in range(args.warmup + args.steps):
        for place in range(len(VARIANTS)):  # each in each place as often: what came before leaves other caches
            name = list(VARIANTS)[(turn + place) % len(VARIANTS)]
            times[name].append(train_step(engines[name], images_B3HW))
    measured = {name: list(zip(*both[args.warmup :], strict=True)) for name, both in times.items()}
    of_ranks = distributed.gather_objects(measured)
    if distributed.is_main():
        rows = {name: _describe(engines[name], [rank[name] for rank in of_ranks]) for name in VARIANTS}
        args.out.write_text(json.dumps(rows), encoding="utf-8")
    distributed.shutdown()


def _describe(engine: deepspeed.DeepSpeedEngine, of_ranks: list[list[tuple[float, ...]]]) -> dict[str, Any]:
    groups = engine.optimizer.param_groups
    return {
        "groups": len(groups[0].get(RATE_GROUPS, groups)),
        "sub_groups": len(engine.optimizer.fp16_groups),
        "step_ms": _slowest([step_s for step_s, _ in of_ranks]),
        "cpu_ms": _slowest([cpu_s for _, cpu_s in of_ranks]),
    }


def _slowest(of_ranks: list[tuple[float, ...]]) -> list[float]:
    """Milliseconds of each step on the rank that took longest."""
    return [1e3 * max(step) for step in zip(*of_ranks, strict=True)]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--preset", default="internvit_tiny", help="a file of ds_configs/models, without .py")
    parser.add_argument("--depth", type=int, default=48, help="blocks of the backbone")
    parser.add_argument("--crop", type=int, default=28, help="side of a crop in pixels")
    parser.add_argument("--batch", type=int, default=1, help="crops a process")
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[1, 2], help="numbers of processes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=40, help="measured steps of each variant")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them that don't count")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)  # of one rank, started by this script
    return parser.parse_args()


def start_ranks(world_size: int, device: str, out: Path) -> dict[str, Any]:
    """Run this script once for each rank and read what they measured."""
    environment = dict(os.environ)
    if device == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
        environment.setdefault("OMP_NUM_THREADS", "1")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world_size)]
    subprocess.run(
        [*torchrun, __file__, *sys.argv[1:], "--out", str(out)], env=environment, check=True, stdout=sys.stderr
    )
    return json.loads(out.read_text(encoding="utf-8"))


def summarise(measured: dict[str, Any]) -> dict[str, Any]:
    """Medians of every variant, and the median over turns of its ratio to no layer decay, in which load cancels."""
    rows = {}
    for name, row in measured.items():
        rows[name] = dict(row)
        for key in ("step_ms", "cpu_ms"):
            pairs = zip(row[key], measured[BASELINE][key], strict=True)
            rows[name][key] = statistics.median(row[key])
            rows[name][f"{key}_over_none"] = statistics.median(ours / base for ours, base in pairs)
    return rows


def main() -> int:
    """Measure every world size, print, write."""
    args = parse_arguments()
    if args.out:
        measure(args)
        return 0
    table = PrettyTable(["processes", "optimizer, layer decay", *COLUMNS.values()], align="r")
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="ds_seg_bench_") as folder:
        for world_size in args.world_sizes:
            figures[f"world_{world_size}"] = summarise(
                start_ranks(world_size, args.device, Path(folder) / "measured.json")
            )
            for name, row in figures[f"world_{world_size}"].items():
                cells = [row[key] if isinstance(row[key], int) else f"{row[key]:.2f}" for key in COLUMNS]
                table.add_row([world_size, name, *cells])
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(table.get_string())
    return 0


if __name__ == "__main__":
    sys.exit(main())
