"""The summary of a run, measured on the live engines and never copied from the config."""

from __future__ import annotations

import dataclasses
import hashlib
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import nn

from ds_seg import distributed
from ds_seg.checkpoint import TrainingState
from ds_seg.config import RunConfig
from ds_seg.engine.ema import WeightAverages
from ds_seg.engine.engines import Engines
from ds_seg.loop import LoopRecord, memory_gib
from ds_seg.tracking.metrics_log import read_metrics


def measure_summary(
    run: RunConfig,
    engines: Engines,
    state: TrainingState,
    record: LoopRecord,
    resumed_from: Path | None,
    ema: WeightAverages | None = None,
) -> dict[str, Any]:
    """Every field of summary.json; a collective over all ranks.

    Args:
        run: the run.
        engines: both engines as they are at the end.
        state: where the run stands.
        record: step times and the last evaluation of the loop.
        resumed_from: the checkpoint the run went on from.
        ema: averages of the weights; where there are some, the last evaluation was made on them.
    """
    peaks = distributed.gather_objects(memory_gib())
    rows = (
        [row for row in read_metrics(run.work_dir / "metrics.jsonl") if "loss" in row] if distributed.is_main() else []
    )
    result = record.evaluation
    scores = result.metrics() if result else {}
    times = record.step_times_s[1:] or record.step_times_s  # the first step also allocates and compiles
    median = statistics.median(times) if times else None
    return {
        "status": "stopped" if record.stopped else "completed",
        "steps": state.step,
        "world_size": torch.distributed.get_world_size(),
        "global_batch": run.global_batch,
        "zero_stage": int(engines.backbone.zero_optimization_stage()),
        "backbone": describe_backbone(engines.backbone.module),
        "head": describe_heads(engines.heads),
        "ema": describe_averages(ema) if ema is not None else None,
        "loss_first": rows[0]["loss"] if rows else None,
        "loss_last": rows[-1]["loss"] if rows else None,
        "mIoU": scores.get("eval/mIoU"),
        "mAcc": scores.get("eval/mAcc"),
        "aAcc": scores.get("eval/aAcc"),
        "IoU": {name.removeprefix("eval/IoU/"): iou for name, iou in scores.items() if name.startswith("eval/IoU/")},
        "images_per_s": run.global_batch / median if median else None,
        "step_time_s": {"median": median, "p95": compute_p95(times) if times else None},
        "data_wait_share": record.data_wait_share,
        "peak_memory_gib_per_rank": peaks,
        "skipped_steps": state.skipped_steps,
        "rollbacks": [dataclasses.asdict(rollback) for rollback in state.rollbacks],
        "left_out_batches": state.left_out,
        "bad_samples": [dataclasses.asdict(bad) for bad in state.bad_samples],
        "resumed_from": str(resumed_from) if resumed_from else None,
    }


def describe_backbone(backbone: nn.Module) -> dict[str, Any]:
    """Type, precision and size of the backbone, and how much of it each rank holds now; a collective."""
    parameters = list(backbone.parameters())
    return {
        "type": type(backbone).__name__,
        "dtype": name_dtypes(parameters),
        "parameters": sum(p.ds_numel for p in parameters),
        "trainable": sum(p.ds_numel for p in parameters if p.requires_grad),
        "parameters_held_per_rank": distributed.gather_objects(sum(count_held(p) for p in parameters)),
    }


def describe_heads(heads: nn.Module) -> dict[str, Any]:
    """Type, precision and size of the heads, and whether all ranks hold the same bits; a collective."""
    tensors = [tensor for tensor in heads.state_dict().values() if tensor.is_floating_point()]
    return {
        "type": type(heads.decode_head).__name__,
        "dtype": name_dtypes(tensors),
        "parameters": sum(p.numel() for p in heads.parameters()),
        "replicas_identical": are_identical(heads.state_dict()),
    }


def describe_averages(ema: WeightAverages) -> dict[str, Any]:
    """Precision and size of the averages, and whether all ranks hold the same bits of the heads'; a collective."""
    averages = [*ema.backbone.values(), *ema.heads.values()]
    return {
        "dtype": name_dtypes(averages),
        "values_held_per_rank": distributed.gather_objects(sum(average.numel() for average in averages)),
        "heads_identical": are_identical(ema.heads),
    }


def count_held(parameter: nn.Parameter) -> int:
    """Elements of a ZeRO-3 parameter in this rank's memory: all while it is gathered, else its shard."""
    gathered = parameter.ds_status == ZeroParamStatus.AVAILABLE
    return parameter.ds_numel if gathered else parameter.ds_tensor.numel()


def name_dtypes(tensors: list[Any]) -> str:
    """The dtype that all tensors have, such as `bfloat16`, or every one that occurs."""
    return ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))


def are_identical(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether all ranks hold the same bits; a collective."""
    return len(set(distributed.gather_objects(digest(tensors)))) == 1


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """A hash over the names and bits of tensors."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(name.encode())
        total.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def compute_p95(values: list[float]) -> float:
    """The 95th percentile, of one value that value itself."""
    return statistics.quantiles(values, n=20, method="inclusive")[-1] if len(values) > 1 else values[0]
