"""Training batches that are a function of (seed, global step) alone, and samples for evaluation.

The training set is an endless stream: position p is sample permutation(seed, p // n)[p % n], augmented
with random numbers seeded from (seed, p). Step k takes the positions of the k-th global batch, however
ranks, micro-batches and workers share them. Batches that a rollback has left out are passed over, and a
sample that can't be read may be replaced: by one that follows from (seed, p) too.

Shape legend: B samples of a micro-batch, H and W px of a crop; 1 and 3 are channels.
"""

from __future__ import annotations

import atexit
import dataclasses
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, NamedTuple, cast

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

import ds_seg.openmmlab  # noqa: F401
from ds_seg.data.bad_samples import BadSample
from ds_seg.data.build import resolve_sample, sample_paths
from ds_seg.data.left_out import BatchRange, find_batch
from ds_seg.data.pair_files import read_image_size
from ds_seg.data.samples import load_or_error, sample_error
from ds_seg.data.training_stream import SeededStream, StreamSample
from ds_seg.errors import ConfigError, DataError
from ds_seg.supervision.processes import end_with_parent

from mmcv.parallel import DataContainer  # isort: skip


_main_exits = multiprocessing.get_context("fork").RawValue("b", 0)
"""In memory that worker processes share with this one."""


class MicroBatch(NamedTuple):
    """One rank's share of one forward and backward."""

    images_B3HW: torch.Tensor
    """float32, normalised by the pipeline."""
    labels_B1HW: torch.Tensor
    """int64 class ids, the dataset's ignore_index where ignored."""
    positions: list[int]
    """In the global stream."""
    metas: list[dict[str, Any]]
    """MMSeg's img_metas."""
    replaced: Sequence[BadSample] = ()
    """Samples that could not be read; others stand in their positions."""


@dataclasses.dataclass(frozen=True)
class TestSample:
    """One image of a test dataset in each of its augmented views."""

    __test__ = False  # for pytest, which takes a class of this name for a test case

    index: int
    views: list[tuple[torch.Tensor, dict[str, Any]]]
    """(1, 3, H, W) float32 image and its img_metas, one a scale and flip."""


def build_train_loader(
    dataset: Any,
    *,
    seed: int,
    micro_batch: int,
    accumulation_steps: int,
    rank: int,
    world_size: int,
    start_step: int = 0,
    stop_step: int,
    num_workers: int,
    pin_memory: bool = False,
    max_bad_samples: int = 0,
    left_out: Sequence[BatchRange] = (),
) -> Iterator[MicroBatch]:
    """Iterate over this rank's micro-batches of steps start_step..stop_step - 1.

    Micro-batch a of step k starts at position ((g * accumulation_steps + a) * world_size + rank) * micro_batch, where
    g is k unless batches are left out.

    Args:
        dataset: MMSeg training dataset.
        seed: Of the order and of every augmentation, at least 0.
        micro_batch: Samples a rank takes at a time.
        accumulation_steps: Micro-batches a step.
        rank: Of this process.
        world_size: Number of processes.
        start_step: First step, to resume from.
        stop_step: One past the last step.
        num_workers: Processes that load ahead; 0 loads in this one.
        pin_memory: Whether the tensors are to be in page-locked memory.
        max_bad_samples: Above 0, a sample whose files can't be read is replaced by another one, drawn from the seed
            and its position; the caller counts them. This many in one position are an error.
        left_out: Global batches that no step trains on.

    Returns:
        An iterator of accumulation_steps micro-batches a step. The process's own random state is left alone.

    Raises:
        DataError: the dataset is empty; from the iterator: a sample fails, or sizes differ.
        ConfigError: from the iterator: the pipeline does not collect img and gt_semantic_seg.
    """
    if len(dataset) == 0:
        raise DataError("the training dataset has no image. Point data.train.img_dir at a folder with images.")
    starts = (
        ((find_batch(step, left_out) * accumulation_steps + part) * world_size + rank) * micro_batch
        for step in range(start_step, stop_step)
        for part in range(accumulation_steps)
    )
    batches = (list(range(start, start + micro_batch)) for start in starts)
    loader = _build_loader(
        SeededStream(dataset, seed, max_bad_samples), batches, _collate_train, num_workers, pin_memory
    )
    return _raise_failures(iter(loader))


def build_test_items(dataset: Any, indices: Sequence[int], *, num_workers: int) -> Iterator[TestSample]:
    """Iterate over the samples `indices` of a test-mode dataset, in that order.

    Args:
        dataset: MMSeg dataset in test mode.
        indices: Into `dataset`.
        num_workers: Processes that load ahead; 0 loads in this one.

    Returns:
        An iterator of one sample an index, with one view for each scale and flip of the test pipeline.

    Raises:
        DataError: from the iterator: a sample fails.
        ConfigError: from the iterator: the pipeline does not collect img.
    """
    batches = ([index] for index in indices)
    return _raise_failures(iter(_build_loader(_TestViews(dataset), batches, _first, num_workers, pin_memory=False)))


def load_ground_truth(dataset: Any, index: int) -> np.ndarray:
    """Load the annotation of a sample as class ids.

    Args:
        dataset: MMSeg dataset, or MMSeg's wrapper around several.
        index: Of the sample.

    Returns:
        (H, W) uint8 class ids at the image's own size, `ignore_index` where ignored (label 0 reduced).

    Raises:
        DataError: there is no annotation, it can't be read, or its size is not the image's.
    """
    leaf, inner = resolve_sample(dataset, index)
    image_path, annotation_path = sample_paths(leaf, inner)
    if annotation_path is None:
        raise DataError(f"image {image_path} can't be scored: its dataset has no ann_dir. Set ann_dir in the config.")
    try:
        label_HW = leaf.get_gt_seg_map_by_idx(inner)
        size_HW = read_image_size(bytes(leaf.file_client.get(image_path)))
    except Exception as error:  # any decoder's failure means one thing here: this pair can't be read
        raise sample_error(dataset, index, error) from error
    if label_HW.shape != size_HW:
        raise DataError(
            f"annotation {annotation_path} has shape {label_HW.shape}, but its image {image_path} has height and "
            f"width {size_HW}. Replace one of them."
        )
    if leaf.reduce_zero_label and not leaf.gt_seg_map_loader.reduce_zero_label:
        reduced_HW = label_HW - np.uint8(1)
        label_HW = np.where((label_HW == 0) | (label_HW == 255), np.uint8(leaf.ignore_index), reduced_HW)
    return label_HW


class _TestViews(Dataset):
    """Test sample at an index, or the error that kept it from loading."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> TestSample | DataError | ConfigError:
        sample = load_or_error(self.dataset, index)
        if isinstance(sample, DataError):
            return sample
        if not isinstance(sample, Mapping) or not {"img", "img_metas"} <= set(sample):
            return ConfigError("the test pipeline does not collect an image. End it with Collect(keys=['img']).")
        return make_test_sample(index, sample)


def make_test_sample(index: int, sample: Mapping[str, Any]) -> TestSample:
    """The views that a test pipeline has put into `img` and `img_metas`.

    Args:
        index: Of the image.
        sample: What the pipeline returned; lists where it makes several views.
    """
    images, metas = sample["img"], sample["img_metas"]
    if not isinstance(images, list):
        images, metas = [images], [metas]
    views = [(_unwrap(image)[None].float(), _unwrap(meta)) for image, meta in zip(images, metas, strict=True)]
    return TestSample(index, views)


def _build_loader(
    dataset: Dataset,
    batches: Iterable[list[int]],
    collate: Callable[[list[Any]], Any],
    num_workers: int,
    pin_memory: bool,
) -> DataLoader:
    return DataLoader(
        dataset,
        batch_sampler=cast("Sampler[list[int]]", batches),
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_init_worker,
        multiprocessing_context="fork" if num_workers else None,
        generator=torch.Generator(),  # or the DataLoader would draw from the process's own
    )


def _init_worker(_worker_id: int) -> None:
    cv2.setNumThreads(0)
    cv2.ocl.setUseOpenCL(False)
    end_with_parent()
    # Ctrl-C, schedulers and the deepspeed launcher signal workers too, but the main process still needs them
    # until it has saved; it ends them itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_if_main_exits)


def _end_if_main_exits(_signal_number: int, _frame: FrameType | None) -> None:
    if _main_exits.value:
        os._exit(0)


@atexit.register
def _let_workers_end() -> None:
    """Runs before multiprocessing's own exit function, which sends SIGTERM to every worker left and waits."""
    _main_exits.value = 1


def _raise_failures(items: Iterator[Any]) -> Iterator[Any]:
    """Items of a loader, raising here those that are errors: a worker's own raise would bury the message."""
    for item in items:
        if isinstance(item, Exception):
            del items  # the error's traceback keeps this frame, and would keep the workers with it
            raise item
        yield item


def _collate_train(samples: list[StreamSample]) -> MicroBatch | DataError | ConfigError:
    positions, loaded = [item.position for item in samples], [item.sample for item in samples]
    for sample in loaded:
        if isinstance(sample, DataError):
            return sample
        if not isinstance(sample, Mapping) or not {"img", "gt_semantic_seg", "img_metas"} <= set(sample):
            return ConfigError(
                "data.train.pipeline does not collect an image and its labels. End it with "
                "DefaultFormatBundle and Collect(keys=['img', 'gt_semantic_seg'])."
            )
    images = [_unwrap(sample["img"]).float() for sample in loaded]
    labels = [_unwrap(sample["gt_semantic_seg"]).long() for sample in loaded]
    metas = [_unwrap(sample["img_metas"]) for sample in loaded]
    fault = _size_fault(images, labels, metas)
    replaced = [bad for item in samples for bad in item.replaced]
    return fault or MicroBatch(torch.stack(images), torch.stack(labels), positions, metas, replaced)


def _size_fault(
    images: list[torch.Tensor], labels: list[torch.Tensor], metas: list[dict[str, Any]]
) -> DataError | None:
    sizes = [tuple(image.shape[-2:]) for image in images]
    label_sizes = [tuple(label.shape[-2:]) for label in labels]
    if len({*sizes, *label_sizes}) == 1:
        return None
    listed = "; ".join(
        f"{meta.get('filename')}: image {size}, labels {label_size}"
        for meta, size, label_size in zip(metas, sizes, label_sizes, strict=True)
    )
    return DataError(
        f"the samples of a micro-batch differ in height and width: {listed}. After RandomCrop(crop_size=S), add "
        "Pad(size=S, pad_val=0, seg_pad_val=255) to data.train.pipeline."
    )


def _first(items: list[Any]) -> Any:
    return items[0]


def _unwrap(value: Any) -> Any:
    return value.data if isinstance(value, DataContainer) else value
