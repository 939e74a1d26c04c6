"""The curves of a run as pictures."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]

_BLUE, _ORANGE, _GREEN, _GREY = "#2563eb", "#ea580c", "#059669", "#6b7280"


class Curve(NamedTuple):
    """A chart of the report: its title and its SVG."""

    title: str
    svg: bytes


def draw_curves(rows: Rows) -> list[Curve]:
    """Draw every chart that the rows of metrics.jsonl have values for."""
    plots: list[tuple[str, Callable[[Axes, Rows], bool]]] = [
        ("Training loss", _plot_loss),
        ("Evaluation", _plot_evaluation),
        ("Learning rates", _plot_rates),
        ("Gradient norm", _plot_norms),
        ("Throughput", _plot_throughput),
        ("Memory", _plot_memory),
    ]
    curves = []
    for title, plot in plots:
        figure, axes = _make_axes()
        if plot(axes, rows):
            curves.append(Curve(title, _render(figure, "svg")))
    return curves


def draw_loss_png(rows: Rows) -> bytes | None:
    """The loss curve, with the evaluations' mIoU on a second axis, as a PNG; None without a loss."""
    figure, axes = _make_axes(width=8.0, height=4.2)
    if not _plot_loss(axes, rows):
        return None
    steps, values = _select(rows, "eval/mIoU")
    if steps:
        right = axes.twinx()
        right.plot(steps, [100 * value for value in values], color=_ORANGE, marker="o", markersize=4, linewidth=1.6)
        right.set_ylabel("mIoU (%)", color=_ORANGE)
        right.spines[["top", "left", "bottom"]].set_visible(False)
    return _render(figure, "png")


def smooth(values: Sequence[float]) -> list[float]:
    """Centred moving average over about a twentieth of the values, which does not lag behind them."""
    half = len(values) // 40
    smoothed = []
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)  # even on both sides, so that the ends stay where they are
        window = values[i - reach : i + reach + 1]
        smoothed.append(sum(window) / len(window))
    return smoothed


def _plot_loss(axes: Axes, rows: Rows) -> bool:
    steps, values = _select(rows, "loss")
    axes.plot(steps, values, color=_BLUE, alpha=0.3, linewidth=1)
    axes.plot(steps, smooth(values), color=_BLUE, linewidth=2)
    axes.set_ylabel("loss", color=_BLUE)
    return bool(steps)


def _plot_evaluation(axes: Axes, rows: Rows) -> bool:
    found = False
    for name, colour in (("mIoU", _ORANGE), ("mAcc", _GREEN), ("aAcc", _GREY)):
        steps, values = _select(rows, f"eval/{name}")
        axes.plot(steps, [100 * value for value in values], color=colour, marker="o", markersize=4, label=name)
        found = found or bool(steps)
    axes.set_ylabel("percent")
    axes.legend(frameon=False)
    return found


def _plot_rates(axes: Axes, rows: Rows) -> bool:
    for key, colour, label in (("lr_max", _BLUE, "largest"), ("lr_min", _GREY, "smallest")):
        axes.plot(*_select(rows, key), color=colour, label=label)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes.set_ylabel("learning rate")
    axes.legend(frameon=False)
    return bool(_select(rows, "lr_max")[0])


def _plot_norms(axes: Axes, rows: Rows) -> bool:
    axes.plot(*_select(rows, "grad_norm"), color=_BLUE, linewidth=1.2, label="before clipping")
    axes.plot(*_select(rows, "grad_norm_clipped"), color=_ORANGE, linewidth=1.2, label="after clipping")
    axes.set_ylabel("joint norm")
    axes.legend(frameon=False)
    return bool(_select(rows, "grad_norm")[0])


def _plot_throughput(axes: Axes, rows: Rows) -> bool:
    steps, values = _select(rows, "images_per_s")
    axes.plot(steps, values, color=_GREEN, linewidth=1.2)
    axes.set_ylabel("images / s")
    axes.set_ylim(bottom=0)
    return bool(steps)


def _plot_memory(axes: Axes, rows: Rows) -> bool:
    steps, values = _select(rows, "memory_gib")
    axes.plot(steps, values, color=_GREY, linewidth=1.6)
    axes.set_ylabel("GiB per rank")
    axes.set_ylim(bottom=0)
    return bool(steps)


def _select(rows: Rows, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the rows that have the key."""
    found = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return [step for step, _ in found], [value for _, value in found]


def _make_axes(width: float = 5.4, height: float = 3.0) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure  # pyplot, with its global state and backends, is not needed

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_xlabel("step")
    return figure, axes


def _render(figure: Figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=150)
    return buffer.getvalue()
