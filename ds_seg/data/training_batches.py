"""Training batches that are a function of (seed, global step) alone.

The training set is an endless stream: position p is sample permutation(seed, p // n)[p % n], augmented
with random numbers seeded from (seed, p). Step k takes the positions of the k-th global batch, however
ranks, micro-batches and workers share them. Batches that a rollback has left out are passed over, and a
sample that can't be read may be replaced: by one that follows from (seed, p) too.

Shape legend: B samples of a micro-batch, H and W px of a crop; 1 and 3 are channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ds_seg.data.bad_samples import BadSample
from ds_seg.data.left_out import BatchRange, find_batch
from ds_seg.data.loader import load_ahead
from ds_seg.data.samples import unwrap
from ds_seg.data.training_stream import SeededStream, StreamSample
from ds_seg.errors import ConfigError, DataError


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
    stream = SeededStream(dataset, seed, max_bad_samples)
    return load_ahead(stream, batches, _collate, num_workers=num_workers, pin_memory=pin_memory)


def _collate(samples: list[StreamSample]) -> MicroBatch | DataError | ConfigError:
    positions, loaded = [item.position for item in samples], [item.sample for item in samples]
    for sample in loaded:
        if isinstance(sample, DataError):
            return sample
        if not isinstance(sample, Mapping) or not _is_collected(sample):
            return ConfigError(
                "data.train.pipeline does not collect an image (C, H, W) and its labels (1, H, W). End it with "
                "DefaultFormatBundle and Collect(keys=['img', 'gt_semantic_seg'])."
            )
    images = [unwrap(sample["img"]).float() for sample in loaded]
    labels = [unwrap(sample["gt_semantic_seg"]).long() for sample in loaded]
    metas = [unwrap(sample["img_metas"]) for sample in loaded]
    fault = _size_fault(images, labels, metas)
    replaced = [bad for item in samples for bad in item.replaced]
    return fault or MicroBatch(torch.stack(images), torch.stack(labels), positions, metas, replaced)


def _is_collected(sample: Mapping[str, Any]) -> bool:
    if not {"img", "gt_semantic_seg", "img_metas"} <= set(sample):
        return False
    image, label = unwrap(sample["img"]), unwrap(sample["gt_semantic_seg"])
    return all(isinstance(value, torch.Tensor) and value.ndim == 3 for value in (image, label)) and len(label) == 1


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
    cure = "After RandomCrop(crop_size=S), add Pad(size=S, pad_val=0, seg_pad_val=255) to data.train.pipeline."
    if sizes != label_sizes:
        cure = "Take the step that resizes only one of them, such as SegRescale, out of data.train.pipeline."
    return DataError(f"the samples of a micro-batch differ in height and width: {listed}. {cure}")
