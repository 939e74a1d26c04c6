"""The tiny run, model and data that engine_worker.py trains and plain_training.py repeats without any engine."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

import torch
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

from ds_seg import distributed
from ds_seg.config import RunConfig, RunOptions, build_run_config
from ds_seg.data.loader import MicroBatch
from ds_seg.engine.engines import Engines
from ds_seg.engine.step import StepResult, TwoEngineStep
from ds_seg.session import build_engines

SIDE, CLASSES, IGNORED = 56, 6, 255
WIDTH, DEPTH = 84, 2  # ZeRO-3 shards the large matrices of this width and keeps what has under 20,000 values whole
GLOBAL_BATCH, ACCUMULATION, STEPS = 8, 2, 20
CLIP_NORM, LAYER_DECAY, WEIGHT_DECAY, LR = 0.25, 0.6, 0.05, 3e-3
AUX_WEIGHT, WARMUP_STEPS, WARMUP_RATIO, DROP_PATH = 0.4, 5, 0.1, 0.3
_HEAD = {"type": "FCNHead", "in_channels": WIDTH, "channels": WIDTH, "num_convs": 0, "with_norm": True}
_HEAD |= {"num_classes": CLASSES, "dropout_ratio": 0.0}
DEEPSPEED_JSON = {"fp32": "ds_configs/deepspeed/zero3_fp32.json", "bf16": "ds_configs/deepspeed/zero3_bf16.json"}
ROOT = Path(__file__).resolve().parents[2]


def make_run(precision: str, work_dir: Path | None = None, **backbone) -> RunConfig:
    """The demo's run at tiny width: layer decay, warm-up, clipping, accumulation, drop path, auxiliary head."""
    world = distributed.world_size()
    options = {
        "model.backbone": {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": 2, "img_size": SIDE, "out_indices": [0, 1]},
        "model.decode_head": {"in_channels": WIDTH, "channels": WIDTH, "in_index": -1},
        "model.auxiliary_head": _HEAD | {"in_index": 0, "loss_decode": _make_loss(AUX_WEIGHT)},
        "data.samples_per_gpu": GLOBAL_BATCH // ACCUMULATION // world,
        "global_batch": GLOBAL_BATCH,
        "optimizer": {"lr": LR, "weight_decay": WEIGHT_DECAY},
        "optimizer.paramwise_cfg.layer_decay_rate": LAYER_DECAY,
        "optimizer_config.grad_clip.max_norm": CLIP_NORM,
        "lr_config": {"warmup_iters": WARMUP_STEPS, "warmup_ratio": WARMUP_RATIO},
        "runner.max_iters": 3 * STEPS // 2,
    }
    options["model.backbone"] |= {"drop_path_rate": DROP_PATH, **backbone}
    run_options = RunOptions(
        "demo",
        deepspeed_config=str(ROOT / DEEPSPEED_JSON[precision]),
        work_dir=str(work_dir) if work_dir else None,
        cfg_options=options,
    )
    return build_run_config(run_options, world)


def _make_loss(weight: float) -> dict:
    return {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": weight}


def make_sample(position: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Image and label at a position of the global stream.

    A tenth of the pixels is ignored, and in every other pair of steps eight tenths: that makes gradients small.
    """
    generator = torch.Generator().manual_seed(position)
    image_3HW = torch.randn(3, SIDE, SIDE, generator=generator)
    coarse_1hw = torch.nn.functional.avg_pool2d(image_3HW.mean(0, keepdim=True), 7)
    label_1hw = (coarse_1hw * 12 + CLASSES / 2).clamp(0, CLASSES - 1).long()
    label_1HW = label_1hw.repeat_interleave(7, 1).repeat_interleave(7, 2)
    ignored = 0.8 if position // (2 * GLOBAL_BATCH) % 2 else 0.1
    label_1HW[torch.rand(1, SIDE, SIDE, generator=generator) < ignored] = IGNORED
    return image_3HW, label_1HW


def make_micro_batch(positions: range) -> MicroBatch:
    images, labels = zip(*map(make_sample, positions), strict=True)
    return MicroBatch(torch.stack(images), torch.stack(labels), list(positions), [{}] * len(positions))


def make_micro_batches(run: RunConfig, step: int) -> list[MicroBatch]:
    """This rank's share of global batch `step`: micro-batch after micro-batch, within each rank after rank."""
    world, rank, size = run.world_size, distributed.rank(), run.micro_batch
    starts = [((step * run.accumulation_steps + a) * world + rank) * size for a in range(run.accumulation_steps)]
    return [make_micro_batch(range(start, start + size)) for start in starts]


def start(run: RunConfig) -> tuple[Engines, TwoEngineStep]:
    engines = build_engines(run, training=True, weights=None, log=lambda _line: None)
    return engines, TwoEngineStep(engines, run)


def train(train_step: TwoEngineStep, steps: range) -> list[StepResult]:
    return [train_step(step, make_micro_batches(train_step.run, step)) for step in steps]


@torch.no_grad()
def collect_weights(engines: Engines) -> dict[str, torch.Tensor]:
    """All parameters and buffers under their full names, in their own dtypes, on every rank."""
    weights = {name: tensor.clone() for name, tensor in engines.heads.state_dict().items()}
    for name, parameter in engines.backbone.module.named_parameters():
        with GatheredParameters([parameter]):
            weights[f"backbone.{name}"] = parameter.detach().clone()
    return weights


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
