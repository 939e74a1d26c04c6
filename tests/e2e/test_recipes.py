"""The shipped recipes can't rot: each is built from its own file, at tiny width, trained and evaluated."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from command_line import environment


@pytest.fixture(scope="module")
def finished(tmp_path_factory, scenes):
    """Work dirs of all recipes, from one start of two processes."""
    out = tmp_path_factory.mktemp("recipes")
    worker = Path(__file__).with_name("recipes_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(worker)]
    done = subprocess.run(
        [*command, str(scenes), str(out)],
        # a build that was killed leaves a lock in torch's shared folder, which later builds wait for without end
        env=environment(WANDB_MODE="disabled", TORCH_EXTENSIONS_DIR=str(out / "extensions")),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return out


def summary_of(work_dir):
    return json.loads((work_dir / "summary.json").read_text())


def test_every_6b_recipe_trains_a_step_and_evaluates(finished):
    recipes = json.loads((finished / "recipes.json").read_text())
    assert {"internvit6b_224_full_linear_ade20k", "internvit6b_v2_5_linear_ade20k"} <= set(recipes)
    for name in recipes:
        summary = summary_of(finished / name)
        assert summary["status"] == "completed" and summary["zero_stage"] == 3 and summary["world_size"] == 2
        assert summary["backbone"]["dtype"] == "bfloat16" and summary["head"]["dtype"] == "float32"
        assert math.isfinite(summary["loss_first"]) and summary["mIoU"] is not None
        trained = summary["backbone"]["trainable"]
        assert trained == (summary["backbone"]["parameters"] if "full" in name else 0), name


def test_the_seed_pages_head_trains_as_written(finished):
    head = summary_of(finished / "seed_page_head")["head"]
    assert head == {"type": "FCNHead", "dtype": "float32", "parameters": 192 * 2 + 193 * 6, "replicas_identical": True}


@pytest.mark.skipif(not shutil.which("c++"), reason="DeepSpeed's CPU optimizer needs a C++ compiler (c++)")
def test_the_offload_variant_trains_and_averages(finished):
    summary = summary_of(finished / "offload")
    assert summary["steps"] == 2 and summary["loss_last"] < 3
    assert summary["ema"]["dtype"] == "float32" and summary["ema"]["heads_identical"]
