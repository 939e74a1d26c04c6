"""One rank of one variant of the step benchmark; started by step.py through torchrun.

It builds its variant, then waits for turns in the store that step.py hosts, so that variants take turns on
the same machine while each keeps a process, and a peak of memory, of its own.
"""

from __future__ import annotations

import argparse
import datetime
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch
import torch.distributed as dist
from device_facts import (
    measure_activation,
    measure_attention,
    measure_copy_within,
    measure_layer,
    measure_products,
    measure_s,
)
from memory import measure_held_gib, measure_step_gib
from phases import COLLECTIVES, DATA, measure_collectives_s, split_step
from variants import VARIANTS, Step
from workload import Workload

from ds_seg import distributed
from ds_seg.config import RunConfig
from ds_seg.planning.flops import compute_tokens

PATIENCE = datetime.timedelta(hours=1)
_GATHERED_BYTES = 2**23


def main() -> None:
    """Build the variant and serve turns until told to stop."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("port", type=int)
    args = parser.parse_args()
    store = dist.TCPStore("127.0.0.1", args.port, is_master=False, timeout=PATIENCE)
    distributed.initialize()
    before_gib = _resident_gib()
    failure = None
    try:
        _serve(args.name, args.variant, args.folder, store, before_gib)
    except torch.OutOfMemoryError as error:
        failure = {"out_of_memory": str(error).splitlines()[0]}
    if failure:
        store.set(f"{args.name}/failed", json.dumps(failure))
        return
    distributed.shutdown()


def _serve(name: str, variant: str, folder: Path, store: dist.Store, before_gib: float) -> None:
    workload = Workload.read(folder)
    run = workload.build_run(folder)
    step = VARIANTS[variant](run)
    if distributed.device().type == "cuda":
        torch.cuda.empty_cache()  # what building took
    done = 0
    for turn in range(10**9):
        key = f"{name}/{turn}"
        store.wait([key], PATIENCE)
        order = json.loads(store.get(key))
        if not order:
            return
        result = _take_turn(workload, run, step, done, order["warmup"], order["steps"])
        done += order["warmup"] + order["steps"]
        if order["measure_more"]:
            result |= _measure_more(workload, run, step, done, before_gib)
            done += 3
        if distributed.is_main():
            store.set(f"{key}/result", json.dumps(result))


def _take_turn(workload: Workload, run: RunConfig, step: Step, done: int, warmup: int, steps: int) -> dict[str, Any]:
    """Make unmeasured steps, then measured ones, each until the device is idle; times are the slowest rank's."""
    times_s, cpu_s, losses, norms = [], [], [], []
    for index in range(done, done + warmup + steps):
        batch = workload.draw_batch(run, index)
        distributed.barrier()
        started, cpu_started = time.perf_counter(), time.process_time()
        loss, norm = step(index, batch)
        if distributed.device().type == "cuda":
            torch.cuda.synchronize()
        times_s.append(time.perf_counter() - started)
        cpu_s.append(time.process_time() - cpu_started)
        losses.append(loss)
        norms.append(norm)
    of_ranks = distributed.gather_objects((times_s[warmup:], cpu_s[warmup:]))
    return {
        "step_s": [max(times) for times in zip(*(times_s for times_s, _ in of_ranks), strict=True)],
        "cpu_s": [max(times) for times in zip(*(cpu_s for _, cpu_s in of_ranks), strict=True)],
        "loss": losses,
        "grad_norm": norms,
    }


def _measure_more(workload: Workload, run: RunConfig, step: Step, done: int, before_gib: float) -> dict[str, Any]:
    """Memory, and the phases of a step, by rank; three more steps, which count for nothing else."""
    device = distributed.device()
    first, last = (workload.draw_batch(run, index) for index in (done, done + 2))
    memory = _measure_memory(lambda: step(done, first), before_gib)
    distributed.barrier()
    source = SimpleNamespace(draw=lambda: workload.draw_batch(run, done + 1))
    phases = split_step(lambda: step(done + 1, source.draw()), {DATA: [(source, "draw")], **step.timed}, device)
    distributed.barrier()
    phases[COLLECTIVES] = measure_collectives_s(lambda: step(done + 2, last), device)
    memories, all_phases, rates = zip(*distributed.gather_objects((memory, phases, _measure_rates(run))), strict=True)
    return {
        "memory": {name: max(rank[name] for rank in memories) for name in memory},
        "memory_by_rank": list(memories),
        "phases_s": {name: max(rank[name] for rank in all_phases) for name in phases},
        "rates": {name: min(rank[name] for rank in rates) for name in rates[0]},
    }


def _measure_rates(run: RunConfig) -> dict[str, float]:
    """What this process reaches while the others do the same, by the names of the planner's `Hardware`."""
    device = distributed.device()
    distributed.barrier()
    backbone = run.model.backbone
    batch, tokens = run.micro_batch, compute_tokens(run.train_crop_px, run.patch_size)
    heads, channels = int(backbone.num_heads), int(backbone.embed_dim)
    hidden = round(channels * float(backbone.get("mlp_ratio", 4)))
    attention = (batch, heads, tokens, channels // heads)
    peak_tflops = max(measure_products(device).values())
    rates = {
        "peak_tflops": peak_tflops,
        "utilisation": measure_layer(batch * tokens, channels, hidden, device) / peak_tflops,
        "attention_utilisation": measure_attention(attention, device) / peak_tflops,
        "elementwise_gb_per_s": measure_activation(batch * tokens, hidden, device),
        "hbm_gb_per_s": measure_copy_within(device),
    }
    part = torch.zeros(_GATHERED_BYTES // distributed.world_size(), dtype=torch.uint8, device=device)
    whole = torch.empty(part.numel() * distributed.world_size(), dtype=torch.uint8, device=device)
    gather_s = measure_s(lambda: dist.all_gather_into_tensor(whole, part), device)
    rates["nvlink_gb_per_s"] = whole.numel() / gather_s / 1e9
    return rates


def _measure_memory(step: Callable[[], object], before_gib: float) -> dict[str, float]:
    """GiB of this rank: GPU memory, the resident set and its growth since the start, and tensors.

    `gpu_gib` is what the device counts as used, `allocated_gib` the peak of all tensors in a step, `step_gib` what a
    step takes beyond those there before it.
    """
    resident_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    measured = {"resident_gib": resident_gib, "resident_growth_gib": resident_gib - before_gib}
    device = distributed.device()
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        measured["gpu_gib"] = (total - free) / 2**30
    held_gib = measure_held_gib(device)
    measured["step_gib"] = measure_step_gib(step, device)
    measured["allocated_gib"] = held_gib + measured["step_gib"]
    return measured


def _resident_gib() -> float:
    return psutil.Process().memory_info().rss / 2**30


if __name__ == "__main__":
    main()
