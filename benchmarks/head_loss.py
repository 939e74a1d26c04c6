"""What the loss of one micro-batch costs: MMSegmentation's over the whole batch, and ours image by image.

Forward and backward from the logits of a linear head on; the two take turns in one process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from memory import measure_step_gib
from prettytable import PrettyTable
from torch import Tensor

from ds_seg import distributed
from ds_seg.models.head_building import build_one_head

PATCH_PX = 14


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--classes", type=int, default=150)
    parser.add_argument("--crop", type=int, default=504, help="side of a crop, pixels")
    parser.add_argument("--batch", type=int, default=8, help="crops")
    parser.add_argument("--rounds", type=int, default=3, help="timed turns of each")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    return parser.parse_args()


def build_steps(args: argparse.Namespace) -> dict[str, Callable[[], Tensor]]:
    """Forward and backward of the loss on the same logits and labels, both ways; each returns the gradient."""
    device = distributed.device()
    generator = torch.Generator().manual_seed(0)
    side = args.crop // PATCH_PX
    logits_BKhw = torch.randn(args.batch, args.classes, side, side, generator=generator).to(device).requires_grad_()
    labels_B1HW = torch.randint(args.classes, (args.batch, 1, args.crop, args.crop), generator=generator).to(device)
    cfg = {"type": "FCNHead", "in_channels": 1, "channels": 1, "num_convs": 0, "num_classes": args.classes}
    cfg["loss_decode"] = {"type": "CrossEntropyLoss", "avg_non_ignore": True}
    head = build_one_head("decode_head", cfg, after_another=False).to(device)
    whole_batch = type(head).losses.__get__(head)

    def step(losses: Callable[[Tensor, Tensor], dict[str, Tensor]]) -> Tensor:
        logits_BKhw.grad = None
        losses(logits_BKhw, labels_B1HW)["loss_ce"].backward()
        assert logits_BKhw.grad is not None
        return logits_BKhw.grad

    return {"image by image": lambda: step(head.losses), "whole batch": lambda: step(whole_batch)}


def measure(step: Callable[[], Tensor]) -> tuple[float, float]:
    """Wall clock and CPU seconds of one turn."""
    started, cpu_started = time.perf_counter(), time.process_time()
    step()
    if distributed.device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, time.process_time() - cpu_started


def main() -> None:
    """Measure, print, write."""
    args = parse_arguments()
    steps = build_steps(args)
    ours, theirs = (step().clone() for step in steps.values())
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(args.rounds):
        for name, step in steps.items():
            turns[name].append(measure(step))
    figures = {
        name: {
            "step_s": statistics.median(wall for wall, _ in turns[name]),
            "cpu_s": statistics.median(cpu for _, cpu in turns[name]),
            "peak_gib": measure_step_gib(step, distributed.device()),
        }
        for name, step in steps.items()
    }
    table = PrettyTable(["loss", "step s", "CPU s", "peak GiB"])
    for name, row in figures.items():
        table.add_row([name, f"{row['step_s']:.3f}", f"{row['cpu_s']:.3f}", f"{row['peak_gib']:.3f}"])
    difference = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    print(f"{table.get_string()}\nlargest difference of a gradient: {difference:.1e} of the largest")
    if args.json:
        args.json.write_text(json.dumps({"variants": figures, "gradient_difference": difference}, indent=2) + "\n")


if __name__ == "__main__":
    main()
