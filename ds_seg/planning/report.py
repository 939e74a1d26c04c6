"""A plan as text and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prettytable import PrettyTable

from ds_seg.errors import count
from ds_seg.planning.candidates import Candidate
from ds_seg.planning.flops import compute_forward_flops
from ds_seg.planning.hardware import GIB
from ds_seg.planning.search import Planner

_LEAST_SHOWN_GIB = 0.005


def describe_model(planner: Planner) -> list[str]:
    """Parameters and FLOPs of a run's model."""
    size, run = planner.size, planner.run
    cost = planner.costs.of(planner.costs.policies[0], 1)
    formula = compute_forward_flops(run.model.backbone, run.train_crop_px)
    model_flops = formula * cost.model_flops / cost.forward_flops
    height, width = run.train_crop_px
    return [
        f"{run.name}: backbone {size.backbone:,} parameters ({size.trainable:,} trainable) in "
        f"{'bf16' if run.bf16 else 'FP32'}, head {size.head:,} in FP32, crops of {height} x {width} px",
        f"TFLOP per image: forward {cost.forward_flops / 1e12:.4g} by torch's counter (with_fpn's layers included), "
        f"{formula / 1e12:.4g} by formula; forward and backward {model_flops / 1e12:.3g}; heads, forward and backward, "
        f"{cost.head_flops / 1e12:.2g}",
    ]


def format_candidate(candidate: Candidate) -> str:
    """Tables of memory and a few lines on time, traffic and checkpoints."""
    time, batch, traffic = candidate.time, candidate.batch, candidate.traffic
    total_s = time.total_s
    moved = f" | gradients to the host {time.offload_s:.2f}" if time.offload_s else ""
    lines = [
        _format_memory(candidate),
        f"step {total_s:.2f} s = computation {time.compute_s:.2f} | communication {time.communication_s:.2f} | "
        f"Python {time.host_s:.2f}{moved} (overlapped) + optimizer {time.optimizer_s:.2f} + head's all-reduce "
        f"{time.head_reduce_s:.2f}; {candidate.images_per_s:.1f} images/s, MFU {candidate.model_flops_utilisation:.0%}",
        f"schedule: {batch.max_steps} steps of {batch.images} crops: {format_hours(candidate.hours)} hours, "
        f"{format_hours(candidate.hours * batch.gpus)} GPU-hours",
        f"communication per GPU and micro-batch: {traffic.total / 1e9:.1f} GB = gathered forward "
        f"{traffic.gathered_forward / 1e9:.1f}, backward {traffic.gathered_backward / 1e9:.1f}, gradients "
        f"{traffic.reduced / 1e9:.1f}; {batch.accumulation_steps * traffic.total / 1e9:.1f} GB per step",
        f"checkpoint: {candidate.checkpoint_bytes / 1e9:.1f} GB, written in "
        f"{candidate.checkpoint_bytes / 1e9 / candidate.hardware.storage_gb_per_s:.0f} s; --checkpoint async takes "
        f"{candidate.copy_bytes / GIB:.0f} GiB more host memory per node",
        f"bound by {time.bound}",
    ]
    return "\n".join(lines)


def describe_choice(candidate: Candidate) -> str:
    """What was chosen, in words."""
    batch = candidate.batch
    offloaded = candidate.states.offloaded
    place = "on the GPUs"
    if offloaded:
        part = f"{offloaded:.0%} " if offloaded < 1 else ""
        place = f"{part}in host memory" + ("" if candidate.states.pin_memory else ", not pinned")
    return (
        f"{count(batch.micro_batch, 'crop')} x {count(batch.accumulation_steps, 'micro-batch')} x "
        f"{count(batch.gpus, 'GPU')}, checkpointing '{candidate.checkpointing}', optimizer {place}"
    )


def describe_lack(candidate: Candidate) -> str:
    """What a way to run that does not fit lacks."""
    hardware = candidate.hardware
    lacks = []
    if candidate.gpu_spare_gib < 0:
        usable = hardware.usable * hardware.gpu_memory_gib
        lacks.append(f"{candidate.gpu_gib:.1f} GiB a GPU, where {usable:.1f} can be used")
    if candidate.host_spare_gib < 0:
        lacks.append(f"{candidate.host_gib:.0f} GiB of host memory a node, where {hardware.host_memory_gib:g} are")
    return " and ".join(lacks)


def format_comparison(candidates: Sequence[Candidate], chosen: Candidate | None) -> str:
    """The ways that were tried, one a row; of those that differ in pinning alone the better one."""
    table = PrettyTable(["crops", "checkpointing", "optimizer", "GiB a GPU", "GiB a host", "step s", "fits"], align="r")
    seen = set()
    for candidate in sorted(candidates, key=lambda c: (not c.fits, c.time.total_s)):
        offloaded = candidate.states.offloaded
        key = (candidate.batch.micro_batch, candidate.checkpointing, offloaded)
        if key in seen:
            continue
        seen.add(key)
        verdict = "chosen" if candidate == chosen else "yes" if candidate.fits else "no"
        place = "GPU" if not offloaded else "host" if offloaded == 1 else f"{offloaded:.0%} host"
        figures = [f"{candidate.gpu_gib:.1f}", f"{candidate.host_gib:.0f}", f"{candidate.time.total_s:.2f}"]
        table.add_row([*key[:2], place, *figures, verdict])
    return table.get_string()


def to_dict(candidate: Candidate) -> dict[str, Any]:
    """The same for machines: bytes, seconds and counts."""
    batch, time, traffic = candidate.batch, candidate.time, candidate.traffic
    return {
        "gpus": batch.gpus,
        "nodes": candidate.hardware.nodes,
        "micro_batch": batch.micro_batch,
        "accumulation_steps": batch.accumulation_steps,
        "global_batch": batch.images,
        "max_steps": batch.max_steps,
        "checkpointing": candidate.checkpointing,
        "offload_optimizer": candidate.states.offloaded,
        "fits": candidate.fits,
        "gpu_bytes": dict(candidate.gpu_bytes),
        "gpu_gib": candidate.gpu_gib,
        "host_bytes": dict(candidate.host_bytes),
        "host_gib": candidate.host_gib,
        "step_s": time.total_s,
        "compute_s": time.compute_s,
        "communication_s": time.communication_s,
        "offload_s": time.offload_s,
        "host_s": time.host_s,
        "optimizer_s": time.optimizer_s,
        "head_reduce_s": time.head_reduce_s,
        "bound": time.bound,
        "images_per_s": candidate.images_per_s,
        "mfu": candidate.model_flops_utilisation,
        "hours": candidate.hours,
        "gpu_hours": candidate.hours * batch.gpus,
        "traffic_bytes_a_micro_batch": {
            "gathered_forward": traffic.gathered_forward,
            "gathered_backward": traffic.gathered_backward,
            "reduced": traffic.reduced,
        },
        "checkpoint_bytes": candidate.checkpoint_bytes,
        "async_copy_bytes_a_node": candidate.copy_bytes,
        "checkpoint_s": candidate.checkpoint_bytes / 1e9 / candidate.hardware.storage_gb_per_s,
        "deepspeed": dict(candidate.deepspeed),
    }


def format_hours(hours: float) -> str:
    """A duration with as many digits as it deserves."""
    return f"{hours:.0f}" if hours >= 10 else f"{hours:.1f}" if hours >= 1 else f"{hours:.2g}"


def _format_memory(candidate: Candidate) -> str:
    table = PrettyTable(["memory", "GiB a GPU", "GiB a host"], align="r")
    table.align["memory"] = "l"
    hosts = candidate.host_bytes
    for part in dict.fromkeys([*candidate.gpu_bytes, *hosts]):
        figures = [_gib(candidate.gpu_bytes, part), _gib(hosts, part)]
        if any(figures):
            table.add_row([part, *figures])
    table.add_row(["together", f"{candidate.gpu_gib:.2f}", f"{candidate.host_gib:.2f}"])
    return table.get_string()


def _gib(parts: Mapping[str, float], part: str) -> str:
    gib = parts.get(part, 0.0) / GIB
    return f"{gib:.2f}" if gib >= _LEAST_SHOWN_GIB else ""
