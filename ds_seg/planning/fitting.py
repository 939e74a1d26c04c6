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
from ds_seg.planning.step_costs import StepCosts

_CPU: dict[str, Any] = {"context_gib": 0.0, "overlaps": False, "peak_tflops": 0.4, "elementwise_gb_per_s": 5.0}


def needs_fitting(run: RunConfig, device_type: str) -> bool:
    """Whether something of a run depends on memory.

    On the CPU sizes follow the backbone alone: what was measured to be good there is the same for much and for little
    memory.
    """
    return wants_policy(run) or (bool(run.auto_sizes) and device_type != "cpu")


@dataclasses.dataclass(frozen=True)
class Room:
    """What the processes of a run find free."""

    process_gib: float
    """Of the fullest GPU, or a process's share of what the fullest host has."""
    host_gib: float
    """Of the fullest host."""
    nodes: int


def measure_room(device: torch.device) -> Room:
    """Measure memory on every node; a collective over all ranks."""
    gpu_gib = None if device.type == "cpu" else _measure_gpu_gib(device)
    found = distributed.gather_objects((platform.node(), measure_free_bytes() / GIB, gpu_gib))
    processes = Counter(node for node, _, _ in found)
    return Room(
        min(host / processes[node] if gpu is None else gpu for node, host, gpu in found),
        min(host for _, host, _ in found),
        len(processes),
    )


def _measure_gpu_gib(device: torch.device) -> float:
    """A GPU's memory without what others take of it; this process's own context counts in every plan."""
    free, total = torch.cuda.mem_get_info(device)
    return min(total, free + torch.cuda.memory_reserved(device) + Hardware.context_gib * GIB) / GIB


@dataclasses.dataclass(frozen=True)
class Fit:
    """What was chosen in the place of "auto"."""

    checkpointing: str | None
    """None where the config names one itself."""
    deepspeed: dict[str, Any]
    note: str
    """For the log."""
    warning: str
    """Before anything is built; empty where nothing is lacking."""


def choose_fit(
    run: RunConfig, *, memory_gib: float, device_type: str, host_memory_gib: float | None = None, nodes: int = 1
) -> Fit:
    """Choose the checkpointing policy and the sizes of ZeRO-3 for the memory of a process.

    Args:
        run: the run, for its world size.
        memory_gib: of one GPU, or of a process on the CPU; the smallest of all.
        device_type: `cuda` or `cpu`.
        host_memory_gib: of a node, as in `Hardware`.
        nodes: that the processes are spread over.

    Raises:
        ConfigError: `auto` is asked for, and even `block` needs more memory than there is.
    """
    backbone = run.model.backbone
    own = resolve_policy(backbone.get("checkpointing"), backbone.get("with_cp"))
    policies = POLICIES if wants_policy(run) else (own,)
    candidates = plan_as_configured(
        run, policies, memory_gib=memory_gib, device_type=device_type, host_memory_gib=host_memory_gib, nodes=nodes
    )
    fitting = [candidate for candidate in candidates if candidate.gpu_spare_gib >= 0]
    if not fitting and wants_policy(run):
        raise ConfigError(_describe_lack(candidates[-1], run))
    chosen = min(fitting or candidates, key=lambda c: c.time.total_s)
    return Fit(
        chosen.checkpointing if wants_policy(run) else None,
        dict(run.deepspeed if device_type == "cpu" else chosen.deepspeed),
        f"planned for {memory_gib:.1f} GiB a process: checkpointing '{chosen.checkpointing}', {chosen.gpu_gib:.1f} GiB "
        f"needed{'' if fitting else ', which is more: expect it to run out of memory'}",
        _warn_of_host(chosen),
    )


def plan_as_configured(
    run: RunConfig, policies: Sequence[str], *, memory_gib: float, device_type: str, **found: Any
) -> list[Candidate]:
    """Plans of a run as its batch and its DeepSpeed JSON are, one for each checkpointing policy.

    Args:
        run: the run, for its world size.
        policies: those of `models.checkpointing.POLICIES` that are wanted.
        memory_gib: of one GPU, or of a process on the CPU.
        device_type: `cuda` or `cpu`.
        found: other fields of `Hardware` that are known.
    """
    size, on_cpu = measure_model(run.model), device_type == "cpu"
    costs = StepCosts(run, policies, fused_norms=not on_cpu)
    known = {"nodes": 1, **(_CPU if on_cpu else {}), **found}
    hardware = Hardware(gpus=run.world_size, gpu_memory_gib=memory_gib, **known)
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


def _warn_of_host(candidate: Candidate) -> str:
    """What an optimizer in host memory finds there, where that is too little."""
    if not candidate.states.offloaded or candidate.host_spare_gib >= 0:
        return ""
    return (
        f"warning: each node needs {candidate.host_gib:.1f} GiB of host memory, of which "
        f"{candidate.hardware.host_memory_gib:.1f} GiB are free: expect the system to kill a process. Give the job "
        "more, offload less of the optimizer (offload_optimizer.ratio), or lower data.workers_per_gpu; `ds-seg plan "
        "--host-memory GIB` compares them"
    )


def _describe_lack(candidate: Candidate, run: RunConfig) -> str:
    return (
        f"model.backbone.checkpointing='auto': even 'block' needs {candidate.gpu_gib:.1f} GiB a process by the plan, "
        f"of {candidate.hardware.gpu_memory_gib:.1f} GiB. Lower data.samples_per_gpu={run.micro_batch} "
        "(--cfg-options data.samples_per_gpu=1), take more GPUs, or keep the optimizer in host memory "
        "(--deepspeed-config ds_configs/deepspeed/zero3_bf16_offload.json); `ds-seg plan` compares them."
    )
