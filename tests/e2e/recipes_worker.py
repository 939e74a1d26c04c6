"""Trains one step of every large recipe at tiny width and evaluates it, from the shipped config files.

Started by torchrun: recipes_worker.py DATA_ROOT OUT_FOLDER
"""

import json
import os
import shutil
import sys
from pathlib import Path

from ds_seg import distributed
from ds_seg.commands.train import train
from ds_seg.config import CONFIGS_ROOT, RunOptions, build_run_config

SEED_PAGE_HEAD = dict(type="FCNHead", in_channels=3200, channels=3200, num_convs=0, num_classes=150, with_norm=True)


def narrow(depth, taps):
    """Overrides that leave everything of a recipe but width, depth, length and batch."""
    return {
        "model.backbone.embed_dim": 32,
        "model.backbone.num_heads": 2,
        "model.backbone.depth": depth,
        "model.backbone.out_indices": taps,
        "model.decode_head.in_channels": 32,
        "model.decode_head.channels": 32,
        "runner.max_iters": 1,
        "global_batch": 4,
        "load_from": None,
        "data.workers_per_gpu": 1,
    }


def main():
    data_root, out = Path(sys.argv[1]), Path(sys.argv[2])
    os.environ["ADE20K_ROOT"] = os.environ["DS_SEG_DEMO_ROOT"] = str(data_root)
    distributed.initialize()
    recipes = sorted(path.stem for path in (CONFIGS_ROOT / "runs").glob("internvit*.py"))
    for name in recipes:
        run(name, out / name, narrow(2, [1]))
    head = {f"model.decode_head.{key}": value for key, value in SEED_PAGE_HEAD.items()}
    head.update({"model.decode_head.in_channels": 192, "model.decode_head.channels": 192})
    head.update({"model.decode_head.num_classes": 6, "model.decode_head._delete_": True})
    run("demo", out / "seed_page_head", {"runner.max_iters": 1, **head})
    if shutil.which("c++"):  # DeepSpeed compiles its CPU optimizer when it is first used
        offload = str(CONFIGS_ROOT / "deepspeed" / "zero3_bf16_offload.json")
        averages = {"custom_hooks": [dict(type="EMAHook")]}
        run("demo", out / "offload", {"runner.max_iters": 2, **averages}, deepspeed_config=offload)
    if distributed.is_main():
        (out / "recipes.json").write_text(json.dumps(recipes))
    distributed.shutdown()


def run(name, work_dir, overrides, **options):
    options = RunOptions(name, work_dir=str(work_dir), cfg_options=overrides, **options)
    train(build_run_config(options, distributed.world_size()))


if __name__ == "__main__":
    main()
