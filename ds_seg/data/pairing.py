"""Which images and annotations of a dataset lack each other, and the suffix that would have found them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import ds_seg.openmmlab  # noqa: F401
from ds_seg.data.pair_files import is_on_disk

from mmseg.datasets import CustomDataset  # isort: skip

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm")


@dataclass(frozen=True)
class Unpaired:
    """File names relative to the dataset's folders, forward slashes between them."""

    absent_images: list[str]
    """Listed in a split file, and not there."""
    absent_annotations: list[str]
    """An image needs them, and they are not there."""
    orphaned_annotations: list[str]
    """There is no image for them."""
    unread_images: list[str]
    """Images that the dataset leaves out because their names end otherwise than its img_suffix."""
    image_hint: str
    """What would find the absent images; empty if nothing is known."""
    annotation_hint: str
    """What would find the absent annotations; empty if nothing is known."""


def find_unpaired(leaf: CustomDataset, field: str) -> Unpaired:
    """Compare what a dataset lists with what is in its folders.

    Args:
        leaf: a dataset that reads files; one that doesn't read them from a disk is not looked at.
        field: dotted config field of the dataset, for the hints.
    """
    if not is_on_disk(leaf.file_client_args):
        return Unpaired([], [], [], [], "", "")
    images, annotations = _list_files(leaf.img_dir), set() if leaf.ann_dir is None else _list_files(leaf.ann_dir)
    absent_images = _absent((info["filename"] for info in leaf.img_infos), images)
    absent_annotations, orphans = [], []
    if leaf.ann_dir is not None:
        absent_annotations = _absent((info["ann"]["seg_map"] for info in leaf.img_infos), annotations)
        orphans = _find_orphans(leaf, images, annotations)
    return Unpaired(
        absent_images,
        absent_annotations,
        orphans,
        _find_unread(leaf, images),
        _hint(absent_images, leaf, leaf.img_suffix, images, f"{field}.img_suffix"),
        _hint(absent_annotations, leaf, leaf.seg_map_suffix, annotations, f"{field}.seg_map_suffix"),
    )


def count_suffixes(folder: str) -> list[tuple[str, int]]:
    """The suffixes of the files under a folder and how often each occurs, the most frequent first."""
    counts = Counter(Path(name).suffix for name in _list_files(folder))
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _absent(wanted: Iterable[str], present: set[str]) -> list[str]:
    return [name for name in wanted if os.path.normpath(name) not in present]


def _find_orphans(leaf: CustomDataset, images: set[str], annotations: set[str]) -> list[str]:
    suffix = leaf.seg_map_suffix
    if any(
        info["ann"]["seg_map"] != info["filename"].replace(leaf.img_suffix, suffix) for info in leaf.img_infos
    ):  # this dataset pairs its files by a rule of its own
        return []
    named = sorted(name for name in annotations if name.endswith(suffix))
    return [name for name in named if name[: len(name) - len(suffix)] + leaf.img_suffix not in images]


def _find_unread(leaf: CustomDataset, images: set[str]) -> list[str]:
    shared = leaf.ann_dir is not None and Path(leaf.ann_dir).resolve().is_relative_to(Path(leaf.img_dir).resolve())
    read = (leaf.img_suffix, leaf.seg_map_suffix) if shared else (leaf.img_suffix,)
    return sorted(name for name in images if name.lower().endswith(IMAGE_SUFFIXES) and not name.endswith(read))


def _hint(absent: list[str], leaf: CustomDataset, suffix: str, present: set[str], field: str) -> str:
    """The cure if the first absent file is there under another suffix, which all have or some."""
    if not absent:
        return ""
    stem = os.path.normpath(absent[0].removesuffix(suffix))
    if stem in present:
        return f"{stem} is there: lines of a split file are names without their suffix. Remove it from each line."
    first, *others = stem.split()
    if others and {first, first + suffix} & present:
        return f"'{stem}' is more than a name: each line of a split file is one name without suffix. Remove the rest."
    others = [name.removeprefix(stem) for name in present if name.startswith(stem)]
    others = sorted((other for other in others if not other[0].isalnum()), key=lambda other: (len(other), other))
    if others and len(absent) == len(leaf.img_infos):
        return f"{stem}{others[0]} is there: set {field}='{others[0]}' (it is '{suffix}')."
    format_alone = [other for other in others if other.rpartition(".")[0] == suffix.rpartition(".")[0]]
    if not format_alone:
        return ""
    return (
        f"{stem}{format_alone[0]} is there, but a dataset has one suffix, and {field} is '{suffix}': save all files in "
        "one format, or leave those of the other out with a split file."
    )


def _list_files(folder: str) -> set[str]:
    """Paths of all files under `folder`, relative to it."""
    return {
        os.path.relpath(f"{parent}/{name}", folder)
        for parent, _, names in os.walk(folder, followlinks=True)
        for name in names
    }
