"""One rank of test_evaluation_distributed.py: evaluates images of very different shapes in lockstep.

Every call of the model contains a real all_reduce, as a ZeRO-3 forward does, so that a rank with other
call counts would hang. Usage: evaluation_worker.py OUTPUT_FOLDER [naive]
"""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F

from ds_seg import distributed
from ds_seg.evaluation import lockstep
from ds_seg.evaluation.evaluate import EvaluationResult, evaluate_dataset

CLASSES = ("road", "sky", "tree", "car")
CHANNELS = 2
SIZES = [(40, 300), (32, 32), (250, 36), (16, 20), (64, 64), (33, 31), (500, 40)]
CASES = {
    "slide": {"test_cfg": {"mode": "slide", "crop_size": (32, 40), "stride": (20, 25)}, "window_batch": 3},
    "whole": {"test_cfg": {"mode": "whole"}, "window_batch": 2},
    "one_rank_has_nothing": {"test_cfg": {"mode": "slide", "crop_size": (32, 40), "stride": (20, 25)}},
}


def make_image(index: int) -> SimpleNamespace:
    image_13HW = torch.randn(1, CHANNELS, *SIZES[index], generator=torch.Generator().manual_seed(index))
    meta = {"img_shape": (*SIZES[index], 3), "ori_shape": (*SIZES[index], 3), "flip": False}
    flipped = (image_13HW.flip(3), meta | {"flip": True, "flip_direction": "horizontal"})
    return SimpleNamespace(index=index, views=[(image_13HW, meta), flipped])


def load_label(index: int) -> np.ndarray:
    label_HW = np.random.default_rng(index).integers(0, len(CLASSES), SIZES[index], dtype=np.uint8)
    label_HW[:2] = 255
    return label_HW


class Model:
    """Counts its calls; each one is a collective in which all ranks must take part."""

    def __init__(self) -> None:
        self.calls = 0
        self.windows = 0
        self.weight = torch.randn(len(CLASSES), CHANNELS, 5, 5, generator=torch.Generator().manual_seed(99))

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.windows += len(images) if images.any() else 0
        present = torch.ones(1)
        if dist.is_initialized():
            dist.all_reduce(present)
        return F.conv2d(images, self.weight * present / distributed.world_size(), padding=2)


def take_share(case: str) -> Iterator[SimpleNamespace]:
    rank, world = distributed.rank(), distributed.world_size()
    if case == "one_rank_has_nothing":
        indices: Iterable[int] = range(len(SIZES)) if rank == 0 else ()
    else:
        indices = range(rank, len(SIZES), world)
    return map(make_image, indices)


def evaluate(case: str) -> tuple[EvaluationResult, Model]:
    model = Model()
    result = evaluate_dataset(
        SIZES,
        take_share(case),
        model,
        lockstep.InferenceSettings(
            in_channels=CHANNELS,
            out_channels=len(CLASSES),
            align_corners=False,
            device=torch.device("cpu"),
            **({"window_batch": 1} | CASES[case]),
        ),
        num_classes=len(CLASSES),
        class_names=CLASSES,
        load_label=load_label,
    )
    return result, model


def agree_with_nobody(batch: list, _device: torch.device) -> tuple[int, int] | None:
    """The naive loop: a rank stops as soon as its own windows are done."""
    return (1, 1) if batch else None


def main() -> None:
    folder, naive = Path(sys.argv[1]), "naive" in sys.argv
    if naive:
        distributed.COLLECTIVE_TIMEOUT = datetime.timedelta(seconds=10)
        lockstep._agree_on_tick = agree_with_nobody
    distributed.initialize()
    report = {}
    for case in ["slide"] if naive else CASES:
        result, model = evaluate(case)
        report[case] = {
            "counts": result.confusion.counts_KK.tolist(),
            "metrics": result.metrics(),
            "calls": model.calls,
            "windows": model.windows,
        }
    (folder / f"rank{distributed.rank()}.json").write_text(json.dumps(report))
    distributed.shutdown()


if __name__ == "__main__":
    main()
