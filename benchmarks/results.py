"""The results of the step benchmark: all figures of a run, and the table that is printed of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch
from device_facts import name_device
from figures import compute_flops, compute_ratios, find_peak_tflops, summarise_variant
from phases import COLLECTIVES
from predictions import compare_with_plan, plan
from prettytable import PrettyTable
from workload import Workload

from ds_seg.models.checkpointing import POLICIES
from ds_seg.planning.flops import compute_tokens
from ds_seg.planning.hardware import GIB

PAIRS = (
    ("ds_seg", "fsdp2"),
    ("ds_seg", "ddp"),
    ("ds_seg_compiled", "fsdp2_compiled"),
    ("ds_seg_compiled", "ds_seg"),
    ("ds_seg_compiled", "ddp"),
)
"""Of which ratios are computed, as far as both were measured."""
_UNMEASURED = {"out_of_memory", "failed"}
_OURS = ("ds_seg", "ds_seg_compiled", *POLICIES)
_COLUMNS = {
    "step s": "{step_s:.3f}",
    "min": "{step_s_min:.3f}",
    "max": "{step_s_max:.3f}",
    "CPU s": "{cpu_s:.3f}",
    "images/s": "{images_per_s:.2f}",
    "loss first": "{loss_first:.4f}",
    "last": "{loss_last:.4f}",
}


def summarise(workload: Workload, folder: Path, turns: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """All figures of a run, as they go to the JSON file.

    Args:
        workload: what was measured.
        folder: of the run; a folder in it for each variant.
        turns: what each variant's turns measured, by its name.
    """
    run = workload.build_run(folder)
    device = torch.device(workload.device)
    on_cpu = device.type == "cpu"
    device_name = name_device(device)
    memory = psutil.virtual_memory().total / workload.world_size if on_cpu else torch.cuda.mem_get_info()[1]
    flops = compute_flops(run.model.backbone, workload.crop_px)
    variants = {}
    for name, its_turns in turns.items():
        its_workload = Workload.read(folder / name)
        variants[name] = {"checkpointing": its_workload.checkpointing, "compile": its_workload.compile}
        failed = next((turn for turn in its_turns if _UNMEASURED & set(turn)), None)
        if failed:
            variants[name] |= failed
            continue
        variants[name] |= summarise_variant(
            its_turns, run.global_batch, flops * workload.batch, find_peak_tflops(device_name)
        )
        if name in _OURS:
            rates = its_turns[-1]["rates"] if on_cpu else {}
            planned = plan(its_workload.build_run(folder / name), memory / GIB, device, **rates)
            variants[name]["plan"] = compare_with_plan(planned, variants[name])
    counted = plan(run, memory / GIB, device).cost.forward_flops / workload.batch
    memory_key = "resident_gib" if on_cpu else "gpu_gib"
    pairs = [pair for pair in (*PAIRS, *((policy, "none") for policy in POLICIES[1:])) if set(pair) <= set(turns)]
    return {
        "workload": {key: value for key, value in asdict(workload).items() if key not in ("checkpointing", "compile")},
        "device_name": device_name,
        "torch": torch.__version__,
        "global_batch": run.global_batch,
        "tokens": compute_tokens((workload.crop_px, workload.crop_px), run.patch_size),
        "tflop_per_image": flops / 1e12,
        "tflop_per_image_counted": 3 * counted / 1e12,
        "memory_key": memory_key,
        "variants": variants,
        "ratios": compute_ratios(variants, pairs, memory_key),
    }


def format_table(figures: Mapping[str, Any]) -> str:
    """The figures as text: times and memory, where the time goes, what was predicted, ratios."""
    measured = {name: row for name, row in figures["variants"].items() if not _UNMEASURED & set(row)}
    memory_key = figures["memory_key"]
    table = _build_table(["variant", *_COLUMNS, "MFU", "of products", "memory GiB", "tensors"])
    for name, row in figures["variants"].items():
        if name not in measured:
            table.add_row(
                [name, "failed" if "failed" in row else "out of memory", *["-"] * (len(table.field_names) - 2)]
            )
            continue
        shares = ["-" if row[key] is None else f"{row[key]:.1%}" for key in ("mfu", "mfu_of_products")]
        memory = [f"{row['memory'][key]:.3f}" for key in (memory_key, "allocated_gib")]
        table.add_row([name, *(cell.format(**row) for cell in _COLUMNS.values()), *shares, *memory])
    parts = [
        f"TFLOP an image, forward and backward: {figures['tflop_per_image']:.4g} by formula, "
        f"{figures['tflop_per_image_counted']:.4g} counted",
        table.get_string(),
        *([_format_phases(measured)] if measured else []),
        *_format_plans(measured),
        "ratios: " + "  ".join(f"{k} {'-' if v is None else format(v, '.3f')}" for k, v in figures["ratios"].items()),
    ]
    return "\n".join(parts)


def _format_phases(rows: Mapping[str, Mapping[str, Any]]) -> str:
    phases = list(next(iter(rows.values()))["phases_s"])
    table = _build_table(["seconds of one step in", *(name for name in phases if name != COLLECTIVES), COLLECTIVES])
    for name, row in rows.items():
        table.add_row([name, *(f"{row['phases_s'][phase]:.3f}" for phase in table.field_names[1:])])
    return table.get_string()


def _format_plans(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [
        f"plan of {name}: "
        + ", ".join(
            f"{what} {found['predicted']:.3f} (measured {found['measured']:.3f}, {found['error']:+.1%})"
            for what, found in row["plan"].items()
        )
        for name, row in rows.items()
        if "plan" in row
    ]


def _build_table(columns: Sequence[str]) -> PrettyTable:
    table = PrettyTable(columns)
    table.align = "r"
    table.align[columns[0]] = "l"
    return table
