"""One line for the head of a run file: what the run takes on the machine that most have."""

from __future__ import annotations

from dataclasses import replace

from ds_seg.planning.hardware import Hardware, place
from ds_seg.planning.report import format_hours
from ds_seg.planning.search import Planner

REFERENCE = Hardware(8, 1, 80.0)
"""8 H100 in one node."""
START = "# Plan: "


def describe_cost(planner: Planner) -> str:
    """GPUs, memory of each, and hours as `ds-seg plan` computes them, as a comment."""
    chosen = planner.recommend(REFERENCE)
    if chosen is None:
        chosen = planner.find_smallest_world(replace(REFERENCE, gpus=1, nodes=place(1)))
        assert chosen is not None, f"{planner.run.name} fits on no number of GPUs"
    gpus, memory_gib = chosen.batch.gpus, chosen.hardware.gpu_memory_gib
    return (
        f"{START}{gpus} GPUs of {memory_gib:g} GiB, {chosen.gpu_gib:.0f} GiB used on each, "
        f"{format_hours(chosen.hours)} hours (ds-seg plan; predicted)."
    )
