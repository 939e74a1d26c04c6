"""Train a run file on one fixed batch, on one device: real steps with a falling loss, memory and time beside the plan.

Images and labels are random, so neither data nor weights are needed; all else is the run's own, the DeepSpeed JSON and
its "auto" sizes included, as `ds-seg train` settles them. The schedule starts without a warm-up: 10 steps must show.
Exit code 1 if the loss did not fall.

Shape suffixes: B images, H W pixels, h w cells of equal label, 3 colours, 1 label.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from memory import measure_step_gib
from predictions import plan, predict_memory
from workload import scale_taps

from ds_seg import distributed
from ds_seg.config import RunConfig, RunOptions, build_run_config
from ds_seg.config.files import read_config_file, resolve_config_path
from ds_seg.config.overrides import parse_overrides
from ds_seg.data.training_batches import MicroBatch
from ds_seg.engine.step import TwoEngineStep
from ds_seg.errors import UserError
from ds_seg.models.checkpointing import POLICIES
from ds_seg.planning.candidates import Candidate
from ds_seg.planning.hardware import GIB
from ds_seg.session import build_engines
from ds_seg.summary import describe_backbone, describe_heads

_WARMUP_STEPS = 2


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("config", metavar="CONFIG", help="a run of ds_configs/runs, or the path of a config")
    parser.add_argument("--depth", type=int, help="blocks of the backbone instead of the run's own number")
    parser.add_argument("--batch", type=int, help="crops at once, and crops a step, instead of the run's")
    parser.add_argument("--checkpointing", choices=POLICIES, help="instead of the run's")
    parser.add_argument("--deepspeed-config", metavar="F", help="instead of the run's")
    parser.add_argument("--cfg-options", nargs="+", metavar="K=V", default=[], help="change config values, as in MMSeg")
    parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="to plan for (default: what the device has)")
    parser.add_argument("--steps", type=int, default=10, help=f"of which the first {_WARMUP_STEPS} are not timed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    args = parser.parse_args()
    if args.steps <= _WARMUP_STEPS:
        parser.error(f"--steps {args.steps}: want more than {_WARMUP_STEPS}")
    return args


def build_run(args: argparse.Namespace) -> RunConfig:
    """The run file with what the command line changes, for a world of one.

    Raises:
        ConfigError: an option does not fit the run.
    """
    backbone = read_config_file(resolve_config_path(args.config), {}).model.backbone
    options: dict[str, Any] = {
        "lr_config.warmup_iters": 0,
        "data.workers_per_gpu": 0,
        **parse_overrides(args.cfg_options),
    }
    if args.depth:
        taps = scale_taps(backbone.out_indices, backbone.depth, args.depth)
        options |= {"model.backbone.depth": args.depth, "model.backbone.out_indices": taps}
    if args.batch:
        options |= {"data.samples_per_gpu": args.batch, "global_batch": args.batch}
    if args.checkpointing:
        options["model.backbone.checkpointing"] = args.checkpointing
    return build_run_config(RunOptions(args.config, deepspeed_config=args.deepspeed_config, cfg_options=options), 1)


def draw_batch(run: RunConfig) -> list[MicroBatch]:
    """The micro-batches of one step: random images, and random labels on a grid that the network's maps can tell."""
    generator = torch.Generator().manual_seed(0)
    height, width = run.train_crop_px
    patch_px, count, classes = run.patch_size, run.micro_batch, int(run.model.decode_head.num_classes)
    batches = []
    for index in range(run.accumulation_steps):
        images_B3HW = torch.randn(count, 3, height, width, generator=generator)
        labels_B1hw = torch.randint(classes, (count, 1, height // patch_px, width // patch_px), generator=generator)
        labels_B1HW = labels_B1hw.repeat_interleave(patch_px, 2).repeat_interleave(patch_px, 3)
        positions = list(range(index * count, (index + 1) * count))
        batches.append(MicroBatch(images_B3HW, labels_B1HW, positions, [{}] * count))
    return batches


def train(step: TwoEngineStep, batches: list[MicroBatch], steps: int) -> dict[str, Any]:
    """Make steps on the same batches, each until the device is idle; the peak of memory is counted from here on."""
    losses, norms, times_s = [], [], []
    if step.engines.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for scheduled_steps in range(steps):
        started = time.perf_counter()
        result = step(0, batches, scheduled_steps=scheduled_steps)
        if step.engines.device.type == "cuda":
            torch.cuda.synchronize()
        times_s.append(time.perf_counter() - started)
        losses.append(result.losses["loss"])
        norms.append(result.grad_norm)
        print(f"step {len(losses)}: loss {losses[-1]:.4f}, norm {norms[-1]:.3g}, {times_s[-1]:.2f} s", flush=True)
    timed = sorted(times_s[_WARMUP_STEPS:])
    times = {"step_s": statistics.median(timed), "step_s_min": timed[0], "step_s_max": timed[-1]}
    return {"losses": losses, "grad_norms": norms, **times}


def measure_memory(step: TwoEngineStep, batches: list[MicroBatch]) -> dict[str, float]:
    """Peaks of the steps, on device and host; `step_gib`: what one more step allocates beyond what was there."""
    measured = {}
    if step.engines.device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        measured = {
            "host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            "allocated_gib": torch.cuda.max_memory_allocated() / GIB,
            "gpu_gib": (total - free) / GIB,
        }
    measured["step_gib"] = measure_step_gib(lambda: step(0, batches, scheduled_steps=0), step.engines.device)
    return measured


def summarise(run: RunConfig, candidate: Candidate, step: TwoEngineStep, trained: dict[str, Any]) -> dict[str, Any]:
    """All figures but those of memory."""
    images = run.global_batch
    flops = candidate.cost.model_flops * run.accumulation_steps
    on_gpu = step.engines.device.type == "cuda"
    return {
        "run": run.name,
        "device_name": torch.cuda.get_device_name() if on_gpu else "cpu",
        "torch": torch.__version__,
        "depth": int(run.model.backbone.depth),
        "crop_px": list(run.train_crop_px),
        "micro_batch": run.micro_batch,
        "accumulation_steps": run.accumulation_steps,
        "checkpointing": candidate.checkpointing,
        "offload_optimizer": candidate.states.offloaded,
        "backbone": describe_backbone(step.engines.backbone.module),
        "head": describe_heads(step.engines.heads),
        **trained,
        "images_per_s": images / trained["step_s"],
        "tflops": flops / trained["step_s"] / 1e12,
        "mfu": flops / trained["step_s"] / (candidate.hardware.peak_tflops * 1e12) if on_gpu else None,
        "step_s_predicted": candidate.time.total_s if on_gpu else None,
        "loss_fell": trained["losses"][-1] < trained["losses"][0],
    }


def format_figures(figures: dict[str, Any]) -> str:
    """What was measured beside what was predicted, as text."""
    losses, predicted_s = figures["losses"], figures["step_s_predicted"]
    offloaded = figures["offload_optimizer"]
    lines = [
        f"{figures['run']} with {figures['depth']} blocks",
        f"{figures['accumulation_steps']} x {figures['micro_batch']} crops of {figures['crop_px']} px",
        f"checkpointing '{figures['checkpointing']}', {offloaded:.0%} of the optimizer in host memory",
        f"loss {losses[0]:.4f} -> {losses[-1]:.4f} in {len(losses)} steps on one batch",
        f"step {figures['step_s']:.3f} s" + (f", plan {predicted_s:.3f}" if predicted_s else ""),
    ]
    for name, measured in figures["memory"].items():
        predicted = figures["memory_predicted"][name]
        lines.append(f"{name} {measured:.3f}, plan {predicted:.3f} ({measured / predicted - 1:+.1%})")
    return "\n".join(lines)


def main() -> int:
    """Plan, train, compare."""
    args = parse_arguments()
    try:
        distributed.initialize()
        run, device = build_run(args), distributed.device()
        total = psutil.virtual_memory().total if device.type == "cpu" else torch.cuda.mem_get_info()[1]
        candidate = plan(run, args.gpu_memory or total / GIB, device)
        run = dataclasses.replace(run, deepspeed=dict(candidate.deepspeed), auto_sizes=())
        step = TwoEngineStep(build_engines(run, training=True, weights=None, log=print), run)
        built_gib = torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else None
        batches = draw_batch(run)
        figures = summarise(run, candidate, step, train(step, batches, args.steps))
        figures |= {"memory": measure_memory(step, batches), "memory_predicted": predict_memory(candidate)}
        figures["allocated_gib_while_building"] = built_gib
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    distributed.shutdown()
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(format_figures(figures))
    return 0 if figures["loss_fell"] else 1


if __name__ == "__main__":
    sys.exit(main())
