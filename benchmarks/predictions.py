"""What `ds-seg plan` predicts of a run as it is configured, for the device that a benchmark runs on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ds_seg.config import RunConfig
from ds_seg.models.checkpointing import resolve_policy
from ds_seg.planning.candidates import Candidate
from ds_seg.planning.fitting import plan_as_configured
from ds_seg.planning.hardware import GIB

_RESERVE = "CUDA context and fragmentation"
_RESIDENT = ("parameters", "gradients", "master", "moments", "reduce buckets", "live parameters", "head")


def plan(run: RunConfig, memory_gib: float, device: torch.device, **rates: float) -> Candidate:
    """The plan of a run on devices of this kind, one a process.

    Args:
        run: the run; its policy and its DeepSpeed JSON are planned as they are.
        memory_gib: of a device.
        device: its kind.
        rates: fields of `Hardware` that were measured.
    """
    backbone = run.model.backbone
    policy = resolve_policy(backbone.get("checkpointing"), backbone.get("with_cp"))
    (candidate,) = plan_as_configured(run, (policy,), memory_gib=memory_gib, device_type=device.type, **rates)
    return candidate


def predict_memory(candidate: Candidate) -> dict[str, Any]:
    """GiB of a process, by the names of what is measured.

    `gpu_gib` is what the device counts as used, `allocated_gib` what its tensors take at the peak of a step, `step_gib`
    what a step takes beyond what is there between steps, and `parts_gib` the plan's own parts.
    """
    parts = {name: size / GIB for name, size in candidate.gpu_bytes.items()}
    allocated_gib = sum(parts.values()) - parts[_RESERVE]
    resident_gib = sum(gib for name, gib in parts.items() if name in _RESIDENT or name.startswith("averages"))
    return {
        "gpu_gib": candidate.gpu_gib,
        "allocated_gib": allocated_gib,
        "step_gib": allocated_gib - resident_gib,
        "host_gib": candidate.host_gib,
        "parts_gib": parts,
    }


def compare_with_plan(planned: Candidate, measured: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Predicted and measured GiB and seconds, and by how much more the prediction is.

    Args:
        planned: the plan.
        measured: `step_s`, and `memory` by the names of `predict_memory`, as many as there are.
    """
    memory = predict_memory(planned)
    names = [name for name in ("gpu_gib", "allocated_gib", "step_gib") if name in measured["memory"]]
    pairs = {name: (memory[name], measured["memory"][name]) for name in names}
    pairs["step_s"] = (planned.time.total_s, measured["step_s"])
    return {
        name: {"predicted": predicted, "measured": found, "error": predicted / found - 1}
        for name, (predicted, found) in pairs.items()
    }
