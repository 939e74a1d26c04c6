"""The shipped recipes can't rot: each is built from its own file, at tiny width, trained and evaluated."""

import json
import math
import shutil
from pathlib import Path

import pytest

from dataset_layouts import write_layouts
from ds_seg.config import CONFIGS_ROOT
from internvl_folder import NAMES, write_internvl_folder
from ranks import run_ranks


@pytest.fixture(scope="module")
def finished(tmp_path_factory, scenes):
    """Work dirs of all recipes, from one start of two processes."""
    out = tmp_path_factory.mktemp("recipes")
    roots = write_layouts(scenes, out / "data", train_images=4, val_images=2)
    configs = write_internvl_folder(out / "internvl", scenes)
    (out / "internvl/configs.json").write_text(json.dumps({kind: str(path) for kind, path in configs.items()}))
    worker = Path(__file__).with_name("recipes_worker.py")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**roots, "WANDB_MODE": "disabled"}.items():
            patch.setenv(name, value)
        run_ranks(worker, 2, out, timeout_s=500)
    return out


def summary_of(work_dir):
    return json.loads((work_dir / "summary.json").read_text())


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIGS_ROOT / "runs").glob("internvit*.py")))
def test_each_recipe_trains_a_step_and_evaluates(finished, name):
    summary = summary_of(finished / name)
    assert summary["status"] == "completed" and summary["zero_stage"] == 3 and summary["world_size"] == 2
    assert summary["backbone"]["dtype"] == "bfloat16" and summary["head"]["dtype"] == "float32"
    assert math.isfinite(summary["loss_first"]) and summary["mIoU"] is not None
    trained, total = summary["backbone"]["trainable"], summary["backbone"]["parameters"]
    pyramid = 3 * (4 * 32 * 32 + 32) + 2 * 32  # three transposed convolutions and a norm, which no freezing touches
    frozen = pyramid if "upernet" in name else 0
    assert trained == (total if "full" in name else frozen)
    assert summary["head"]["type"] == ("UPerHead" if "upernet" in name else "FCNHead")


@pytest.mark.parametrize("kind", NAMES)
def test_a_config_of_each_of_internvls_folders_trains_and_evaluates_as_it_is(finished, kind):
    summary = summary_of(finished / kind)
    assert summary["status"] == "completed" and summary["steps"] == 2 and summary["mIoU"] is not None
    assert (summary["backbone"]["trainable"] == summary["backbone"]["parameters"]) == (
        kind in ("full_tuning", "few_shot")
    )
    assert summary["head"]["type"] == ("UPerHead" if "upernet" in NAMES[kind] else "FCNHead")


def test_the_seed_pages_head_trains_as_written(finished):
    head = summary_of(finished / "seed_page_head")["head"]
    assert head == {"type": "FCNHead", "dtype": "float32", "parameters": 192 * 2 + 193 * 6, "replicas_identical": True}


@pytest.mark.skipif(not shutil.which("c++"), reason="DeepSpeed's CPU optimizer needs a C++ compiler (c++)")
@pytest.mark.parametrize("variant", ["offload", "offload_partly"])
def test_the_offload_variants_train_and_average(finished, variant):
    summary = summary_of(finished / variant)
    assert summary["steps"] == 2 and summary["loss_last"] < 3
    assert summary["ema"]["dtype"] == "float32" and summary["ema"]["heads_identical"]
