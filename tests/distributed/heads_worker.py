"""One of two ranks of test_heads_and_losses.py: every head and every loss trains under both engines.

Usage: heads_worker.py OUTPUT_FOLDER
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ds_seg import distributed
from ds_seg.config import RunConfig
from ds_seg.engine.engines import Engines
from ds_seg.engine.step import TwoEngineStep
from ds_seg.errors import ConfigError
from ds_seg.models import FCNHead
from ds_seg.session import build_engines
from ds_seg.summary import describe_heads
from heads_cases import CASES, LOSSES, PATCH, loss_case, make_batches, make_run

from mmcv.ops import sigmoid_focal_loss  # isort: skip
from mmseg.models.builder import HEADS, LOSSES as LOSS_REGISTRY  # isort: skip
from mmseg.ops import resize  # isort: skip

OUT = Path(sys.argv[1])


@HEADS.register_module()
class HeadWithSpareLayer(FCNHead):
    """A head with a layer that its output does not depend on."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.spare = nn.Conv2d(4, 4, 1)


@LOSS_REGISTRY.register_module()
class OperatorLoss(nn.Module):
    """The focal loss that MMSegmentation takes on GPUs: mmcv's operator."""

    loss_name = "loss_operator"

    def forward(self, pred, target, **_):
        return sigmoid_focal_loss(pred.flatten(2).mean(2), target.flatten(1)[:, 0] % 5, 2.0, 0.25, None, "mean")


def start(run: RunConfig) -> tuple[Engines, TwoEngineStep, list[str]]:
    lines: list[str] = []
    engines = build_engines(run, training=True, weights=None, log=lines.append)
    return engines, TwoEngineStep(engines, run), lines


def check_head(case: dict) -> dict:
    """Two steps: a parameter behind a gate that starts at zero moves in the second only."""
    started = time.perf_counter()
    run = make_run(case)
    engines, train_step, lines = start(run)
    before = {name: parameter.detach().clone() for name, parameter in engines.heads.named_parameters()}
    dtypes = set()
    engines.head_optimizer.register_step_pre_hook(
        lambda *_: dtypes.update(str(p.grad.dtype) for p in engines.heads.parameters() if p.grad is not None)
    )
    results = [
        train_step(step, make_batches(run, distributed.rank(), seed=step), scheduled_steps=step) for step in range(2)
    ]
    dtypes |= {str(tensor.dtype) for tensor in engines.heads.state_dict().values() if tensor.is_floating_point()}
    engines.train(False)
    grid = run.train_crop_px[0] // PATCH
    logits_BKHW = engines.encode_decode(make_batches(run, 0)[0].images_B3HW)
    logits_BKhw = engines.heads.logits([m.float() for m in engines.backbone(torch.zeros(1, 3, 4 * grid, 4 * grid))])
    return {
        "entries": sorted(results[0].losses),
        "finite": all(torch.isfinite(torch.tensor(list(result.losses.values()))).all().item() for result in results),
        "skipped": [result.skipped for result in results],
        "grad_norm": results[0].grad_norm,
        "unmoved": [name for name, p in engines.heads.named_parameters() if torch.equal(p, before[name])],
        "dtypes": sorted(dtypes),
        "identical": describe_heads(engines.heads)["replicas_identical"],
        "logits": [list(logits_BKHW.shape), str(logits_BKHW.dtype), torch.isfinite(logits_BKHW).all().item()],
        "own_logits": [logits_BKhw.dim(), logits_BKhw.shape[1], str(logits_BKhw.dtype)],
        "find_unused": engines.heads_ddp.find_unused_parameters,
        "log": lines,
        "seconds": time.perf_counter() - started,
    }


def compute_by_hand(engines: Engines, batches: list) -> list[dict[str, float]]:
    """Each entry of each micro-batch on this rank, from MMSegmentation's loss modules and the engines' logits."""
    head = engines.heads.decode_head
    by_hand = []
    for batch in batches:
        with torch.no_grad():
            features = [feature.float() for feature in engines.backbone(batch.images_B3HW.to(torch.bfloat16))]
            logits_BKhw = head.forward(features)
            size = batch.labels_B1HW.shape[2:]
            logits_BKHW = resize(logits_BKhw, size=size, mode="bilinear", align_corners=head.align_corners)
            labels_BHW = batch.labels_B1HW[:, 0]
            weight = head.sampler.sample(logits_BKHW, batch.labels_B1HW) if head.sampler else None
            modules = head.loss_decode if isinstance(head.loss_decode, nn.ModuleList) else [head.loss_decode]
            entries: dict[str, float] = {}
            for module in modules:
                value = module(logits_BKHW, labels_BHW, weight=weight, ignore_index=255).mean().item()
                entries[module.loss_name] = entries.get(module.loss_name, 0.0) + value
            by_hand.append(entries)
    return by_hand


def check_loss(name: str) -> dict:
    started = time.perf_counter()
    run = make_run(loss_case(name))
    engines, train_step, _ = start(run)
    batches = make_batches(run, distributed.rank())
    engines.train()
    with torch.no_grad():  # logits that differ enough for OHEM to choose and for each micro-batch's loss to be its own
        engines.heads.decode_head.conv_seg.weight.mul_(300)
    by_hand = distributed.gather_objects(compute_by_hand(engines, batches))
    before = [p.detach().clone() for p in engines.heads.parameters()]
    result = train_step(0, batches, scheduled_steps=0)
    moved = not any(torch.equal(p, old) for p, old in zip(engines.heads.parameters(), before, strict=True))
    ignored = train_step(1, make_batches(run, distributed.rank(), seed=1, all_ignored_on=1), scheduled_steps=1)
    after = train_step(2, make_batches(run, distributed.rank(), seed=2), scheduled_steps=2)
    return {
        "seconds": time.perf_counter() - started,
        "losses": result.losses,
        "skipped": result.skipped,
        "by_hand": by_hand,
        "moved": moved,
        "all_ignored": {"loss": ignored.losses["loss"], "norm": ignored.grad_norm, "skipped": ignored.skipped},
        "after": {"loss": after.losses["loss"], "skipped": after.skipped},
        "identical": describe_heads(engines.heads)["replicas_identical"],
    }


def wrong_runs() -> dict[str, dict]:
    weights = str(OUT / f"weights_{distributed.rank()}.npy")  # numbers in the config itself are counted earlier
    np.save(weights, [1.0])
    linear = loss_case("ce")["decode_head"]
    psa = {**CASES["PSPHead"]["decode_head"], "type": "PSAHead", "mask_size": (4, 4)}
    return {
        "head_operator": {"decode_head": psa},
        "loss_operator": {
            "decode_head": linear,
            "auxiliary_head": [linear, {**linear, "loss_decode": {"type": "OperatorLoss"}}],
        },
        "layer_operator": {"decode_head": {**CASES["FCNHead"]["decode_head"], "conv_cfg": {"type": "DCNv2"}}},
        "class_weight": {
            "decode_head": {**linear, "loss_decode": {"type": "CrossEntropyLoss", "class_weight": weights}}
        },
        "second_stage": CASES["PointHead"] | {"train_cfg": {}},
        "test_cfg": CASES["PointHead"] | {"test_cfg": {}},
    }


def check_wrong(case: dict) -> dict:
    """What is said, and whether the backbone's weights were asked for before it was said."""
    run = make_run(case)
    try:
        build_engines(run, training=True, weights="/absent/weights.pt", log=print)
    except ConfigError as error:
        return {"message": str(error), "exit_code": error.exit_code}
    return {"message": "no error", "exit_code": 0}


def check_evaluation_needs_no_trial() -> bool:
    """Engines that only predict are built also where a loss could not train."""
    case = wrong_runs()["class_weight"]
    return isinstance(build_engines(make_run(case), training=False, weights=None, log=print), Engines)


def main() -> None:
    warnings.simplefilter("ignore")
    distributed.initialize()
    report = {
        "heads": {name: check_head(case) for name, case in CASES.items()},
        "losses": {name: check_loss(name) for name in LOSSES},
        "wrong": {name: check_wrong(case) for name, case in wrong_runs().items()},
        "evaluation": check_evaluation_needs_no_trial(),
    }
    reports = distributed.gather_objects(report)
    if distributed.is_main():
        (OUT / "heads.json").write_text(json.dumps(reports))
    distributed.shutdown()


if __name__ == "__main__":
    main()
