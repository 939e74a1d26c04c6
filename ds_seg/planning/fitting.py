"""Settle what a config leaves "auto" from the memory that a training finds."""

from __future__ import annotations

import copy
import dataclasses
import platform
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from ds_seg import distributed
from ds_seg.config import RunConfig
from ds_seg.config.deepspeed_json import suit_device
from ds_seg.errors import ConfigError
from ds_seg.host_memory import measure_free_bytes
from ds_seg.models.checkpointing import POLICIES, resolve_policy
from ds_seg.planning.candidates import Batch, Candidate, build_candidate
from ds_seg.planning.hardware import GIB, Hardware
from ds_seg.planning.model_size import measure_model
from ds_seg.planning.search import wants_policy
from ds_seg.planning.step_costs import simulate_costs

_CPU: dict[str, Any] = {"context_gib": 0.0, "launches_ahead": False, "peak_tflops": 0.2}


def needs_fitting(run: RunConfig, device_type: str) -> bool:
    """Whether something of a run depends on memory.

    On the CPU sizes follow the backbone alone: what was measured to be good there is the same for much and for little
    memory.
    """
    return wants_policy(run) or (bool(run.auto_sizes) and device_type != "cpu")


def measure_memory_gib(device: torch.device) -> float:
    """Memory that each process can count on: of the smallest GPU, or its share of what a host has free.

    A collective over all ranks.
    """
    if device.type == "cpu":
        own = (platform.node(), measure_free_bytes() / GIB)
    else:
        own = ("", torch.cuda.get_device_properties(device).total_memory / GIB)
    found = distributed.gather_objects(own)
    processes = Counter(node for node, _ in found if node)
    return min(gib / processes.get(node, 1) for node, gib in found)


@dataclasses.dataclass(frozen=True)
class Fit:
    """What was chosen in the place of "auto"."""

    checkpointing: str | None
    """None where the config names one itself."""
    deepspeed: dict[str, Any]
    note: str
    """For the log."""


def choose_fit(run: RunConfig, *, memory_gib: float, device_type: str) -> Fit:
    """Choose the checkpointing policy and the sizes of ZeRO-3 for the memory of a process.

    Args:
        run: the run, for its world size.
        memory_gib: of one GPU, or of a process on the CPU; the smallest of all.
        device_type: `cuda` or `cpu`.

    Raises:
        ConfigError: `auto` is asked for, and even `block` needs more memory than there is.
    """
    backbone = run.model.backbone
    own = resolve_policy(backbone.get("checkpointing"), backbone.get("with_cp"))
    policies = POLICIES if wants_policy(run) else (own,)
    candidates = plan_as_configured(run, policies, memory_gib=memory_gib, device_type=device_type)
    fitting = [candidate for candidate in candidates if candidate.gpu_spare_gib >= 0]
    if not fitting and wants_policy(run):
        raise ConfigError(_describe_lack(candidates[-1], run))
    chosen = min(fitting or candidates, key=lambda c: c.time.total_s)
    return Fit(
        chosen.checkpointing if wants_policy(run) else None,
        dict(run.deepspeed if device_type == "cpu" else chosen.deepspeed),
        f"planned for {memory_gib:.1f} GiB a process: checkpointing '{chosen.checkpointing}', {chosen.gpu_gib:.1f} GiB "
        f"needed{'' if fitting else ', which is more: expect it to run out of memory'}",
    )


def plan_as_configured(
    run: RunConfig, policies: Sequence[str], *, memory_gib: float, device_type: str, **rates: float
) -> list[Candidate]:
    """Plans of a run as its batch and its DeepSpeed JSON are, one for each checkpointing policy.

    Args:
        run: the run, for its world size.
        policies: those of `models.checkpointing.POLICIES` that are wanted.
        memory_gib: of one GPU, or of a process on the CPU.
        device_type: `cuda` or `cpu`.
        rates: fields of `Hardware` that were measured.
    """
    size, on_cpu = measure_model(run.model), device_type == "cpu"
    costs = simulate_costs(run, policies, fused_norms=not on_cpu)
    hardware = Hardware(run.world_size, 1, memory_gib, **{**(_CPU if on_cpu else {}), **rates})
    batch = Batch(run.world_size, run.micro_batch, run.accumulation_steps, run.schedule.max_steps)
    deepspeed = suit_device(run.deepspeed, device_type)
    return [
        build_candidate(run, size, costs.of(policy, run.micro_batch), hardware, batch, policy, deepspeed)
        for policy in policies
    ]


def apply_fit(run: RunConfig, fit: Fit) -> RunConfig:
    """The run with what was chosen."""
    mmseg = run.mmseg
    if fit.checkpointing is not None:
        mmseg = copy.deepcopy(mmseg)
        mmseg.model.backbone.checkpointing = fit.checkpointing
    return dataclasses.replace(run, mmseg=mmseg, deepspeed=fit.deepspeed, notes=(*run.notes, fit.note))


def _describe_lack(candidate: Candidate, run: RunConfig) -> str:
    return (
        f"model.backbone.checkpointing='auto': even 'block' needs {candidate.gpu_gib:.1f} GiB a process by the plan, "
        f"of {candidate.hardware.gpu_memory_gib:.1f} GiB. Lower data.samples_per_gpu={run.micro_batch} "
        "(--cfg-options data.samples_per_gpu=1), take more GPUs, or keep the optimizer in host memory "
        "(--deepspeed-config ds_configs/deepspeed/zero3_bf16_offload.json); `ds-seg plan` compares them."
    )
