"""One rank of test_export_distributed.py: trains two steps of tiny runs and saves checkpoints to be exported.

Usage: export_worker.py OUTPUT_FOLDER
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import torch
from deepspeed.utils import safe_get_full_fp32_param

from ds_seg import distributed
from ds_seg.checkpoint import TrainingState, save_checkpoint
from ds_seg.config import EmaSettings, RunConfig
from ds_seg.engine.ema import WeightAverages
from ds_seg.engine.engines import Engines
from ds_seg.engine.step import TwoEngineStep
from recipe import Recipe, make_micro_batches
from sharded import build_run, change_zero, collect_weights, start

CASES = {
    "bf16": {},
    "averaged": {},
    "partly_frozen": {"freeze_vit": True, "unfreeze_pos_embed": True},
    "frozen": {"freeze_vit": True},
}
SUB_GROUP_SIZE = 30_000  # several flat tensors a rank


def make_case(name: str, recipe: Recipe, out: Path) -> RunConfig:
    run = build_run(recipe, distributed.world_size(), out / name, **CASES[name])
    return change_zero(run, sub_group_size=SUB_GROUP_SIZE)


def collect(engines: Engines, ema: WeightAverages | None) -> dict[str, torch.Tensor]:
    """What an export must hold: averages, else FP32 masters, else what is frozen, and the heads' state."""
    weights = collect_weights(engines)
    for name, parameter in engines.backbone.module.named_parameters():
        if parameter.requires_grad and engines.trainable_backbone:
            weights[f"backbone.{name}"] = safe_get_full_fp32_param(parameter).clone()
    if ema is not None:
        with ema.applied():
            weights |= collect_weights(engines)
    return weights


def main() -> None:
    distributed.initialize()
    out = Path(sys.argv[1])
    for name in CASES:
        recipe = Recipe(bf16=name != "averaged", auxiliary_weight=0.4)
        run = make_case(name, recipe, out)
        engines = start(run)
        train_step = TwoEngineStep(engines, run)
        ema = WeightAverages(engines, EmaSettings(0.4, 1, 10)) if name == "averaged" else None
        for step in range(2):
            batches = make_micro_batches(recipe, step, distributed.rank(), distributed.world_size())
            train_step(step, batches, scheduled_steps=step)
            if ema is not None:
                ema.update(step)
        weights = collect(engines, ema)
        save_checkpoint(engines, run, TrainingState(step=2), ema)
        if distributed.is_main():
            torch.save(weights, out / name / "weights.pt")
            (out / name / "run.pickle").write_bytes(pickle.dumps(run))
    distributed.shutdown()


if __name__ == "__main__":
    main()
