"""`ds-seg train` with an EMAHook: evaluated, saved, resumed, and found again by `ds-seg evaluate`."""

import json

import pytest

from command_line import TINY
from ds_seg.config import CONFIGS_ROOT
from run_rows import read_rows

HOOK = """
custom_hooks = [dict(type="EMAHook", momentum=0.2, warm_up=10)]
evaluation = dict(interval=6)
"""


def rows(work_dir, kind):
    """Rows of steps (`loss`) or of evaluations (`eval/mIoU`)."""
    return [row for row in read_rows(work_dir) if kind in row]


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "averaged.py"
    path.write_text(TINY.format(base=str(CONFIGS_ROOT / "runs" / "demo.py")) + HOOK)
    return path


def test_averages_are_evaluated_saved_resumed_and_found_again(cli, config, tmp_path):
    work_dir = tmp_path / "run"
    done = cli("train", config, "--work-dir", work_dir)
    assert done.returncode == 0, done.stderr
    assert "EMA: evaluations and pictures use averages of the weights, kept in FP32" in done.stdout
    summary = json.loads((work_dir / "summary.json").read_text())
    held = summary["backbone"]["parameters"] + summary["head"]["parameters"]
    assert summary["ema"] == {"dtype": "float32", "values_held_per_rank": [held], "heads_identical": True}
    losses, scores = rows(work_dir, "loss"), rows(work_dir, "eval/mIoU")
    assert len(losses) == 12 and [row["step"] for row in scores] == [6, 12]
    assert scores[-1]["eval/mIoU"] == summary["mIoU"]

    again = cli("train", config, "--work-dir", work_dir, "--resume", "step_000006")
    assert again.returncode == 0, again.stderr
    assert rows(work_dir, "loss") == losses and rows(work_dir, "eval/mIoU") == scores

    out = tmp_path / "scores.json"
    found = cli("evaluate", config, work_dir, "--out", out, processes=2, launcher="torchrun")
    assert found.returncode == 0, found.stderr
    assert f"loaded the averages (EMA) of backbone and heads from {work_dir}" in found.stdout
    got = json.loads(out.read_text())
    assert {"step": 12, **{key: got[key] for key in got if key.startswith("eval/")}} == scores[-1]
