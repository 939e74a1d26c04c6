"""How long training stands still for a checkpoint: one that is waited for against one written in the background.

Two processes train a small model under both engines, in rounds of so many steps that take turns: no checkpoint, one
that training waits for, and one in the background, each after the first step of its round. What a round takes longer
than one without is what a checkpoint costs in all: the wait, and steps that are slower while the background writes.
It starts its processes itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from prettytable import PrettyTable
from workload import Workload

from ds_seg import distributed
from ds_seg.checkpoint import CheckpointSaver, TrainingState
from ds_seg.checkpoint.manifest import read_manifest
from ds_seg.checkpoint.store import checkpoint_name, checkpoints_folder
from ds_seg.config import RunConfig
from ds_seg.engine.step import TwoEngineStep
from ds_seg.session import build_engines

KINDS = ("none", "sync", "async")
COLUMNS = {
    "stall_s": "stands still s",
    "round_s": "round s",
    "added_s": "over none s",
    "longest_step_s": "longest step s",
}
"""Key of a figure -> its heading."""


class Rounds:
    """Both engines of one rank, and a saver of each kind."""

    def __init__(self, workload: Workload, folder: Path, work_dir: Path) -> None:
        run = workload.build_run(folder)
        self.runs = {kind: _describe_saves(run, work_dir, kind) for kind in KINDS}
        self.engines = build_engines(run, training=True, weights=None, log=lambda _line: None)
        self.train_step = TwoEngineStep(self.engines, run)
        self.batch = workload.draw_batch(run, 0)
        self.savers = {kind: CheckpointSaver(self.engines, self.runs[kind]) for kind in KINDS[1:]}
        self.saves = 0

    def measure(self, kind: str, steps: int) -> dict[str, float]:
        """One round: seconds of it all, of its longest step, and those in which training waited for a checkpoint."""
        distributed.barrier()
        started_s, stall_s, step_times_s = time.perf_counter(), 0.0, []
        for index in range(steps):
            step_started_s = time.perf_counter()
            self.train_step(0, [self.batch], scheduled_steps=index)
            _synchronize()
            trained_s = time.perf_counter()
            if kind in self.savers:
                self._save_or_poll(kind, first=index == 0, last=index == steps - 1)
            ended_s = time.perf_counter()
            stall_s += ended_s - trained_s
            step_times_s.append(ended_s - step_started_s)
        distributed.barrier()
        return {
            "stall_s": stall_s,
            "round_s": time.perf_counter() - started_s,
            "longest_step_s": max(step_times_s),
        }

    def _save_or_poll(self, kind: str, *, first: bool, last: bool) -> None:
        saver = self.savers[kind]
        saver.poll()
        if first:
            self.saves += 1
            saver.save(TrainingState(step=self.saves))
        if last:
            saver.wait()

    def count_bytes(self) -> int:
        """Bytes of the last checkpoint, over all ranks."""
        folder = checkpoints_folder(self.runs["async"].work_dir) / checkpoint_name(self.saves)
        return sum(entry["bytes"] for entry in read_manifest(folder).files.values())


def _describe_saves(run: RunConfig, work_dir: Path, kind: str) -> RunConfig:
    saving = dataclasses.replace(run.checkpoints, keep=1, in_background=kind == "async")
    return dataclasses.replace(run, work_dir=work_dir, checkpoints=saving)


def _synchronize() -> None:
    if distributed.device().type == "cuda":
        torch.cuda.synchronize()


def measure(args: argparse.Namespace) -> None:
    """One rank: let the kinds take turns, and write what the slowest rank needed."""
    distributed.initialize()
    with tempfile.TemporaryDirectory(prefix="ds_seg_bench_") as folder:
        workload = Workload(args.preset, args.depth, args.crop, args.batch, distributed.world_size(), args.device)
        workload.write(Path(folder))
        rounds = Rounds(workload, Path(folder), args.out.parent)
    times: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for turn in range(args.warmup + args.rounds):
        for place in range(len(KINDS)):  # each in each place as often: what came before leaves other caches
            kind = KINDS[(turn + place) % len(KINDS)]
            times[kind].append(rounds.measure(kind, args.steps))
    of_ranks = distributed.gather_objects({kind: both[args.warmup :] for kind, both in times.items()})
    if distributed.is_main():
        slowest = {kind: _slowest([rank[kind] for rank in of_ranks]) for kind in KINDS}
        args.out.write_text(json.dumps({"bytes": rounds.count_bytes(), "rounds": slowest}), encoding="utf-8")
    distributed.shutdown()


def _slowest(of_ranks: list[list[dict[str, float]]]) -> list[dict[str, float]]:
    """Each round as the rank saw it that took longest."""
    return [{key: max(rank[key] for rank in ranks) for key in ranks[0]} for ranks in zip(*of_ranks, strict=True)]


def summarise(measured: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Medians of every kind, and the median over turns of what a round takes longer than the one without."""
    figures = {}
    for kind, rounds in measured.items():
        row = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
        pairs = zip(rounds, measured["none"], strict=True)
        row["added_s"] = statistics.median(one["round_s"] - without["round_s"] for one, without in pairs)
        figures[kind] = row
    return figures


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--preset", default="internvit300m_448", help="a file of ds_configs/models, without .py")
    parser.add_argument("--depth", type=int, default=4, help="blocks of the backbone")
    parser.add_argument("--crop", type=int, default=112, help="side of a crop in pixels")
    parser.add_argument("--batch", type=int, default=1, help="crops a process")
    parser.add_argument("--world-size", type=int, default=2, help="number of processes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds of each kind")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before them that don't count")
    parser.add_argument("--steps", type=int, default=12, help="steps of a round")
    parser.add_argument("--folder", type=Path, help="where the checkpoints go: the disk that is measured")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)  # of one rank, started by this script
    return parser.parse_args()


def start_ranks(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Run this script once for each rank and read what they measured."""
    environment = dict(os.environ)
    if args.device == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
        environment.setdefault("OMP_NUM_THREADS", "1")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(args.world_size)]
    subprocess.run(
        [*torchrun, __file__, *sys.argv[1:], "--out", str(out)], env=environment, check=True, stdout=sys.stderr
    )
    return json.loads(out.read_text(encoding="utf-8"))


def main() -> int:
    """Measure, print, write."""
    args = parse_arguments()
    if args.out:
        measure(args)
        return 0
    folder = Path(tempfile.mkdtemp(prefix="ds_seg_bench_", dir=args.folder))
    try:
        measured = start_ranks(args, folder / "measured.json")
    finally:
        shutil.rmtree(folder)
    figures = {"bytes": measured["bytes"], "kinds": summarise(measured["rounds"])}
    table = PrettyTable(["checkpoint", *COLUMNS.values()], align="r")
    for kind, row in figures["kinds"].items():
        table.add_row([kind, *(f"{row[key]:.3f}" for key in COLUMNS)])
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(f"{measured['bytes'] / 1e9:.2f} GB a checkpoint, {args.world_size} processes, rounds of {args.steps} steps")
    print(table.get_string())
    return 0


if __name__ == "__main__":
    sys.exit(main())
