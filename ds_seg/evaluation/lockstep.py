"""Inference over a sharded model that can't hang: every rank makes as many forwards as the busiest one.

Under ZeRO-3 a forward is a collective, and images of other aspect ratios have other window counts. So
ranks advance in ticks: before each one they agree whether anybody still has windows, and a rank that has
none runs zeros of the smallest window size in use and throws the result away.

Shape suffixes: B windows in a batch; C channels of an image; K output channels; H, W pixels; h, w pixels of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from ds_seg import distributed
from ds_seg.data.evaluation_samples import EvaluationSample
from ds_seg.errors import ConfigError
from ds_seg.evaluation.windows import Grid, Window
from ds_seg.supervision import stop
from ds_seg.supervision.progress import enter_phase

EncodeDecode = Callable[[torch.Tensor], torch.Tensor]
_NO_WINDOW = 2**31 - 1


@dataclass(frozen=True)
class Prediction:
    """The class of every pixel of one image, at the image's own size.

    Attributes:
        index: Position in the dataset.
        labels_HW: Class ids, uint8, or int64 beyond 256 classes.
        meta: MMSeg meta of the first view.
        scores_KHW: Probability of each class, float32, where it was asked for; with K = 1 that of class 1.
        finite: Whether the network's scores are numbers: where they are not, neither are the labels.
    """

    index: int
    labels_HW: np.ndarray
    meta: Mapping[str, Any]
    scores_KHW: np.ndarray | None = None
    finite: bool = True


@dataclass(frozen=True)
class InferenceSettings:
    """How images are cut into windows, and what becomes of the network's scores.

    Attributes:
        test_cfg: dict(mode='slide', crop_size=(h, w), stride=(h, w)) or dict(mode='whole'), pixels.
        in_channels: C.
        out_channels: K; with 1 the scores are sigmoids, split at `threshold`.
        align_corners: How logits are resized to the image's own size.
        window_batch: Most windows in one forward, at least 1.
        device: Where the forwards run and the sums live.
        patch_size: Side of a transformer patch, pixels; window sizes are checked against it. None: any size.
        threshold: Score above which a pixel of a one-channel head is class 1.
        keep_scores: Whether predictions hold the probabilities too.

    Raises:
        ConfigError: the window batch is empty.
    """

    test_cfg: Mapping[str, Any]
    in_channels: int
    out_channels: int
    align_corners: bool
    window_batch: int
    device: torch.device
    patch_size: int | None = None
    threshold: float = 0.3
    keep_scores: bool = False

    def __post_init__(self) -> None:
        if self.window_batch < 1:
            raise ConfigError(f"The window batch is {self.window_batch}; it must be at least 1.")


@dataclass
class _View:
    """Sums over the windows of one view; they are allocated when its first window comes in."""

    meta: Mapping[str, Any]
    size: tuple[int, int]
    windows_left: int
    logits_1KHW: torch.Tensor | None = None
    counts_HW: torch.Tensor | None = None

    def add(self, window: Window, logits_Khw: torch.Tensor) -> None:
        if self.logits_1KHW is None or self.counts_HW is None:
            # FP32 sums, whatever the model computes in
            self.logits_1KHW = logits_Khw.new_zeros((1, logits_Khw.shape[0], *self.size), dtype=torch.float32)
            self.counts_HW = logits_Khw.new_zeros(self.size, dtype=torch.float32)
        rows, columns = slice(window.y1, window.y2), slice(window.x1, window.x2)
        self.logits_1KHW[0, :, rows, columns] += logits_Khw
        self.counts_HW[rows, columns] += 1
        self.windows_left -= 1

    def finish(self, settings: InferenceSettings) -> torch.Tensor:
        assert self.logits_1KHW is not None
        assert self.counts_HW is not None
        height, width = self.meta["img_shape"][:2]  # without the pipeline's padding
        logits_1KHW = self.logits_1KHW.div_(self.counts_HW)[:, :, :height, :width]
        self.logits_1KHW = self.counts_HW = None
        logits_1KHW = F.interpolate(
            logits_1KHW,
            size=tuple(self.meta["ori_shape"][:2]),
            mode="bilinear",
            align_corners=settings.align_corners,
        )
        scores_1KHW = logits_1KHW.sigmoid() if settings.out_channels == 1 else logits_1KHW.softmax(dim=1)
        if self.meta.get("flip"):
            scores_1KHW = scores_1KHW.flip(dims=(2 if self.meta["flip_direction"] == "vertical" else 3,))
        return scores_1KHW


@dataclass
class _Image:
    """Sum over the views of one image."""

    index: int
    meta: Mapping[str, Any]
    views: int
    views_left: int
    scores_1KHW: torch.Tensor | None = None

    def add(self, scores_1KHW: torch.Tensor) -> None:
        self.scores_1KHW = scores_1KHW if self.scores_1KHW is None else self.scores_1KHW.add_(scores_1KHW)
        self.views_left -= 1

    def finish(self, settings: InferenceSettings) -> Prediction:
        assert self.scores_1KHW is not None
        scores_1KHW = self.scores_1KHW.div_(self.views)
        self.scores_1KHW = None
        if settings.out_channels == 1:
            labels_HW = (scores_1KHW > settings.threshold)[0, 0]
        else:
            labels_HW = scores_1KHW.argmax(dim=1)[0]
        dtype = torch.uint8 if settings.out_channels <= 256 else torch.int64
        scores_KHW = scores_1KHW[0].cpu().numpy() if settings.keep_scores else None
        finite = bool(scores_1KHW.sum().isfinite())
        return Prediction(self.index, labels_HW.to("cpu", dtype).numpy(), self.meta, scores_KHW, finite)


class _Job(NamedTuple):
    """One window waiting for its forward."""

    image: _Image
    view: _View
    window: Window
    pixels_Chw: torch.Tensor


@dataclass
class _Queue:
    """This rank's windows, image after image; at most the next image is held beside the current one."""

    jobs: Iterator[_Job]
    limit: int
    upcoming: _Job | None = None
    begun: bool = False

    def take(self) -> list[_Job]:
        """Up to `limit` windows of one size, across images; empty when all are done."""
        if not self.begun:
            self.upcoming, self.begun = next(self.jobs, None), True
        batch: list[_Job] = []
        while self.upcoming is not None and len(batch) < self.limit:
            if batch and batch[0].window.size != self.upcoming.window.size:
                break
            batch.append(self.upcoming)
            self.upcoming = next(self.jobs, None)
        return batch


def predict_images(
    samples: Iterable[EvaluationSample],
    encode_decode: EncodeDecode,
    settings: InferenceSettings,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Prediction]:
    """Segment this rank's images. A sequence of collectives: every rank must exhaust the iterator.

    An error (an image that can't be read, say) leaves the iterator at once, without a further collective.

    Args:
        samples: This rank's images; ranks may have different numbers of them, or none.
        encode_decode: Maps images (B, C, h, w) to logits (B, K, h, w); may itself be a collective.
        settings: The same on every rank.
        progress: Called with the number of images this rank has finished, after each.

    Yields:
        One prediction an image, in the order of `samples`.

    Raises:
        ConfigError: test_cfg can't be used, or a window is no multiple of the patch.
        StopRequested: on all ranks, if the run of any of them is to stop.

    Source: the equal number of forwards per rank follows facebookresearch/dinov3
        dinov3/eval/segmentation/inference.py, which pads to the largest count of one image; here the
        windows of all images form one stream. Scores as in open-mmlab/mmsegmentation v0.30.0 EncoderDecoder.
    """
    grid = Grid(settings.test_cfg, settings.patch_size)
    done = 0
    with closing(stop.Leavable(samples)) as leavable:
        queue = _Queue(_iterate_jobs(leavable, grid), settings.window_batch)
        for tick in count(1):
            enter_phase(f"the images of window batch {tick} of an evaluation")
            batch = _take_unless_stopped(queue)
            dummy_size = _agree_on_tick(batch, settings.device)
            if dummy_size is None:
                return
            enter_phase(f"window batch {tick} of an evaluation")
            logits_BKhw = _forward(batch, dummy_size, encode_decode, settings)
            for prediction in _complete_images(batch, logits_BKhw[: len(batch)], settings):
                yield prediction
                done += 1
                if progress is not None:
                    progress(done)


def _complete_images(batch: list[_Job], logits_BKhw: torch.Tensor, settings: InferenceSettings) -> Iterator[Prediction]:
    for job, logits_Khw in zip(batch, logits_BKhw, strict=True):
        job.view.add(job.window, logits_Khw)
        if job.view.windows_left == 0:
            job.image.add(job.view.finish(settings))
        if job.image.views_left == 0:
            yield job.image.finish(settings)


def _iterate_jobs(samples: Iterable[EvaluationSample], grid: Grid) -> Iterator[_Job]:
    for sample in samples:
        views = list(sample.views)
        image = _Image(sample.index, views[0][1], len(views), len(views))
        for image_1CHW, meta in views:
            height, width = image_1CHW.shape[-2:]
            windows = grid.windows(height, width)
            view = _View(meta, (height, width), len(windows))
            for window in windows:
                yield _Job(image, view, window, image_1CHW[0, :, window.y1 : window.y2, window.x1 : window.x2])


def _take_unless_stopped(queue: _Queue) -> list[_Job]:
    try:
        return queue.take()
    except stop.StopRequested:  # the others are told in the tick's agreement
        return []


def _agree_on_tick(batch: list[_Job], device: torch.device) -> tuple[int, int] | None:
    """Whether any rank has windows left, and the size of the zeros for those that have none.

    A collective and a host sync: one before every forward.

    Returns:
        The smallest height and width in use over ranks, pixels; None when all ranks are done.

    Raises:
        StopRequested: on all ranks, if the run of any of them is to stop.
    """
    size = batch[0].window.size if batch else (_NO_WINDOW, _NO_WINDOW)
    stopping = stop.requested() is not None
    largest = torch.tensor([-size[0], -size[1], stopping], dtype=torch.int64, device=device)
    negative_height, negative_width, any_stopping = distributed.reduce_max(largest).tolist()
    if any_stopping:
        raise stop.StopRequested
    height, width = -negative_height, -negative_width
    return None if height == _NO_WINDOW else (height, width)


def _forward(
    batch: list[_Job], dummy_size: tuple[int, int], encode_decode: EncodeDecode, settings: InferenceSettings
) -> torch.Tensor:
    """The tick's one forward, on zeros if this rank has no window."""
    if batch:
        images_BChw = torch.stack([job.pixels_Chw for job in batch]).to(settings.device)
    else:
        images_BChw = torch.zeros(1, settings.in_channels, *dummy_size, device=settings.device)
    with torch.no_grad():
        logits_BKhw = encode_decode(images_BChw)
    wanted = (len(images_BChw), settings.out_channels, *images_BChw.shape[2:])
    assert logits_BKhw.shape == wanted, f"encode_decode returned {tuple(logits_BKhw.shape)}, wanted {wanted}"
    return logits_BKhw
