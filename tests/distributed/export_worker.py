"""One rank of test_export_distributed.py: trains two steps of tiny runs and saves checkpoints to be exported.

Usage: export_worker.py OUTPUT_FOLDER
"""

from __future__ import annotations

import dataclasses
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
from engine_setup import collect_weights, make_micro_batches, make_run, start

CASES = {
    "bf16": ("bf16", {}),
    "averaged": ("fp32", {}),
    "partly_frozen": ("bf16", {"freeze_vit": True, "unfreeze_pos_embed": True}),
    "frozen": ("bf16", {"freeze_vit": True}),
}
SUB_GROUP_SIZE = 30_000  # several flat tensors a rank


def make_case(name: str, out: Path) -> RunConfig:
    """The run of a case; the same model for any world size."""
    precision, backbone = CASES[name]
    run = make_run(precision, out / name, **backbone)
    zero = {**run.deepspeed["zero_optimization"], "sub_group_size": SUB_GROUP_SIZE}
    return dataclasses.replace(run, deepspeed={**run.deepspeed, "zero_optimization": zero})


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
        run = make_case(name, out)
        engines, train_step = start(run)
        ema = WeightAverages(engines, EmaSettings(0.4, 1, 10)) if name == "averaged" else None
        for step in range(2):
            train_step(step, make_micro_batches(run, step))
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
