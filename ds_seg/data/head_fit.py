"""Whether datasets, and the heads that learn from them, speak of the same classes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import ds_seg.openmmlab  # noqa: F401
from ds_seg.data.build import leaf_datasets
from ds_seg.errors import name_some

from mmseg.datasets.pipelines import LoadAnnotations  # isort: skip


_NAMED_AT_MOST = 5


def find_misfits(head_field: str, head: Mapping[str, Any], field: str, dataset: Any) -> list[str]:
    """What is wrong between a head and a dataset, a sentence or two each with the cure.

    Args:
        head_field: dotted config field of the head.
        head: its config.
        field: dotted config field of the dataset.
        dataset: MMSeg dataset, or MMSeg's wrapper around several.
    """
    num_classes, ignored = int(head.get("num_classes", 0)), head.get("ignore_index", 255)
    return [
        *find_wrong_counts(head_field, head, field, dataset),
        *_find_wrong_ignored_ids(head_field, ignored, field, dataset),
        *_find_wrong_padding(num_classes, ignored, field, dataset),
    ]


def find_class_name_faults(datasets: Mapping[str, Any]) -> dict[str, str]:
    """Dotted config field -> what is wrong where the ids of a dataset stand for other classes than in the first one."""
    first = next(iter(datasets))
    names = datasets[first].CLASSES
    faults = {}
    for field, dataset in datasets.items():
        for leaf in leaf_datasets(dataset):
            pairs = zip(leaf.CLASSES, names, strict=False)
            differ = [(index, own, other) for index, (own, other) in enumerate(pairs) if own != other]
            if differ:
                ids, here, there = (name_some(column, _NAMED_AT_MOST) for column in zip(*differ, strict=True))
                faults[field] = (
                    f"the classes {ids} are {here} in {field}, but {there} in {first}: scores would go by the wrong "
                    "names. Give both the same `classes` in the same order."
                )
    return faults


def find_wrong_counts(head_field: str, head: Mapping[str, Any], field: str, dataset: Any) -> Iterator[str]:
    """What of `find_misfits` matters without annotations too: the numbers of classes and colours."""
    num_classes, names, palette = int(head.get("num_classes", 0)), dataset.CLASSES, dataset.PALETTE
    if len(names) != num_classes:
        yield (
            f"{head_field}.num_classes is {num_classes}, but {field} ({type(dataset).__name__}) has {len(names)} "
            f"classes: {name_some(names, 12)}. Make them equal: set {head_field}.num_classes={len(names)}, or correct "
            f"{field}.classes."
        )
    elif num_classes == 1:
        yield (
            f"{head_field}.num_classes is 1: with no class beside '{names[0]}' there is nothing to learn. Give "
            "everything else a class too (ids 0 and 1, num_classes=2); for one channel of scores add out_channels=1 "
            "and a loss with use_sigmoid=True."
        )
    if palette is not None and len(palette) != len(names):
        yield f"{field}.palette has {len(palette)} colours for {len(names)} classes. Give each one, or leave it out."


def _find_wrong_ignored_ids(head_field: str, ignored: int, field: str, dataset: Any) -> Iterator[str]:
    others = sorted({leaf.ignore_index for leaf in leaf_datasets(dataset)} - {ignored})
    if others:
        listed = ", ".join(map(str, others))
        yield f"{head_field}.ignore_index is {ignored}, but that of {field} is {listed}. Give both the same."


def _find_wrong_padding(num_classes: int, ignored: int, field: str, dataset: Any) -> Iterator[str]:
    pipelines = [leaf.pipeline.transforms for leaf in leaf_datasets(dataset)]
    labelled = [steps for steps in pipelines if any(isinstance(step, LoadAnnotations) for step in steps)]
    mixing = getattr(dataset, "pipeline", [])  # MultiImageMixDataset's own is a list
    for step in [*itertools.chain(*labelled), *(mixing if isinstance(mixing, list) else [])]:
        value = getattr(step, "seg_pad_val", ignored)
        if value != ignored and not 0 <= value < num_classes:
            yield (
                f"{field}.pipeline: {type(step).__name__} fills labels with {value}, which is neither a class (0 to "
                f"{num_classes - 1}) nor the ignored id {ignored}. Set seg_pad_val={ignored} in that step."
            )
