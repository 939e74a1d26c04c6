"""The same recipe under the two engines, on every rank of the world."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param

from ds_seg import distributed
from ds_seg.checkpoint import TrainingState, resume_training, save_checkpoint
from ds_seg.engine.ema import WeightAverages
from ds_seg.engine.engines import Engines
from ds_seg.engine.step import TwoEngineStep
from recipe import Recipe, make_micro_batches
from sharded import build_run, change_zero, collect_weights, start

Training = dict[str, object]


def train_sharded(recipe: Recipe) -> Training:
    """Train on this rank's share: losses and norms of the steps made, first and final values, EMA."""
    trainer = ShardedTrainer(recipe)
    trainer.train(recipe.steps)
    return trainer.report()


class ShardedTrainer:
    """Trains one recipe from any step to any other.

    The last rank spoils its share of every bad step: the first time with an image that is not a number, then with
    a backbone gradient that overflows.

    Args:
        recipe: what is trained.
        work_dir: where checkpoints go.
        zero: fields of DeepSpeed's `zero_optimization`.
    """

    def __init__(self, recipe: Recipe, work_dir: Path | None = None, **zero: Any) -> None:
        self.recipe = recipe
        self.run = change_zero(build_run(recipe, distributed.world_size(), work_dir), **zero)
        self.engines = start(self.run)
        self.train_step = TwoEngineStep(self.engines, self.run)
        self.ema = WeightAverages(self.engines, self.run.ema) if self.run.ema else None
        self.state = TrainingState()
        self.initial = collect_weights(self.engines)
        self.results = []

    def train(self, stop: int) -> None:
        """Train up to step `stop`."""
        rank, world_size = distributed.rank(), distributed.world_size()
        for step in range(self.state.step, stop):
            batches = make_micro_batches(self.recipe, step, rank, world_size)
            handles, bad = [], step in self.recipe.bad_steps
            if bad and rank == world_size - 1:
                handles = spoil(self.engines, batches, self.recipe.bad_steps.index(step))
            result = self.train_step(step, batches, scheduled_steps=self.state.scheduled_steps)
            assert result.skipped == bad, f"step {step} was {'' if result.skipped else 'not '}skipped"
            if self.ema and not bad:
                self.ema.update(self.state.scheduled_steps)
            for handle in handles:
                handle.remove()
            if not bad:
                self.results.append(result)
            self.state.step, self.state.skipped_steps = step + 1, self.state.skipped_steps + bad
            self.state.scheduled_steps += not bad

    def save(self) -> Path:
        """A checkpoint of what was trained so far."""
        return save_checkpoint(self.engines, self.run, self.state, self.ema)

    def resume(self, folder: Path) -> None:
        """Go on from a checkpoint of any world size."""
        self.state = resume_training(folder, self.engines, self.run, self.ema)

    def report(self) -> Training:
        """Of the steps made so far."""
        return {
            "losses": [result.losses["loss"] for result in self.results],
            "norms": [result.grad_norm for result in self.results],
            "factors": [result.clip_factor for result in self.results],
            "initial": self.initial,
            "final": collect_masters(self.engines),
            "averages": collect_averages(self.engines, self.ema),
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
