"""Full fine-tuning beats a linear probe, on real images from real pretrained weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from command_line import Cli

ROOT = Path(__file__).resolve().parents[2]
CAMVID = Path(os.environ.get("CAMVID_ROOT", ROOT.parent / "shared" / "data" / "camvid"))
WEIGHTS_TOOL = ROOT.parent / "shared" / "tools" / "dinov2_small.py"

pytestmark = [
    pytest.mark.camvid,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(
        not (CAMVID.is_dir() and WEIGHTS_TOOL.is_file()),
        reason=f"needs CamVid (CAMVID_ROOT, now {CAMVID}) and the tool that builds pretrained weights ({WEIGHTS_TOOL})",
    ),
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A DINOv2-S/14 file in HuggingFace's dialect."""
    path = tmp_path_factory.mktemp("weights") / "dinov2s.safetensors"
    done = subprocess.run([sys.executable, str(WEIGHTS_TOOL), str(path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return path


def train(name, weights, folder):
    done = Cli(folder, folder)(
        "train", name, "--load-from", weights, "--work-dir", folder / name, processes=2, timeout_s=900
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads((folder / name / "summary.json").read_text())


def test_full_fine_tuning_beats_the_linear_probe(weights, tmp_path):
    """At equal steps; measured 0.408 against 0.225 (docs/results.md)."""
    linear = train("camvid_dinov2s_linear", weights, tmp_path)
    full = train("camvid_dinov2s_full", weights, tmp_path)
    for summary in (linear, full):
        assert summary["steps"] <= 200 and summary["global_batch"] <= 8 and summary["world_size"] == 2
    assert linear["backbone"]["trainable"] == 0 < full["backbone"]["trainable"]
    assert full["mIoU"] >= 0.38
    assert full["mIoU"] - linear["mIoU"] >= 0.08
