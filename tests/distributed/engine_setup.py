"""The tiny run that engine_worker.py trains, skips, saves and resumes."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

import recipe
from ds_seg import distributed
from ds_seg.config import RunConfig
from ds_seg.data.training_batches import MicroBatch
from ds_seg.engine.engines import Engines
from ds_seg.engine.step import StepResult, TwoEngineStep
from recipe import Recipe
from sharded import build_run, collect_weights
from sharded import start as start_engines

RECIPE = Recipe(
    accumulation=2,
    layer_decay=0.6,
    weight_decay=0.05,
    clip_norm=0.25,
    auxiliary_weight=0.4,
    ignored_pixels=True,
    checkpointing="block",
)


def make_run(precision: str, work_dir: Path | None = None, **backbone: Any) -> RunConfig:
    """Layer decay, warm-up, clipping, accumulation, drop path, auxiliary head."""
    return build_run(RECIPE.replace(bf16=precision == "bf16"), distributed.world_size(), work_dir, **backbone)


def make_micro_batches(step: int) -> list[MicroBatch]:
    """This rank's share of global batch `step`."""
    return recipe.make_micro_batches(RECIPE, step, distributed.rank(), distributed.world_size())


class CountingStep(TwoEngineStep):
    """Steps that keep their own count of those that were not skipped, in the place of a run's state."""

    scheduled_steps = 0

    def __call__(self, step: int, micro_batches: list[MicroBatch]) -> StepResult:
        result = super().__call__(step, micro_batches, scheduled_steps=self.scheduled_steps)
        self.scheduled_steps += not result.skipped
        return result


def start(run: RunConfig) -> tuple[Engines, CountingStep]:
    engines = start_engines(run)
    return engines, CountingStep(engines, run)


def train(train_step: CountingStep, steps: range) -> list[StepResult]:
    return [train_step(step, make_micro_batches(step)) for step in steps]


def digest(engines: Engines) -> str:
    """A hash over everything that a step may move: weights, FP32 masters, buffers and optimizer states."""
    tensors = list(collect_weights(engines).values())
    for parameter in engines.trainable_backbone:
        tensors.append(safe_get_full_fp32_param(parameter))
        for key in ("exp_avg", "exp_avg_sq"):
            with contextlib.suppress(KeyError):  # before the first step there is none
                tensors.append(safe_get_full_optimizer_state(parameter, key))
    for state in engines.head_optimizer.state_dict()["state"].values():
        tensors += [torch.as_tensor(value) for _, value in sorted(state.items())]
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
