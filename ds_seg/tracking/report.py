"""report.html: one self-contained page that shows what a run did."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from ds_seg.errors import count
from ds_seg.files import write_text_atomic
from ds_seg.tracking.curves import Rows, draw_curves, draw_loss_png
from ds_seg.tracking.metrics_log import read_metrics

_MOST_PICTURES = 12
_WIDEST_PICTURE_PX = 1400

_STYLE = """
:root { --ink: #1f2937; --soft: #6b7280; --line: #e5e7eb; --card: #ffffff; --page: #f8fafc; --bar: #2563eb; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; color: var(--ink); background: var(--page);
       margin: 0 auto; padding: 32px 24px 64px; max-width: 1180px; }
h1 { font-size: 26px; margin: 0; } h2 { font-size: 18px; margin: 36px 0 12px; }
.status { display: inline-block; margin-left: 12px; padding: 2px 10px; border-radius: 99px; font-size: 13px;
          vertical-align: 4px; background: #d1fae5; color: #065f46; }
.status.other { background: #fee2e2; color: #991b1b; }
.sub { color: var(--soft); margin: 4px 0 20px; }
.grid { display: grid; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); }
.tiles { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(165px, 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
details.card { margin-top: 14px; }
.tile b { display: block; font-size: 21px; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.tile span, figcaption { color: var(--soft); font-size: 13px; }
figure { margin: 0 0 14px; } img { width: 100%; height: auto; display: block; }
table { border-collapse: collapse; width: 100%; } td, th { padding: 5px 8px; text-align: left; vertical-align: top; }
tr + tr td { border-top: 1px solid var(--line); } td.n { text-align: right; width: 70px;
                                                          font-variant-numeric: tabular-nums; }
td.k { color: var(--soft); width: 34%; overflow-wrap: anywhere; } td.v { overflow-wrap: anywhere; }
.track { background: #eef2f7; border-radius: 4px; height: 12px; margin-top: 6px; }
.track div { background: var(--bar); border-radius: 4px; height: 12px; }
pre { overflow-x: auto; font-size: 13px; margin: 10px 0 0; } summary { cursor: pointer; font-weight: 600; }
"""


def write_report(work_dir: Path, summary: Mapping[str, Any]) -> Path:
    """Write `report.html` and `loss_curve.png` from what the work dir holds; parts that are missing are left out.

    Args:
        work_dir: Folder of a run, with metrics.jsonl and, if the run got that far, environment.json, config.py,
            deepspeed.json and predictions/.
        summary: What summary.json will hold; empty for a run that has not ended.

    Returns:
        The path of the page.
    """
    rows = read_metrics(work_dir / "metrics.jsonl")
    loss_png = draw_loss_png(rows)
    if loss_png is not None:
        (work_dir / "loss_curve.png").write_bytes(loss_png)
    body = [
        _head(work_dir, summary),
        _tiles(summary),
        _curves(rows),
        _classes(summary),
        _pictures(work_dir / "predictions"),
        _facts("Backbone", summary.get("backbone")) + _facts("Decode head", summary.get("head")),
        _facts("Environment", _read_json(work_dir / "environment.json")),
        *(_file(work_dir / name) for name in ("config.py", "deepspeed.json")),
    ]
    title = escape(work_dir.resolve().name)
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>'
        f"<body>{''.join(body)}</body></html>\n"
    )
    path = work_dir / "report.html"
    write_text_atomic(path, page)
    return path


def _head(folder: Path, summary: Mapping[str, Any]) -> str:
    status = str(summary.get("status", "not finished"))
    kind = "status" if status == "completed" else "status other"
    sharding = ""
    if summary:
        sharding = f"{count(summary['world_size'], 'process')}, ZeRO stage {summary['zero_stage']}, global batch "
        sharding = f'<p class="sub">{escape(sharding + str(summary["global_batch"]))}</p>'
    return f'<h1>{escape(folder.resolve().name)}<span class="{kind}">{escape(status)}</span></h1>{sharding}'


def _tiles(summary: Mapping[str, Any]) -> str:
    if not summary:
        return ""
    step_time = summary["step_time_s"]
    tiles = {
        "mIoU": _percent(summary["mIoU"]),
        "mean accuracy": _percent(summary["mAcc"]),
        "pixel accuracy": _percent(summary["aAcc"]),
        "loss, first to last": f"{_number(summary['loss_first'])} → {_number(summary['loss_last'])}",
        "steps": _number(summary["steps"]),
        "images / s": _number(summary["images_per_s"]),
        "step time, median / p95": f"{_number(step_time['median'])} / {_number(step_time['p95'])} s",
        "of it waiting for data": _percent(summary.get("data_wait_share")),
        "peak memory per rank": f"{max(summary['peak_memory_gib_per_rank']):.2f} GiB",
        "skipped steps": _number(summary["skipped_steps"]),
    }
    cells = "".join(
        f'<div class="card tile"><b>{escape(value)}</b><span>{label}</span></div>' for label, value in tiles.items()
    )
    return f'<div class="tiles">{cells}</div>'


def _curves(rows: Rows) -> str:
    cards = "".join(
        f'<figure class="card"><figcaption>{curve.title}</figcaption>'
        f'<img alt="{curve.title}" src="{_embed(curve.svg, "image/svg+xml")}"></figure>'
        for curve in draw_curves(rows)
    )
    return f'<h2>Curves</h2><div class="grid">{cards}</div>' if cards else ""


def _classes(summary: Mapping[str, Any]) -> str:
    lines = "".join(
        f'<tr><td>{escape(name)}</td><td class="n">{_percent(iou)}</td>'
        f'<td><div class="track"><div style="width:{100 * (iou or 0):.1f}%"></div></div></td></tr>'
        for name, iou in (summary.get("IoU") or {}).items()
    )
    return f'<h2>IoU by class</h2><div class="card"><table>{lines}</table></div>' if lines else ""


def _pictures(folder: Path) -> str:
    paths = sorted(folder.glob("*.png"))
    figures = "".join(
        f'<figure class="card"><img alt="{escape(path.stem)}" src="{_embed(_shrink(path), "image/jpeg")}">'
        f"<figcaption>{escape(path.stem)}</figcaption></figure>"
        for path in paths[:_MOST_PICTURES]
    )
    more = len(paths) - _MOST_PICTURES
    note = f'<p class="sub">and {more} more in predictions/</p>' if more > 0 else ""
    return f"<h2>Predictions</h2>{figures}{note}" if figures else ""


def _facts(title: str, facts: Mapping[str, Any] | None) -> str:
    lines = "".join(
        f'<tr><td class="k">{escape(str(key))}</td><td class="v">{escape(_number(value))}</td></tr>'
        for key, value in (facts or {}).items()
    )
    return f'<h2>{title}</h2><div class="card"><table>{lines}</table></div>' if lines else ""


def _file(path: Path) -> str:
    if not path.exists():
        return ""
    text = escape(path.read_text(encoding="utf-8"))
    return f'<details class="card"><summary>{path.name}</summary><pre>{text}</pre></details>'


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _shrink(path: Path) -> bytes:
    buffer = io.BytesIO()
    with Image.open(path) as picture:
        small = picture.convert("RGB")
        small.thumbnail((_WIDEST_PICTURE_PX, _WIDEST_PICTURE_PX))
        small.save(buffer, format="JPEG", quality=88)
    return buffer.getvalue()


def _embed(content: bytes, mime: str) -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


def _percent(fraction: float | None) -> str:
    return "–" if fraction is None else f"{100 * fraction:.1f}%"


def _number(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list, bool)) else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
