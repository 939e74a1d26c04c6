"""Trains one step of every large recipe at tiny width and evaluates it, from the shipped config files,
and a config of each of InternVL's folders.

Usage: recipes_worker.py OUT_FOLDER, with the datasets' folders in the environment
"""

import json
import os
import shutil
import sys
import time
from pathlib import Path
from unittest import mock

from ds_seg import distributed
from ds_seg.commands.train import train
from ds_seg.config import CONFIGS_ROOT, RunOptions, build_run_config, read_config_file

SEED_PAGE_HEAD = dict(type="FCNHead", in_channels=3200, channels=3200, num_convs=0, num_classes=150, with_norm=True)
WIDTH, CROP = 32, [56, 56]


def narrow(name):
    """Overrides that leave everything of a recipe but width, depth, length, batch and sizes."""
    model = read_config_file(CONFIGS_ROOT / "runs" / f"{name}.py", {}).model
    taps = len(model.backbone.out_indices)
    overrides = {
        "model.backbone.embed_dim": WIDTH,
        "model.backbone.num_heads": 2,
        "model.backbone.img_size": 56,
        "model.backbone.depth": max(taps, 2),
        "model.backbone.out_indices": list(range(taps)) if taps > 1 else [1],
        "model.test_cfg.crop_size": CROP,
        "model.test_cfg.stride": [42, 42],
        "data.train.pipeline.2.img_scale": (112, 56),
        "data.train.pipeline.3.crop_size": CROP,
        "data.train.pipeline.7.size": CROP,
        "data.val.pipeline.1.img_scale": (112, 56),
        "data.val.pipeline.1.transforms.0.min_size": 56,
        "data.workers_per_gpu": 0,
        "runner.max_iters": 1,
        "global_batch": 4,
        "load_from": None,
    }
    heads = ["decode_head"] + ["auxiliary_head"] * (model.get("auxiliary_head") is not None)
    for head in heads:
        several = not isinstance(model[head].in_channels, int)
        overrides[f"model.{head}.in_channels"] = [WIDTH] * taps if several else WIDTH
        overrides[f"model.{head}.channels"] = 8 if len(heads) > 1 else WIDTH
    return overrides


def main():
    out = Path(sys.argv[1])
    distributed.initialize()
    recipes, seconds = sorted(path.stem for path in (CONFIGS_ROOT / "runs").glob("internvit*.py")), {}
    for name in recipes:
        start = time.perf_counter()
        with mock.patch("ds_seg.tracking.report.write_report"):  # drawing takes twice as long as all the rest
            run(name, out / name, narrow(name))
        seconds[name] = time.perf_counter() - start
        shutil.rmtree(out / name / "checkpoints", ignore_errors=True)
    os.chdir(out / "internvl")
    for kind, path in json.loads((out / "internvl/configs.json").read_text()).items():
        run(path, out / kind, {"data.workers_per_gpu": 0})
    head = {f"model.decode_head.{key}": value for key, value in SEED_PAGE_HEAD.items()}
    head.update({"model.decode_head.in_channels": 192, "model.decode_head.channels": 192})
    head.update({"model.decode_head.num_classes": 6, "model.decode_head._delete_": True})
    run("demo", out / "seed_page_head", {"runner.max_iters": 1, **head})
    if shutil.which("c++"):  # DeepSpeed compiles its CPU optimizer when it is first used
        averages = {"custom_hooks": [dict(type="EMAHook")]}
        for name in ("offload", "offload_partly"):
            json_file = str(CONFIGS_ROOT / "deepspeed" / f"zero3_bf16_{name}.json")
            run("demo", out / name, {"runner.max_iters": 2, **averages}, deepspeed_config=json_file)
    if distributed.is_main():
        (out / "recipes.json").write_text(json.dumps(seconds))
    distributed.shutdown()


def run(name, work_dir, overrides, **options):
    options = RunOptions(name, work_dir=str(work_dir), cfg_options=overrides, **options)
    train(build_run_config(options, distributed.world_size()))


if __name__ == "__main__":
    main()
