"""What the commands share: datasets, engines with their weights, and the evaluator of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ds_seg import distributed
from ds_seg.checkpoint import load_weights_from_checkpoint, resolve_checkpoint
from ds_seg.checkpoint.manifest import MANIFEST
from ds_seg.config import RunConfig
from ds_seg.data.build import build_dataset, leaf_datasets
from ds_seg.data.lint import validate_annotations
from ds_seg.data.loader import TestSample, build_test_items, load_ground_truth
from ds_seg.engine.engines import Engines, build_modules
from ds_seg.errors import ConfigError
from ds_seg.evaluation.evaluate import EvaluationResult, InferenceOptions, evaluate_dataset
from ds_seg.evaluation.lockstep import Prediction, predict_images
from ds_seg.models.heads import SegmentationHeads
from ds_seg.models.load_weights import load_backbone_weights
from ds_seg.tracking.console import track_images

Log = Callable[[str], None]
OnPrediction = Callable[[Prediction, np.ndarray], None]
_LINT_THREADS = 4


def open_dataset(run: RunConfig, role: str) -> Any:
    """The MMSeg dataset of a role, checked: files, classes, and every annotation where the run asks for it.

    Raises:
        DataError: folders, images or annotations are missing or damaged.
        ConfigError: it has another number of classes than the head.
    """
    num_classes = int(run.model.decode_head.num_classes)

    def open_and_check() -> Any:
        dataset = build_dataset(run.data[role], role=role)
        names = dataset.CLASSES
        if len(names) != num_classes:
            raise ConfigError(
                f"model.decode_head.num_classes is {num_classes}, but data.{role} ({type(dataset).__name__}) has "
                f"{len(names)} classes: {', '.join(names[:12])}{', ...' if len(names) > 12 else ''}. Make them equal."
            )
        if run.check_data:
            validate_annotations(
                dataset,
                num_classes=num_classes,
                rank=distributed.rank(),
                world_size=distributed.world_size(),
                threads=_LINT_THREADS,
                progress=distributed.is_main(),
            )
        return dataset

    return distributed.agree(open_and_check)


def build_engines(run: RunConfig, *, training: bool, weights: str | None, log: Log) -> Engines:
    """Both engines, their weights loaded into the shards before DeepSpeed makes its FP32 copies.

    Args:
        run: the run.
        training: with optimizers, or only for evaluation.
        weights: a backbone weight file or a ds_seg checkpoint; None keeps the random start.
        log: gets the report of what was loaded.
    """
    backbone, heads = build_modules(run)
    if weights is not None:
        load_weights(backbone, heads, weights, log)
    return Engines(backbone, heads, run, training=training)


def load_weights(backbone: nn.Module, heads: SegmentationHeads, source: str, log: Log) -> None:
    """Load a backbone weight file, or backbone and heads of a ds_seg checkpoint."""
    if Path(source).is_dir() or (Path(source) / MANIFEST).is_file():
        folder = distributed.agree(lambda: resolve_checkpoint(source))
        load_weights_from_checkpoint(folder, backbone, heads)
        log(f"loaded backbone and heads from {folder}")
    else:
        load_backbone_weights(backbone, source, log=log)


def predict_dataset(
    run: RunConfig, engines: Engines, dataset: Any, *, window_batch: int | None = None
) -> Iterator[Prediction]:
    """Segment this rank's share of a dataset; a collective over all ranks, who must all exhaust the iterator."""
    options = _inference_options(run, engines, dataset, window_batch, label="segmenting")
    return predict_images(_own_samples(run, dataset), engines.encode_decode, **options)


class Evaluator:
    """Evaluates engines on one dataset, over all ranks and as often as wanted."""

    def __init__(self, run: RunConfig, dataset: Any, *, window_batch: int | None = None) -> None:
        self.run, self.dataset, self.window_batch = run, dataset, window_batch

    def __call__(self, engines: Engines, on_prediction: OnPrediction | None = None) -> EvaluationResult:
        """Segment the whole dataset and compare it with its annotations; a collective over all ranks."""
        return evaluate_dataset(
            self.dataset,
            _own_samples(self.run, self.dataset),
            engines.encode_decode,
            num_classes=engines.heads.num_classes,
            class_names=self.dataset.CLASSES,
            load_label=lambda index: load_ground_truth(self.dataset, index),
            ignore_index=leaf_datasets(self.dataset)[0].ignore_index,
            on_prediction=on_prediction,
            **_inference_options(self.run, engines, self.dataset, self.window_batch, label="evaluating"),
        )


def enable_test_time_augmentation(run: RunConfig, role: str) -> None:
    """Let the test pipeline make six scales and their mirror images, as MMSeg's `--aug-test` does.

    Raises:
        ConfigError: the pipeline has no MultiScaleFlipAug to set.
    """
    for step in run.data[role]["pipeline"]:
        if step["type"] == "MultiScaleFlipAug":
            step["img_ratios"] = [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]
            step["flip"] = True
            return
    raise ConfigError(f"--tta: data.{role}.pipeline has no MultiScaleFlipAug step. Add one, as ds_configs/datasets do.")


def _own_indices(dataset: Any) -> range:
    return range(distributed.rank(), len(dataset), distributed.world_size())


def _own_samples(run: RunConfig, dataset: Any) -> Iterator[TestSample]:
    return build_test_items(dataset, _own_indices(dataset), num_workers=run.workers)


def _inference_options(
    run: RunConfig, engines: Engines, dataset: Any, window_batch: int | None, *, label: str
) -> InferenceOptions:
    engines.train(False)
    return {
        "test_cfg": run.model.test_cfg,
        "out_channels": engines.heads.out_channels,
        "align_corners": engines.heads.align_corners,
        "window_batch": window_batch or run.window_batch,
        "device": engines.device,
        "patch_size": run.patch_size,
        "progress": track_images(len(_own_indices(dataset)), label) if distributed.is_main() else None,
        "threshold": engines.heads.decode_head.threshold or 0.3,
    }
