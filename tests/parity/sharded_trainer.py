"""The same recipe under the two engines, on every rank of the world."""

from __future__ import annotations

import torch
from deepspeed.utils import safe_get_full_fp32_param

from ds_seg import distributed
from ds_seg.engine.ema import WeightAverages
from ds_seg.engine.engines import Engines
from ds_seg.engine.step import TwoEngineStep
from recipe import Recipe, make_micro_batches
from sharded import build_run, collect_weights, start

Training = dict[str, object]


def train_sharded(recipe: Recipe) -> Training:
    """Train on this rank's share: losses and norms of the steps made, first and final values, EMA.

    The last rank spoils its share of every bad step: the first time with an image that is not a number, then with
    a backbone gradient that overflows.
    """
    rank, world_size = distributed.rank(), distributed.world_size()
    run = build_run(recipe, world_size)
    engines = start(run)
    train_step = TwoEngineStep(engines, run)
    ema = WeightAverages(engines, run.ema) if run.ema else None
    initial = collect_weights(engines)
    results, skipped = [], []
    for step in range(recipe.steps):
        batches = make_micro_batches(recipe, step, rank, world_size)
        handles = []
        if step in recipe.bad_steps and rank == world_size - 1:
            handles = spoil(engines, batches, recipe.bad_steps.index(step))
        scheduled_steps = train_step.scheduled_steps
        result = train_step(step, batches)
        if ema and not result.skipped:
            ema.update(scheduled_steps)
        for handle in handles:
            handle.remove()
        (skipped if result.skipped else results).append(result)
    assert len(skipped) == len(recipe.bad_steps), f"{len(skipped)} steps were skipped"
    return {
        "losses": [result.losses["loss"] for result in results],
        "norms": [result.grad_norm for result in results],
        "factors": [result.clip_factor for result in results],
        "initial": initial,
        "final": collect_masters(engines),
        "averages": collect_averages(engines, ema),
    }


def collect_averages(engines: Engines, ema: WeightAverages | None) -> dict[str, torch.Tensor]:
    """What an evaluation would compute with; nothing without EMA."""
    if ema is None:
        return {}
    with ema.applied():
        return collect_weights(engines)


def spoil(engines: Engines, batches: list, which: int) -> list:
    if which % 2 == 0:
        batches[0].images_B3HW[0, 0, 0, 0] = float("nan")
        return []

    def overflow(_module: torch.nn.Module, args: tuple) -> None:
        args[0][-1].register_hook(lambda grad: grad * torch.finfo(grad.dtype).max)

    return [engines.heads.register_forward_pre_hook(overflow)]


def collect_masters(engines: Engines) -> dict[str, torch.Tensor]:
    """All values as the optimizers hold them: FP32, whatever the backbone computes in."""
    weights = collect_weights(engines)
    for name, parameter in engines.backbone.module.named_parameters():
        weights[f"backbone.{name}"] = safe_get_full_fp32_param(parameter).clone()
    return weights
