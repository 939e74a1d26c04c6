"""The demo, as a newcomer runs it: real size, the deepspeed launcher, wandb offline."""

import json
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image

from command_line import environment
from ds_seg.commands.demo import _prepare_launch
from ds_seg.tracking.metrics_log import read_metrics


@pytest.fixture(scope="module")
def demo(device, tmp_path_factory):
    """Work dir and output of `ds-seg demo`."""
    folder = tmp_path_factory.mktemp("demo")
    env = environment(device, WANDB_MODE="offline")
    env.pop("DS_SEG_DEMO_ROOT", None)
    command = [sys.executable, "-m", "ds_seg", "demo"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "work_dirs" / "demo", done.stdout


def test_the_summary_holds_what_the_demo_promises(demo, device):
    summary = json.loads((demo[0] / "summary.json").read_text())
    processes = 2 if device == "cpu" else max(n for n in (1, 2, 4, 8) if n <= torch.cuda.device_count())
    assert summary["status"] == "completed" and summary["zero_stage"] == 3 and summary["world_size"] == processes
    backbone, head = summary["backbone"], summary["head"]
    assert backbone["dtype"] == "bfloat16" and backbone["trainable"] == backbone["parameters"] > 2_500_000
    shares = [held / backbone["parameters"] * processes for held in backbone["parameters_held_per_rank"]]
    assert all(0.9 < share < 1.1 for share in shares)
    assert head["dtype"] == "float32" and head["replicas_identical"] is True
    assert summary["mIoU"] >= 0.60 and summary["skipped_steps"] == 0


def test_there_are_pictures_and_a_report_to_look_at(demo):
    work_dir, output = demo
    pictures = list((work_dir / "predictions").glob("*.png"))
    assert len(pictures) == 8 and all(Image.open(path).size[0] > 500 for path in pictures)
    report = (work_dir / "report.html").read_text()
    assert "data:image/jpeg;base64," in report and "mIoU" in report
    assert Image.open(work_dir / "loss_curve.png").size[0] > 500
    assert "wandb sync" in output and str(work_dir.name) in output


def test_the_metrics_have_the_promised_keys(demo):
    rows = read_metrics(demo[0] / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    wanted = {"step", "loss", "loss_ce", "acc_seg", "lr_min", "lr_max", "grad_norm", "grad_norm_clipped"}
    wanted |= {"images_per_s", "data_wait_s", "memory_gib"}
    assert all(wanted <= set(row) for row in steps) and steps[-1]["step"] == 300
    assert any("eval/mIoU" in row and "eval/IoU/tree" in row for row in rows)
    assert steps[-1]["loss"] < steps[0]["loss"] / 2


@pytest.mark.parametrize(("gpus", "processes"), [(0, 2), (1, 1), (3, 2), (7, 4), (8, 8), (16, 8)])
def test_it_starts_as_many_processes_as_share_its_batch(monkeypatch, gpus, processes):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    env = {k: v for k, v in os.environ.items() if k not in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES")}
    monkeypatch.setattr(os, "environ", env)
    assert _prepare_launch()[0] == processes
    assert env.get("DS_ACCELERATOR") == (None if gpus else "cpu")
