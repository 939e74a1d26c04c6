"""The report: self-contained, complete for a finished run, and possible for one that has only begun."""

from __future__ import annotations

import re

import numpy as np
import pytest

from ds_seg.evaluation.pictures import load_rgb, save_picture
from ds_seg.tracking.curves import draw_curves, draw_loss_png, smooth
from ds_seg.tracking.files import write_json_atomic
from ds_seg.tracking.metrics_log import MetricsLog
from ds_seg.tracking.report import write_report

SUMMARY = {
    "status": "completed",
    "steps": 20,
    "world_size": 2,
    "global_batch": 8,
    "zero_stage": 3,
    "backbone": {
        "dtype": "bfloat16",
        "parameters": 1234567,
        "trainable": True,
        "parameters_held_per_rank": [600000] * 2,
    },
    "head": {"type": "FCNHead", "dtype": "float32", "parameters": 1000, "replicas_identical": True},
    "loss_first": 1.9,
    "loss_last": 0.25,
    "mIoU": 0.62,
    "mAcc": 0.7,
    "aAcc": 0.9,
    "IoU": {"road <b>": 0.8, "sky": None},
    "images_per_s": 12.5,
    "step_time_s": {"median": 0.5, "p95": 0.6},
    "data_wait_share": 0.125,
    "peak_memory_gib_per_rank": [1.5, 1.75],
    "skipped_steps": 0,
    "resumed_from": None,
}


@pytest.fixture
def work_dir(tmp_path):
    folder = tmp_path / "my_run"
    log = MetricsLog(folder / "metrics.jsonl")
    for step in range(1, 21):
        row = {"step": step, "loss": 2.0 / step, "lr_min": 1e-5, "lr_max": 1e-4, "grad_norm": 1.5}
        log.append(row | {"grad_norm_clipped": 1.0, "images_per_s": 12.0, "memory_gib": 1.0})
    log.append({"step": 20, "eval/mIoU": 0.62, "eval/mAcc": 0.7, "eval/aAcc": 0.9})
    log.close()
    return folder


def test_a_finished_run_has_every_section_and_links_to_nothing_outside(work_dir):
    write_json_atomic(work_dir / "environment.json", {"torch": "2.13.0", "devices": ["cpu", "cpu"]})
    (work_dir / "config.py").write_text("model = dict(type='<EncoderDecoder>')")
    for i in range(14):
        save_picture(np.full((20, 30, 3), i, np.uint8), work_dir / "predictions" / f"{i:02d}.png")

    page = write_report(work_dir, SUMMARY).read_text()

    sections = ["Curves", "IoU by class", "Predictions", "Backbone", "Decode head", "Environment"]
    assert [section for section in sections if f"<h2>{section}</h2>" not in page] == []
    assert "<h2></h2>" not in page
    assert page.count("data:image/svg+xml") == 6
    assert page.count("data:image/jpeg") == 12
    assert "and 2 more in predictions/" in page
    assert '<span class="status">completed</span>' in page
    assert "62.0%" in page
    assert "<b>12.5%</b><span>of it waiting for data</span>" in page
    assert "1.75 GiB" in page
    assert "1,234,567" in page
    assert "road &lt;b&gt;" in page
    assert "&lt;EncoderDecoder&gt;" in page
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_a_run_that_has_only_begun_gets_its_curves(work_dir):
    page = write_report(work_dir, {}).read_text()

    assert "not finished" in page
    assert "<h2>Curves</h2>" in page
    assert "<h2>Predictions</h2>" not in page
    assert load_rgb(work_dir / "loss_curve.png").shape[2] == 3


def test_an_empty_folder_gets_a_page_without_curves(tmp_path):
    page = write_report(tmp_path, {}).read_text()

    assert "<h2>" not in page
    assert not (tmp_path / "loss_curve.png").exists()


def test_charts_without_values_are_left_out():
    assert [curve.title for curve in draw_curves([{"step": 1, "loss": 1.0}])] == ["Training loss"]
    assert draw_loss_png([{"step": 1, "eval/mIoU": 0.5}]) is None


def test_smoothing_calms_noise_without_lagging_behind_a_slope():
    slope = [float(i) for i in range(200)]
    noisy = [value + (-1) ** i for i, value in enumerate(slope)]

    assert smooth(slope) == pytest.approx(slope)
    assert max(abs(ours - value) for ours, value in zip(smooth(noisy), slope, strict=True)) <= 1.0
    assert abs(smooth(noisy)[100] - 100) < 0.2
    assert smooth([3.0]) == [3.0]
    assert smooth([]) == []
