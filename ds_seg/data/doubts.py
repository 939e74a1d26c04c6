"""What the doctor calls a fault and training can live with, from what its check at start has read anyway."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import ds_seg.openmmlab  # noqa: F401
from ds_seg.data.build import leaf_datasets, sample_paths
from ds_seg.data.label_rules import PixelCounts, find_mistakes, find_nothing_labelled
from ds_seg.data.lint import find_cures
from ds_seg.data.pairing import find_unpaired
from ds_seg.errors import name_some

from mmseg.datasets import CustomDataset  # isort: skip

_TRAIN = "data.train"
_NAMED_AT_MOST = 3
_SCORING = ("pre_eval", "evaluate")
"""Methods of a dataset with which MMSeg scores."""


def find_doubts(datasets: Mapping[str, Any], counts: Mapping[str, PixelCounts]) -> list[str]:
    """What is most likely a mistake, a line each with the cure.

    Args:
        datasets: dotted config field -> MMSeg dataset, or MMSeg's wrapper around several.
        counts: dotted config field -> how often each id occurs there; empty where annotations were not read.
    """
    doubts = [f"{field}: {doubt}" for field, found in counts.items() if (doubt := find_nothing_labelled(found))]
    if _TRAIN in datasets:  # one split alone may lack a class
        doubts += [f"{fields}: {mistake}" for fields, mistake in find_mistakes(counts)]
        trained = _image_paths(datasets[_TRAIN])
        doubts += [doubt for field in datasets if field != _TRAIN for doubt in _shared(field, datasets[field], trained)]
    for field, dataset in datasets.items():
        doubts += [doubt for leaf in leaf_datasets(dataset) if not leaf.split for doubt in _left_out(field, leaf)]
        if field != _TRAIN:
            doubts += dict.fromkeys(doubt for leaf in leaf_datasets(dataset) for doubt in _own_scores(field, leaf))
    return doubts


def _image_paths(dataset: Any) -> set[str]:
    return {sample_paths(leaf, index)[0] for leaf in leaf_datasets(dataset) for index in range(len(leaf))}


def _shared(field: str, dataset: Any, trained: set[str]) -> Iterator[str]:
    shared = sorted(_image_paths(dataset) & trained)
    if shared:
        yield (
            f"{field}: {len(shared)} of its images are in {_TRAIN} too ({name_some(shared, _NAMED_AT_MOST)}), so that "
            f"its scores are not on unseen images. {find_cures({'duplicate'})[0]}"
        )


def _own_scores(field: str, leaf: CustomDataset) -> Iterator[str]:
    kind = type(leaf)
    own = [name for name in _SCORING if not getattr(kind, name).__module__.startswith("mmseg.")]
    if own:
        yield (
            f"{field}: {' and '.join(own)} of {kind.__name__} {'are' if len(own) > 1 else 'is'} not called: scores are "
            "those of a confusion matrix over all images."
        )


def _left_out(field: str, leaf: CustomDataset) -> Iterator[str]:
    found = find_unpaired(leaf, field)
    if found.unread_images:
        yield (
            f"{field}: {len(found.unread_images)} images in {leaf.img_dir} are left out because they don't end with "
            f"'{leaf.img_suffix}' ({name_some(found.unread_images, _NAMED_AT_MOST)}). Rename them, or correct "
            f"{field}.img_suffix (where its type takes one)."
        )
    elif found.orphaned_annotations:
        yield (
            f"{field}: {len(found.orphaned_annotations)} annotations in {leaf.ann_dir} have no image "
            f"({name_some(found.orphaned_annotations, _NAMED_AT_MOST)}). {find_cures({'unpaired'})[0]}"
        )
