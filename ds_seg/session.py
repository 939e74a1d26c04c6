"""What the commands share: engines with their weights, and the evaluator of a run."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from ds_seg import distributed
from ds_seg.checkpoint import load_weights_from_checkpoint, resolve_weights, stream_saved_values
from ds_seg.config import RunConfig
from ds_seg.config.data_section import list_steps
from ds_seg.config.deepspeed_json import offloaded_share
from ds_seg.data.build import leaf_datasets
from ds_seg.data.evaluation_samples import EvaluationSample, load_evaluation_samples, load_ground_truth
from ds_seg.data.images import open_images
from ds_seg.engine.engines import Engines, build_modules
from ds_seg.engine.groups import find_idle_multipliers
from ds_seg.engine.operator_builds import expect_cpu_adam
from ds_seg.engine.precision import validate_precision
from ds_seg.errors import ConfigError, name_some
from ds_seg.evaluation.evaluate import EvaluationResult, evaluate_dataset
from ds_seg.evaluation.lockstep import InferenceSettings, Prediction, predict_images
from ds_seg.evaluation.windows import Grid
from ds_seg.models.heads import SegmentationHeads
from ds_seg.models.load_weights import stream_rounded
from ds_seg.models.probe import probe_heads
from ds_seg.models.weight_files import is_weight_path
from ds_seg.models.weight_segmentor import load_segmentor_weights
from ds_seg.models.weight_stream import Stretch
from ds_seg.tracking.console import track_images

Log = Callable[[str], None]
OnPrediction = Callable[[Prediction, np.ndarray], None]


def build_engines(run: RunConfig, *, training: bool, weights: str | None, log: Log) -> Engines:
    """Both engines, their weights loaded into the shards, and in FP32 into the masters that DeepSpeed makes of these.

    Args:
        run: the run.
        training: with optimizers, or only for evaluation.
        weights: a weight file or a ds_seg checkpoint (see `resolve_weights`); None keeps the random start.
        log: gets the report of what was loaded.

    Raises:
        ConfigError: before any weight is loaded, a head or loss that can't be built or, where it is to train, fails;
            or an optimizer in host memory that can't be compiled.
        PrecisionError: a tensor of the engines has another dtype than promised.
    """
    backbone, heads = build_modules(run)
    if training:
        names = [f"backbone.{name}" for name, _ in backbone.named_parameters()]
        names += [name for name, _ in heads.named_parameters()]
        for idle in find_idle_multipliers(names, run.optimizer):
            log(f"warning: {idle}")
    if training and offloaded_share(run.deepspeed) and any(p.requires_grad for p in backbone.parameters()):
        distributed.agree(lambda: expect_cpu_adam(log))
    if training:
        run = _try_heads(run, backbone, heads, log)
    exact: Iterable[Stretch] = ()
    if weights is not None:
        exact = load_weights(run, backbone, heads, weights, training=training, log=log)
    engines = Engines(backbone, heads, run, training=training)
    if engines.trainable_backbone and engines.dtype != torch.float32:
        engines.load_masters(exact)
    validate_precision(engines)
    return engines


def _try_heads(run: RunConfig, backbone: nn.Module, heads: SegmentationHeads, log: Log) -> RunConfig:
    heads.to(distributed.device())
    unused = distributed.agree(
        lambda: probe_heads(heads, run.model, backbone, micro_batch=run.micro_batch, crop_size_px=run.train_crop_px)
    )
    if not unused:
        return run
    log(
        f"no loss depends on {len(unused)} head parameters, which stay as they are (find_unused_parameters is on): "
        + name_some(unused, 8)
    )
    return dataclasses.replace(run, find_unused_parameters=True)


def load_weights(
    run: RunConfig, backbone: nn.Module, heads: SegmentationHeads, source: str, *, training: bool, log: Log
) -> Iterator[Stretch]:
    """Load a weight file or a ds_seg checkpoint; a collective over all ranks.

    Args:
        run: names the file of the trunk for weight files that hold heads alone.
        backbone: as built, not yet wrapped by DeepSpeed.
        heads: as built.
        source: see `resolve_weights`.
        training: heads may then keep their initial values; for an evaluation the decode head must be there.
        log: gets the report of what was loaded.

    Returns:
        What trained parameters in bf16 have rounded, in FP32: read again as it is asked for, by all ranks alike.
    """
    path = distributed.agree(lambda: resolve_weights(source))
    if not is_weight_path(path):
        loaded = load_weights_from_checkpoint(path, backbone, heads, needs_heads=not training)
        log(f"loaded {'the averages (EMA) of ' if loaded.averaged else ''}backbone and heads from {path}")
        for reason in loaded.left_initial:
            log(f"left initial: {reason}")
        return stream_saved_values(path, backbone)
    trunk = next((file for file in _list_pretrained(run) if file and file != source), None)
    reports, of_heads = load_segmentor_weights(
        backbone, heads, path, trunk_path=trunk, needs_head=not training, log=log
    )
    if of_heads.classes and (other := of_heads.find_other_class(open_images(run.data, []).CLASSES)):
        log(f"warning: {other}: unless that is the same class, scores and pictures go by the wrong names")
    expected_px = run.model.backbone.get("pretrain_size")
    image_px = reports[0].image_px
    if expected_px and image_px not in (None, expected_px, run.model.backbone.get("img_size")):
        log(
            f"warning: model.backbone.pretrain_size is {expected_px} px, but the weights have positions for "
            f"{image_px} px: they may be of another release than the config is meant for"
        )
    return itertools.chain.from_iterable(stream_rounded(backbone, report) for report in reports if report.rounded)


def _list_pretrained(run: RunConfig) -> list[str | None]:
    """Where the config may name the weights of its backbone, first choice first."""
    model, mmseg = run.model, run.mmseg
    named = [model.backbone.get("pretrained"), model.get("pretrained"), mmseg.get("load_from"), mmseg.get("pretrained")]
    return [*named, run.load_from]


def predict_dataset(run: RunConfig, engines: Engines, dataset: Any) -> Iterator[Prediction]:
    """Segment this rank's share of a dataset; a collective over all ranks, who must all exhaust the iterator."""
    engines.train(False)
    settings = _read_settings(run, engines, window_batch=None)
    return predict_images(_own_samples(run, dataset), engines.encode_decode, settings, _track(dataset, "segmenting"))


def try_first_images(run: RunConfig, dataset: Any, *, annotated: bool = True) -> None:
    """Load each rank's first image, and its annotation, and cut the image into windows; a collective over all ranks.

    Raises:
        ConfigError: the pipeline makes no image of it, or model.test_cfg or in_chans does not fit what it makes.
        DataError: it can't be loaded.
    """

    def try_first() -> None:
        grid = Grid(run.model.test_cfg, run.patch_size)
        for sample in load_evaluation_samples(dataset, _own_indices(dataset)[:1], num_workers=0):
            for image_1CHW, _ in sample.views:
                _expect_channels(run, image_1CHW.shape[1])
                grid.windows(*image_1CHW.shape[-2:])
            if annotated:
                load_ground_truth(dataset, sample.index)

    distributed.agree(try_first)


def _expect_channels(run: RunConfig, found: int) -> None:
    wanted = run.model.backbone.get("in_chans", 3)
    if found != wanted:
        raise ConfigError(
            f"model.backbone.in_chans is {wanted}, but the pipeline makes images of {found} channels. Set it to "
            f"{found}, or color_type in LoadImageFromFile ('color' makes 3, 'grayscale' 1, 'unchanged' as many as the "
            "file has), and give Normalize as many values."
        )


class Evaluator:
    """Evaluates engines on one dataset, over all ranks and as often as wanted."""

    def __init__(self, run: RunConfig, dataset: Any, *, window_batch: int | None = None) -> None:
        self.run, self.dataset, self.window_batch = run, dataset, window_batch

    def __call__(self, engines: Engines, on_prediction: OnPrediction | None = None) -> EvaluationResult:
        """Segment the whole dataset and compare it with its annotations; a collective over all ranks.

        What was gathered for it is let go at its end.
        """
        engines.train(False)
        try:
            return evaluate_dataset(
                self.dataset,
                _own_samples(self.run, self.dataset),
                engines.encode_decode,
                _read_settings(self.run, engines, self.window_batch),
                num_classes=engines.heads.num_classes,
                class_names=self.dataset.CLASSES,
                load_label=lambda index: load_ground_truth(self.dataset, index),
                ignore_index=leaf_datasets(self.dataset)[0].ignore_index,
                on_prediction=on_prediction,
                progress=_track(self.dataset, "evaluating"),
            )
        finally:
            engines.backbone.empty_partition_cache()


def enable_test_time_augmentation(run: RunConfig, role: str) -> None:
    """Let the test pipeline make the views of MMSeg's `--aug-test`: six scales, each mirrored too.

    A Resize step with `min_size` makes no short side smaller than that. Where the image at scale 1 has just that side,
    as ADE20K's has here, the scales 0.5, 0.75 and 1 are one image, which counts three times.

    Raises:
        ConfigError: the pipeline has no MultiScaleFlipAug to set.
    """
    steps = [step for step in list_steps(run.data[role]) if step["type"] == "MultiScaleFlipAug"]
    if not steps:
        raise ConfigError(
            f"--tta: data.{role}.pipeline has no MultiScaleFlipAug step. Add one, as ds_configs/datasets do."
        )
    for step in steps:
        step.update(img_ratios=[0.5, 0.75, 1.0, 1.25, 1.5, 1.75], flip=True)


def _own_indices(dataset: Any) -> range:
    return range(distributed.rank(), len(dataset), distributed.world_size())


def _own_samples(run: RunConfig, dataset: Any) -> Iterator[EvaluationSample]:
    return load_evaluation_samples(dataset, _own_indices(dataset), num_workers=run.workers)


def _read_settings(run: RunConfig, engines: Engines, window_batch: int | None) -> InferenceSettings:
    return InferenceSettings(
        test_cfg=run.model.test_cfg,
        in_channels=engines.backbone.module.in_chans,
        out_channels=engines.heads.out_channels,
        align_corners=engines.heads.align_corners,
        window_batch=window_batch or run.evaluation.window_batch,
        device=engines.device,
        patch_size=run.patch_size,
        threshold=engines.heads.threshold,
    )


def _track(dataset: Any, label: str) -> Callable[[int], None] | None:
    return track_images(len(_own_indices(dataset)), label) if distributed.is_main() else None
