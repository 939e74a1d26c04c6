"""Full fine-tuning beats a linear probe, on real images from real pretrained weights."""

import json
import os
from pathlib import Path

import pytest

from command_line import Cli
from pretrained import find_dinov2_small

ROOT = Path(__file__).resolve().parents[2]
CAMVID = Path(os.environ.get("CAMVID_ROOT", ROOT.parent / "shared" / "data" / "camvid"))

pytestmark = [
    pytest.mark.camvid,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(not CAMVID.is_dir(), reason=f"needs CamVid (CAMVID_ROOT, now {CAMVID})"),
]


def train(name, weights, folder):
    done = Cli(folder, folder)(
        "train", name, "--load-from", weights, "--work-dir", folder / name, processes=2, timeout_s=900
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads((folder / name / "summary.json").read_text())


def test_full_fine_tuning_beats_the_linear_probe(pytestconfig, tmp_path):
    """At equal steps; measured 0.410 against 0.225 (docs/results.md)."""
    weights = find_dinov2_small(pytestconfig)
    linear = train("camvid_dinov2s_linear", weights, tmp_path)
    full = train("camvid_dinov2s_full", weights, tmp_path)
    for summary in (linear, full):
        assert summary["steps"] <= 200 and summary["global_batch"] <= 8 and summary["world_size"] == 2
    assert linear["backbone"]["trainable"] == 0 < full["backbone"]["trainable"]
    assert full["mIoU"] >= 0.38
    assert full["mIoU"] - linear["mIoU"] >= 0.08
