"""One rank of test_guard_distributed.py: what the precision guard refuses, and the rates that one group applies.

Usage: guard_worker.py OUTPUT_FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from checks import run_checks
from ds_seg import distributed
from ds_seg.checkpoint import TrainingState, resume_training, save_checkpoint
from ds_seg.config import OptimizerSettings, RunConfig
from ds_seg.engine.adamw import build_adamw
from ds_seg.engine.engines import Engines
from ds_seg.errors import PrecisionError
from engine_setup import CountingStep, digest, make_run, start, train
from recipe import WIDTH
from sharded import change_zero, collect_weights

OUT = Path(sys.argv[1])


def catch(function: Any, *args: Any) -> str:
    try:
        function(*args)
    except PrecisionError as error:
        return str(error)
    return "no error"


def cast_parameter(engines: Engines) -> torch.Tensor:
    return engines.heads.decode_head.conv_seg.weight


def cast_statistic(engines: Engines) -> torch.Tensor:
    return engines.heads.decode_head.norm.running_var


def cast_moment(engines: Engines) -> torch.Tensor:
    return engines.head_optimizer.state[engines.heads.decode_head.conv_seg.bias]["exp_avg"]


def cast_shard(engines: Engines) -> torch.Tensor:
    return engines.backbone.module.blocks[1].attn.qkv.weight.ds_tensor


def cast_backbone(engines: Engines) -> torch.Tensor:
    return engines.backbone.module.cls_token


def cast_master(engines: Engines) -> torch.Tensor:
    return next(iter(engines.backbone.basic_optimizer.state))


def cast_backbone_moment(engines: Engines) -> torch.Tensor:
    return next(iter(engines.backbone.basic_optimizer.state.values()))["exp_avg_sq"]


CASTS = (cast_parameter, cast_statistic, cast_moment, cast_shard, cast_backbone, cast_master, cast_backbone_moment)


def check_precision_guard() -> dict:
    """Each tensor cast behind our back, on the last rank only: nothing is saved, and all ranks say why."""
    run = make_run("bf16", OUT / f"guard_world{distributed.world_size()}")
    engines, train_step = start(run)
    train(train_step, range(1))
    report = {}
    for find in CASTS:
        tensor = find(engines)
        whole = tensor.data
        if distributed.rank() == distributed.world_size() - 1:
            tensor.data = whole.to(torch.float16)
        report[find.__name__] = catch(save_checkpoint, engines, run, TrainingState(step=1))
        tensor.data = whole
    report["nothing_saved"] = not (run.work_dir / "checkpoints").exists()
    report["right"] = catch(save_checkpoint, engines, run, TrainingState(step=1))
    return report | cast_start_and_gradient(run, engines, train_step)


def cast_start_and_gradient(run: RunConfig, engines: Engines, train_step: CountingStep) -> dict:
    """The same guard when engines are built, after a resume, and on the heads' gradients in a step."""

    def build_cast(*args: Any, **kwargs: Any) -> Engines:
        built = Engines(*args, **kwargs)
        built.heads.decode_head.norm.running_mean.data = torch.zeros(WIDTH, dtype=torch.bfloat16)
        return built

    with mock.patch("ds_seg.session.Engines", build_cast):
        report = {"at_start": catch(start, run)}
    weight = engines.heads.decode_head.conv_seg.weight
    whole, weight.data = weight.data, weight.data.bfloat16()
    folder = run.work_dir / "checkpoints" / "step_000001"
    report["after_resume"] = catch(resume_training, folder, engines, run)
    weight.data = whole
    weight.grad_dtype = torch.bfloat16
    before = collect_weights(engines)
    report["gradient"] = catch(train, train_step, range(1, 2))
    moved = [name for name, tensor in collect_weights(engines).items() if not torch.equal(tensor, before[name])]
    return report | {"stepped": [name for name in moved if ".norm." not in name]}  # the forward moves BatchNorm


def check_rate_groups() -> dict:
    """The bits of a DeepSpeed group for each rate, against ours: one group, cut by rate, in several sub-groups."""
    run = change_zero(make_run("bf16"), sub_group_size=30_000)
    engines, train_step = start(run)
    losses = [result.losses for result in train(train_step, range(4))]

    def build_plain(groups: list, settings: OptimizerSettings, *, offloaded: bool) -> torch.optim.Optimizer:
        assert not offloaded
        return build_adamw(groups, settings)

    every_group = property(lambda self: [*self.backbone.optimizer.param_groups, *self.head_optimizer.param_groups])
    with (
        mock.patch("ds_seg.engine.engines.build_backbone_adamw", build_plain),
        mock.patch.object(Engines, "param_groups", every_group),
    ):
        plain, plain_step = start(run)
        plain_losses = [result.losses for result in train(plain_step, range(4))]
        shown = [[group[key] for key in ("lr", "names")] for group in plain.param_groups]
    return {
        "same_losses": losses == plain_losses,
        "same_bits": digest(engines) == digest(plain),
        "same_groups": shown == [[group[key] for key in ("lr", "names")] for group in engines.param_groups],
        "groups": [len(built.backbone.optimizer.param_groups) for built in (engines, plain)],
        "sub_groups": [len(built.backbone.optimizer.fp16_groups) for built in (engines, plain)],
        "rates": len({group["lr"] for group in engines.param_groups}),
    }


if __name__ == "__main__":
    run_checks(globals())
