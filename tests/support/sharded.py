"""The tiny recipe under the two engines: what a worker process needs to train it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.zero import GatheredParameters

from ds_seg.config import RunConfig, RunOptions, build_run_config
from ds_seg.engine.engines import Engines
from ds_seg.session import build_engines
from recipe import CLASSES, DEPTH, HEADS, MICRO_BATCH, SIDE_PX, WIDTH, Recipe

ROOT = Path(__file__).resolve().parents[2]
SUB_GROUP_SIZE = 10_000
"""Where only a part is offloaded: several flat tensors a rank, also of four."""


def build_run(recipe: Recipe, world_size: int, work_dir: Path | None = None, **backbone: Any) -> RunConfig:
    """The recipe as ds_seg reads it: the demo's run with options, and more arguments of the backbone."""
    head = {"type": "FCNHead", "in_channels": WIDTH, "channels": WIDTH, "num_convs": 0, "with_norm": True}
    head |= {"num_classes": CLASSES, "dropout_ratio": 0.0}
    paramwise = {"decay_embeddings": recipe.decay_embeddings, "layer_decay_rate": recipe.layer_decay or 1.0}
    clip = {"max_norm": recipe.clip_norm} if recipe.clip_norm else None
    shape = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "img_size": SIDE_PX, "out_indices": [0, 1]}
    options: dict[str, Any] = {
        "model.backbone": {
            **shape,
            "drop_path_rate": recipe.drop_path,
            "checkpointing": recipe.checkpointing,
            **backbone,
        },
        "model.decode_head": {**head, "in_index": -1, "loss_decode": _loss(1.0, recipe.class_weights)},
        "data.samples_per_gpu": MICRO_BATCH // world_size,
        "global_batch": recipe.global_batch,
        "optimizer": {"lr": recipe.lr, "weight_decay": recipe.weight_decay, "paramwise_cfg": paramwise},
        "optimizer_config": {"grad_clip": clip},
        "lr_config": {"warmup_iters": recipe.warmup_steps, "warmup_ratio": recipe.warmup_ratio},
        "runner.max_iters": recipe.max_steps,
    }
    if recipe.auxiliary_weight:
        options["model.auxiliary_head"] = {**head, "in_index": 0, "loss_decode": _loss(recipe.auxiliary_weight, None)}
    if recipe.ema_momentum:
        options["custom_hooks"] = [{"type": "EMAHook", "momentum": recipe.ema_momentum}]
    precision = "bf16" if recipe.bf16 else "fp32"
    run_options = RunOptions(
        "demo",
        deepspeed_config=str(ROOT / f"ds_configs/deepspeed/zero3_{precision}.json"),
        work_dir=str(work_dir) if work_dir else None,
        cfg_options=options,
    )
    run = build_run_config(run_options, world_size)
    if recipe.fp32_accumulation:
        run = dataclasses.replace(run, deepspeed={**run.deepspeed, "data_types": {"grad_accum_dtype": "fp32"}})
    if recipe.offloaded:
        offload = {"device": "cpu", "ratio": recipe.offloaded}
        run = change_zero(run, offload_optimizer=offload, sub_group_size=SUB_GROUP_SIZE)
    return run


def change_zero(run: RunConfig, **values: Any) -> RunConfig:
    """The run with other values in DeepSpeed's `zero_optimization`."""
    zero = {**run.deepspeed["zero_optimization"], **values}
    return dataclasses.replace(run, deepspeed={**run.deepspeed, "zero_optimization": zero})


def change_saving(run: RunConfig, **values: Any) -> RunConfig:
    """The run with other settings of its checkpoints."""
    return dataclasses.replace(run, checkpoints=dataclasses.replace(run.checkpoints, **values))


def _loss(weight: float, class_weights: tuple[float, ...] | None) -> dict[str, Any]:
    class_weight = list(class_weights) if class_weights else None
    return {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": weight, "class_weight": class_weight}


def start(run: RunConfig) -> Engines:
    """Both engines on random weights of the run's seed."""
    return build_engines(run, training=True, weights=None, log=lambda _line: None)


@torch.no_grad()
def collect_weights(engines: Engines) -> dict[str, torch.Tensor]:
    """All parameters and buffers under their full names, in their own dtypes, on every rank."""
    weights = {name: tensor.clone() for name, tensor in engines.heads.state_dict().items()}
    for name, parameter in engines.backbone.module.named_parameters():
        with GatheredParameters([parameter]):
            weights[f"backbone.{name}"] = parameter.detach().clone()
    return weights
