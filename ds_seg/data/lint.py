"""A check of a dataset's files before anything is trained on them."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from tqdm import tqdm

import ds_seg.openmmlab  # noqa: F401
from ds_seg.data.build import leaf_datasets, sample_paths
from ds_seg.data.label_rules import LabelRule, add_counts, explain_wrong_ids
from ds_seg.data.pair_files import PairFiles, PairReport, inspect_pair
from ds_seg.errors import DataError
from ds_seg.supervision.progress import ticking

from mmseg.datasets import CustomDataset  # isort: skip
from mmseg.datasets.pipelines import LoadAnnotations  # isort: skip

_NAMED_AT_MOST = 5
_BROKEN_FILES = "Replace the files that can't be used, or leave their images out with a split file."
_ANY_8_BIT_ID = 256
"""Classes of which every id of an 8-bit mask names one."""
_REPLACEABLE = {"unreadable", "damaged", "thin"}
"""Kinds of faults that keep a sample from loading; the others would load, and train on something wrong."""
_CURES = {
    "unpaired": "Add the files that are missing, or remove their counterparts (or leave them out with a split file).",
    "unreadable": _BROKEN_FILES,
    "damaged": _BROKEN_FILES,
    "thin": "Leave images with a side of 1 px out with a split file.",
    "size": "An annotation must have as many pixels as its image: make it again at the image's size. If the sides are "
    "swapped, an EXIF orientation turns the image alone: store it turned, without that tag.",
    "colours": "Turn masks in colour into ids as docs/own-data.md, 'Masks in colour', shows.",
    "duplicate": "Remove the images from one of the two splits.",
}
"""Kind of fault -> what to do; other kinds say so themselves."""
TURNED = (
    "an EXIF orientation turns or mirrors them, and their size does not tell whether the annotations were made so. If "
    "not, store the images without that tag"
)
"""Of pairs whose report says `turned`, with the cure."""


class Checked(NamedTuple):
    """What a check has found that may be."""

    bad: list[str]
    """What is wrong with files that can't be read."""
    pixels_by_rule: dict[LabelRule, Counter[int]]
    """How often each id occurs in the annotations that follow a rule."""
    turned: list[str]
    """Images that may lie otherwise than their annotations."""


def validate_annotations(
    dataset: Any, *, num_classes: int, rank: int, world_size: int, threads: int, progress: bool, most_bad: int = 0
) -> Checked:
    """Read every image and annotation of this rank's share, every `world_size`-th, and name the bad ones.

    Damage inside a JPEG or PNG that leaves its end in place is not found; `ds-seg doctor` looks for it.

    Args:
        dataset: MMSeg dataset, or MMSeg's wrapper around several.
        num_classes: Class ids must lie in 0..num_classes - 1 once label 0 is reduced, or be ignored.
        rank: Of this process.
        world_size: Processes that share the check.
        threads: Files read at a time.
        progress: Whether to show a bar.
        most_bad: Images that may be unreadable, or have an unreadable annotation; other faults are never tolerated.

    Raises:
        DataError: some files can't be used; says how many, names the first, and what to do.
    """
    pairs = describe_pairs(dataset, num_classes)[rank::world_size]
    with ThreadPoolExecutor(threads) as pool:
        results = pool.map(lambda pair: inspect_pair(pair, decode_image=False), pairs)
        reports = list(show_progress(results, total=len(pairs), label="checking files", shown=progress))
    bad = [report for report in reports if report.faults]
    kinds = {fault.kind for report in bad for fault in report.faults}
    if len(bad) <= most_bad and kinds <= _REPLACEABLE:
        messages = [fault.message for report in bad for fault in report.faults]
        turned = [pair.image_path for pair, report in zip(pairs, reports, strict=True) if report.turned]
        return Checked(messages, count_ids(pairs, reports), turned)
    lines = [f"  {fault.message}" for report in bad[:_NAMED_AT_MOST] for fault in report.faults]
    if len(bad) > _NAMED_AT_MOST:
        lines.append(f"  and {len(bad) - _NAMED_AT_MOST} more")
    share = "" if world_size == 1 else f" in the share of rank {rank} of {world_size}"
    raise DataError(
        f"{len(bad)} of {len(pairs)} images{share} can't be used with {num_classes} classes:\n"
        + "\n".join([*lines, *find_cures(kinds), *explain_ids(pairs, reports)])
    )


def find_pair_faults(leaf: CustomDataset, index: int, *, decode_image: bool) -> list[str]:
    """What keeps one image and its annotation from being read, whatever classes the ids stand for.

    Args:
        leaf: The dataset that reads the files.
        index: Of the sample in `leaf`.
        decode_image: Whether to decode the image too.

    Returns:
        One sentence a fault, each with the path; empty if the pair can be read.
    """
    report = inspect_pair(_describe_pair(leaf, index, label_rule(leaf, _ANY_8_BIT_ID)), decode_image=decode_image)
    return [fault.message for fault in report.faults]


def describe_pairs(dataset: Any, num_classes: int) -> list[PairFiles]:
    """The files of every sample, once each where a wrapper repeats them.

    Args:
        dataset: MMSeg dataset, or MMSeg's wrapper around several.
        num_classes: Number of classes after label 0 is reduced.
    """
    return [
        _describe_pair(leaf, index, label_rule(leaf, num_classes))
        for leaf in leaf_datasets(dataset)
        for index in range(len(leaf))
    ]


def label_rule(leaf: CustomDataset, num_classes: int) -> LabelRule:
    """How a dataset turns the ids in its annotations into classes."""
    label_map = tuple(sorted((leaf.label_map or {}).items()))
    return LabelRule(num_classes, leaf.ignore_index, bool(leaf.reduce_zero_label), label_map)


def explain_ids(pairs: Iterable[PairFiles], reports: Iterable[PairReport]) -> list[str]:
    """Why annotations hold ids outside the classes and what to do, a sentence or two for each rule they follow."""
    explained = (explain_wrong_ids(found, rule) for rule, found in count_ids(pairs, reports).items())
    return [explanation for explanation in explained if explanation]


def count_ids(pairs: Iterable[PairFiles], reports: Iterable[PairReport]) -> dict[LabelRule, Counter[int]]:
    """How often each id occurs in the annotations that follow a rule."""
    return add_counts({pair.rule: report.pixels_by_id or {}} for pair, report in zip(pairs, reports, strict=True))


def find_cures(kinds: Collection[str]) -> list[str]:
    """What to do about kinds of faults, a sentence each; ids outside the classes are `explain_ids`' affair."""
    cures = (cure for kind, cure in _CURES.items() if kind in kinds)
    return list(dict.fromkeys(cures))


def show_progress(results: Iterable[PairReport], *, total: int, label: str, shown: bool) -> Iterable[PairReport]:
    """Pass results on, with a bar on standard error that stays quiet in log files."""
    interval_s = 0.1 if sys.stderr.isatty() else 15.0
    return tqdm(ticking(results), total=total, desc=label, unit="image", disable=not shown, mininterval=interval_s)


def _describe_pair(leaf: CustomDataset, index: int, rule: LabelRule) -> PairFiles:
    image_path, annotation_path = sample_paths(leaf, index)
    return PairFiles(image_path, annotation_path, rule, _annotation_decoder(leaf), dict(leaf.file_client_args))


def _annotation_decoder(leaf: CustomDataset) -> str:
    """Of the pipeline that trains, else of the evaluation."""
    loaders = [step for step in leaf.pipeline.transforms if isinstance(step, LoadAnnotations)]
    return str((loaders or [leaf.gt_seg_map_loader])[0].imdecode_backend)
