"""One run on more and more GPUs: where communication takes over, and what hpZ changes."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from prettytable import PrettyTable

from ds_seg.files import write_bytes_atomic
from ds_seg.planning.candidates import Candidate
from ds_seg.planning.communication import HPZ
from ds_seg.planning.hardware import Hardware, place
from ds_seg.planning.report import format_hours
from ds_seg.planning.search import Planner


@dataclass(frozen=True)
class ScalingRow:
    """One number of GPUs, three ways to gather."""

    kept: Candidate
    """As recommended: parameters stay whole as far as memory allows."""
    twice: Candidate
    """Gathered for the forward and again for the backward pass."""
    hpz: Candidate
    """The same, the second time from copies inside the node."""


def compute_scaling(planner: Planner, hardware: Hardware, worlds: Sequence[int]) -> list[ScalingRow]:
    """Rows for those of the worlds that any way fits on."""
    rows = []
    for gpus in worlds:
        there = replace(hardware, gpus=gpus, nodes=place(gpus))
        kept = planner.recommend(there)
        if kept is None:
            continue
        twice, hpz = (planner.rebuild(kept, live_bytes=0, **{HPZ: sharing}) for sharing in (1, there.gpus_a_node))
        rows.append(ScalingRow(kept, twice, hpz))
    return rows


def find_bound(rows: Sequence[ScalingRow]) -> str:
    """From which number of GPUs on nothing takes longer than communication, in words."""
    names = {"kept": "as recommended", "twice": "gathering twice", "hpz": "gathering twice with hpZ"}
    words = []
    for name, label in names.items():
        bound = [
            candidate.batch.gpus
            for candidate in (getattr(row, name) for row in rows)
            if candidate.time.is_communication_bound
        ]
        words.append(f"{label} {f'from {min(bound)} GPUs on' if bound else 'nowhere here'}")
    return f"communication-bound: {', '.join(words)}"


def format_scaling(rows: Sequence[ScalingRow]) -> str:
    """The table."""
    columns = ["GPUs", "crops", "batch", "GiB a GPU", "step s", "images/s", "efficiency", "hours", "GPU-hours"]
    table = PrettyTable([*columns, "images/s gathering twice", "with hpZ"], align="r")
    first = rows[0].kept
    for row in rows:
        kept = row.kept
        efficiency = kept.images_per_s / kept.batch.gpus / (first.images_per_s / first.batch.gpus)
        table.add_row(
            [
                kept.batch.gpus,
                f"{kept.batch.micro_batch} x {kept.batch.accumulation_steps}",
                kept.batch.images,
                f"{kept.gpu_gib:.1f}",
                f"{kept.time.total_s:.2f}",
                f"{kept.images_per_s:.1f}",
                f"{efficiency:.0%}",
                format_hours(kept.hours),
                format_hours(kept.hours * kept.batch.gpus),
                f"{row.twice.images_per_s:.1f}",
                f"{row.hpz.images_per_s:.1f}",
            ]
        )
    return table.get_string()


def draw_scaling(rows: Sequence[ScalingRow], path: Path, title: str) -> None:
    """The chart, as a PNG: images a second, and the parts of a step, over the number of GPUs."""
    from matplotlib.figure import Figure

    gpus = [row.kept.batch.gpus for row in rows]
    figure = Figure(figsize=(10, 4), layout="constrained")
    rates, times = figure.subplots(1, 2)
    ideal = rows[0].kept.images_per_s / gpus[0]
    rates.plot(gpus, [ideal * count for count in gpus], ":", color="grey", label="linear")
    for name, label in (("kept", "as recommended"), ("twice", "gathered twice"), ("hpz", "gathered twice, hpZ")):
        rates.plot(gpus, [getattr(row, name).images_per_s for row in rows], "o-", label=label)
    rates.set(xlabel="GPUs", ylabel="images/s", xscale="log", yscale="log")
    times.plot(gpus, [row.kept.time.compute_s for row in rows], "o-", label="computation")
    times.plot(gpus, [row.kept.time.host_s for row in rows], "o-", label="Python")
    lines = {"kept": ("o-", "communication"), "twice": ("o--", "communication, gathered twice")}
    for name, (style, label) in {**lines, "hpz": ("o--", "the same with hpZ")}.items():
        seconds = [getattr(row, name).time.communication_s for row in rows]
        times.plot(gpus, [value or math.nan for value in seconds], style, label=label)  # one GPU: nothing on a log axis
    times.set(xlabel="GPUs", ylabel="seconds a step", xscale="log", yscale="log")
    for axes in (rates, times):
        axes.set_xticks(gpus, [str(count) for count in gpus])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(title)
    content = io.BytesIO()
    figure.savefig(content, dpi=110, format="png")
    write_bytes_atomic(path, content.getvalue())
