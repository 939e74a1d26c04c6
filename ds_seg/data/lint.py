"""A full check of a dataset's files before anything is trained on them.

OpenCV half-decodes a truncated JPEG without a word and numpy wraps a label above 255, so such files
would be trained on; here they are named.

Shape legend: H, W are an image's height and width in px.
"""

from __future__ import annotations

import io
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

import ds_seg.openmmlab  # noqa: F401
from ds_seg.data.build import leaf_datasets, sample_paths
from ds_seg.errors import DataError

import mmcv  # isort: skip
from mmseg.datasets import CustomDataset  # isort: skip

_NAMED_AT_MOST = 5
_EXIF_ORIENTATION = 0x0112
_DECODER_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
_FILE_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}


def validate_annotations(
    dataset: Any, *, num_classes: int, rank: int, world_size: int, threads: int, progress: bool
) -> None:
    """Read every image and annotation of this rank's share, every `world_size`-th, and name the bad ones.

    Damage inside a JPEG or PNG that leaves its end in place is not found.

    Args:
        dataset: MMSeg dataset, or MMSeg's wrapper around several.
        num_classes: Class ids must lie in 0..num_classes - 1 once label 0 is reduced, or be ignored.
        rank: Of this process.
        world_size: Processes that share the check.
        threads: Files read at a time.
        progress: Whether to show a bar.

    Raises:
        DataError: some files can't be used; says how many, and names the first.
    """
    pairs = [(leaf, index) for leaf in leaf_datasets(dataset) for index in range(len(leaf))][rank::world_size]
    with ThreadPoolExecutor(threads) as pool:
        results = pool.map(lambda pair: find_pair_faults(pair[0], pair[1], num_classes), pairs)
        interval_s = 0.1 if sys.stderr.isatty() else 15.0
        checked = tqdm(
            results, total=len(pairs), desc="checking files", unit="file", disable=not progress, mininterval=interval_s
        )
        faults_by_pair = [faults for faults in checked if faults]
    if not faults_by_pair:
        return
    lines = [f"  {fault}" for faults in faults_by_pair[:_NAMED_AT_MOST] for fault in faults]
    if len(faults_by_pair) > _NAMED_AT_MOST:
        lines.append(f"  and {len(faults_by_pair) - _NAMED_AT_MOST} more")
    share = "" if world_size == 1 else f" in the share of rank {rank} of {world_size}"
    raise DataError(
        f"{len(faults_by_pair)} of {len(pairs)} images{share} can't be used with {num_classes} classes:\n"
        + "\n".join(lines)
        + "\nReplace or remove these files, or correct num_classes and reduce_zero_label."
    )


def find_pair_faults(leaf: CustomDataset, index: int, num_classes: int) -> list[str]:
    """What is wrong with one image and its annotation.

    Args:
        leaf: The dataset that reads the files.
        index: Of the sample in `leaf`.
        num_classes: Number of classes after label 0 is reduced.

    Returns:
        One sentence a fault, each with the path; empty if the pair can be used.
    """
    image_path, annotation_path = sample_paths(leaf, index)
    size_HW, fault = _check_image(leaf, image_path)
    faults = [] if fault is None else [fault]
    if annotation_path is None:
        return faults
    label_HW, fault = _read_annotation(leaf, annotation_path)
    if label_HW is None:
        return [*faults, fault or ""]
    if size_HW is not None and label_HW.shape != size_HW:
        faults.append(
            f"annotation {annotation_path}: {label_HW.shape[1]} x {label_HW.shape[0]} px (width x height), but its "
            f"image {image_path} has {size_HW[1]} x {size_HW[0]} px"
        )
    fault = _id_fault(leaf, annotation_path, label_HW, num_classes)
    return faults if fault is None else [*faults, fault]


def read_image_size(content: bytes) -> tuple[int, int]:
    """Height and width in px that the image has once its EXIF orientation is applied, as OpenCV does.

    Raises:
        OSError: the bytes are no image.
    """
    with Image.open(io.BytesIO(content)) as image:
        width_px, height_px = image.size
        turned = image.getexif().get(_EXIF_ORIENTATION, 1) >= 5
    return (width_px, height_px) if turned else (height_px, width_px)


def _check_image(leaf: CustomDataset, path: str) -> tuple[tuple[int, int] | None, str | None]:
    content, fault = _read_bytes(leaf, path, "image")
    if content is None:
        return None, fault
    try:
        size_HW = read_image_size(content)
        with Image.open(io.BytesIO(content)) as image:
            end = _FILE_ENDS.get(image.format or "")
            if end is None or not content.endswith(end):
                image.load()
    except _DECODER_ERRORS as error:
        return None, _decoder_fault("image", path, content, error)
    return size_HW, None


def _read_annotation(leaf: CustomDataset, path: str) -> tuple[np.ndarray | None, str | None]:
    content, fault = _read_bytes(leaf, path, "annotation")
    if content is None:
        return None, fault
    try:
        label = mmcv.imfrombytes(content, flag="unchanged", backend=leaf.gt_seg_map_loader.imdecode_backend)
    except _DECODER_ERRORS as error:
        return None, _decoder_fault("annotation", path, content, error)
    if label is None:  # OpenCV's way to say that it can't
        return None, _decoder_fault("annotation", path, content, UnidentifiedImageError())
    label = label.squeeze()
    if label.ndim != 2:
        return None, f"annotation {path}: {label.shape[-1]} channels, but class ids take one"
    return label, None


def _decoder_fault(kind: str, path: str, content: bytes, error: Exception) -> str:
    reason = "not an image" if isinstance(error, UnidentifiedImageError) else f"truncated or damaged: {error}"
    return f"{kind} {path} ({len(content)} bytes): {reason}"


def _read_bytes(leaf: CustomDataset, path: str, kind: str) -> tuple[bytes | None, str | None]:
    try:
        content = bytes(leaf.file_client.get(path))
    except OSError as error:
        return None, f"{kind} {path}: can't be read: {error.strerror or error}"
    return (content, None) if content else (None, f"{kind} {path}: the file is empty")


def _id_fault(leaf: CustomDataset, path: str, label_HW: np.ndarray, num_classes: int) -> str | None:
    found = _unique_ids(label_HW)
    wrong = [label for label in found if not 0 <= label <= 255 or not _is_allowed(leaf, label, num_classes)]
    if not wrong:
        return None
    first = int(leaf.reduce_zero_label)
    also = f" (0 and {leaf.ignore_index} are ignored)" if first else f" ({leaf.ignore_index} is ignored)"
    allowed = f"{first}..{num_classes - 1 + first}{also}"
    listed = ", ".join(map(str, wrong[:8])) + (", ..." if len(wrong) > 8 else "")
    return f"annotation {path}: ids {listed} are outside the classes {allowed}"


def _unique_ids(label_HW: np.ndarray) -> list[int]:
    if label_HW.dtype == np.uint8:
        return np.flatnonzero(np.bincount(label_HW.ravel(), minlength=256)).tolist()
    return [int(label) for label in np.unique(label_HW)]


def _is_allowed(leaf: CustomDataset, label: int, num_classes: int) -> bool:
    """Whether training and evaluation take `label` for a class or ignore it."""
    if leaf.label_map is not None:
        label = leaf.label_map.get(label, label) % 256
    if leaf.reduce_zero_label:
        label = 255 if label in (0, 255) else label - 1
    return label < num_classes or label == leaf.ignore_index
