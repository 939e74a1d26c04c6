"""What is computed from the measured steps: medians, rates, FLOPs and ratios."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ds_seg.planning.flops import compute_forward_flops

PEAK_BF16_TFLOPS = {"H100": 989.0, "H200": 989.0}
"""Dense bf16 tensor-core peak by what the device's name contains."""


def compute_flops(backbone: Mapping[str, Any], crop_px: int) -> float:
    """FLOPs of forward and backward of the backbone for one square crop; recomputation is not counted."""
    return 3 * compute_forward_flops(backbone, (crop_px, crop_px))


def find_peak_tflops(device_name: str) -> float | None:
    """The device's bf16 peak, None where it is not known."""
    return next((peak for part, peak in PEAK_BF16_TFLOPS.items() if part in device_name), None)


def summarise_variant(
    turns: Sequence[Mapping[str, Any]], global_batch: int, flops_per_device: float, peak_tflops: float | None
) -> dict[str, Any]:
    """Figures of one variant over all its turns.

    Args:
        turns: what step_worker returned, in order.
        global_batch: crops a step, over all processes.
        flops_per_device: of one step.
        peak_tflops: the device's by its maker, None if not known; that of plain matrix products is measured.
    """
    times_s = [time_s for turn in turns for time_s in turn["step_s"]]
    median_s = statistics.median(times_s)
    losses = [loss for turn in turns for loss in turn["loss"]]
    norms = [norm for turn in turns for norm in turn["grad_norm"]]
    return {
        "step_s": median_s,
        "step_s_min": min(times_s),
        "step_s_max": max(times_s),
        "step_s_by_round": [statistics.median(turn["step_s"]) for turn in turns],
        "cpu_s": statistics.median(time_s for turn in turns for time_s in turn["cpu_s"]),
        "images_per_s": global_batch / median_s,
        "tflops_per_device": flops_per_device / median_s / 1e12,
        "mfu": flops_per_device / median_s / (peak_tflops * 1e12) if peak_tflops else None,
        "mfu_of_products": flops_per_device / median_s / (turns[-1]["rates"]["peak_tflops"] * 1e12),
        **{name: turns[-1][name] for name in ("memory", "memory_by_rank", "phases_s", "rates")},
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "grad_norm_first": norms[0],
        "steps": len(losses),
    }


def compute_ratios(
    variants: Mapping[str, Mapping[str, Any]], pairs: Sequence[tuple[str, str]], memory_key: str
) -> dict[str, float | None]:
    """One variant over another, in time and memory; None where one of them has no figures.

    Args:
        variants: by name, what `summarise_variant` returned.
        pairs: names, the first over the second; ds_seg's own name is left out of the ratio's.
        memory_key: what of `memory` the device is short of.
    """
    ratios = {}
    for ours, other in pairs:
        prefix = "" if ours == "ds_seg" else f"{ours}_"
        a, b = variants[ours], variants[other]
        ratios[f"{prefix}step_time_over_{other}"] = _time_ratio(a, b)
        ratios[f"{prefix}cpu_time_over_{other}"] = a["cpu_s"] / b["cpu_s"] if "cpu_s" in a and "cpu_s" in b else None
        for name, key in (("memory", memory_key), ("step_memory", "step_gib")):
            ratios[f"{prefix}{name}_over_{other}"] = _memory_ratio(a, b, key)
    return ratios


def _time_ratio(ours: Mapping[str, Any], other: Mapping[str, Any]) -> float | None:
    """The median over rounds of the ratio within a round, in which other load on the machine cancels."""
    our_rounds, other_rounds = (variant.get("step_s_by_round") for variant in (ours, other))
    if not our_rounds or not other_rounds:
        return None
    return statistics.median(a / b for a, b in zip(our_rounds, other_rounds, strict=True))


def _memory_ratio(ours: Mapping[str, Any], other: Mapping[str, Any], key: str) -> float | None:
    a, b = (variant.get("memory", {}).get(key) for variant in (ours, other))
    return a / b if a and b else None
