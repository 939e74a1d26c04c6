"""One image with its annotation on the disk, and everything that can be wrong with the two.

Training's check at start and the dataset doctor both ask here. Neither torch nor MMCV is imported for files
on disks, so that a doctor's worker process starts in a moment.

OpenCV half-decodes a damaged JPEG without a word to its caller, and numpy wraps a label above 255, so such
files would be trained on; here they are named.

Shape legend: H, W are an image's height and width in px; C are channels.
"""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from ds_seg.data.label_rules import OUTSIDE, LabelRule
from ds_seg.errors import name_some

_EXIF_ORIENTATION = 0x0112
_FIRST_OF_SWAPPED_SIDES = 5
_DECODER_ERRORS = (OSError, SyntaxError, ValueError)
_FILE_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
_FILE_BEGINS = {"JPEG": b"\xff\xd8\xff", "PNG": b"\x89PNG"}
_DAMAGE = ("Corrupt JPEG data", "Premature end of JPEG")
_messages: IO[bytes] | None = None
"""Where what libjpeg says goes, in a process that keeps track of it."""


class Fault(NamedTuple):
    """Something that keeps a file from being used."""

    kind: str
    """"unreadable", "damaged", "thin", "size", "colours", "format" or "ids"."""
    path: str
    message: str


@dataclass(frozen=True)
class PairFiles:
    """Paths of a sample and all that is needed to read them as the dataset does."""

    image_path: str
    annotation_path: str | None
    rule: LabelRule
    decoder: str = "pillow"
    """MMCV's name of what decodes the annotation."""
    file_client: Mapping[str, Any] = field(default_factory=lambda: {"backend": "disk"}, compare=False)
    """MMCV's file_client_args."""


@dataclass(frozen=True)
class PairReport:
    """What was found in a pair."""

    faults: tuple[Fault, ...]
    size_HW: tuple[int, int] | None
    """Of the image in px; None if it can't be read."""
    pixels_by_id: Mapping[int, int] | None
    """How often each id occurs in the annotation; None where there is none or it can't be read."""
    digest: bytes | None
    """Equal for images of equal pixels; None if they were not decoded, or all have one colour."""
    turned: bool = False
    """Whether an EXIF orientation turns or mirrors the image and its size can't tell if the annotation follows."""


def inspect_pair(pair: PairFiles, *, decode_image: bool) -> PairReport:
    """Read an image and its annotation and say what is wrong.

    Args:
        pair: the files.
        decode_image: Whether to decode the image too; without that, damage inside a JPEG or PNG that leaves its
            end in place is not found.
    """
    size_HW, turned, digest, image_fault = _inspect_image(pair, decode_image)
    faults = [] if image_fault is None else [image_fault]
    if pair.annotation_path is None:
        return PairReport(tuple(faults), size_HW, None, digest)
    if size_HW is not None and min(size_HW) == 1:
        message = f"{size_HW[1]} x {size_HW[0]} px (width x height), and MMSeg's LoadAnnotations drops a side of 1 px"
        faults.append(_fault("thin", "image", pair.image_path, message))
    label_HW, fault = _read_annotation(pair, pair.annotation_path)
    if label_HW is None:
        return PairReport((*faults, *([fault] if fault else [])), size_HW, None, digest)
    pixels_by_id = _count_ids(label_HW)
    if size_HW is not None and label_HW.shape != size_HW:
        message = (
            f"{label_HW.shape[1]} x {label_HW.shape[0]} px (width x height), but its image {pair.image_path} has "
            f"{size_HW[1]} x {size_HW[0]} px"
        )
        faults.append(_fault("size", "annotation", pair.annotation_path, message))
    wrong = [label for label in pixels_by_id if pair.rule.class_of(label) == OUTSIDE]
    if wrong:
        message = f"ids {name_some(wrong, 8)} are outside the classes {pair.rule.describe_allowed()}"
        faults.append(_fault("ids", "annotation", pair.annotation_path, message))
    return PairReport(tuple(faults), size_HW, pixels_by_id, digest, turned)


def is_on_disk(file_client: Mapping[str, Any]) -> bool:
    """Whether MMCV's `file_client_args` read plain files, which may be listed and opened; its default."""
    return file_client.get("backend", "disk") == "disk"


def read_image_size(content: bytes) -> tuple[int, int]:
    """Height and width in px that the image has once its EXIF orientation is applied, as OpenCV does.

    Raises:
        OSError: the bytes are no image.
    """
    return _read_header(content)[0]


def validate_whole(path: str) -> None:
    """Refuse a JPEG or PNG file that was cut short, which OpenCV decodes in part; reads little but its end.

    Raises:
        OSError: the file can't be read, or is cut short.
    """
    with Path(path).open("rb") as file:
        begin = file.read(max(map(len, _FILE_BEGINS.values())))
        kind = next((kind for kind, magic in _FILE_BEGINS.items() if begin.startswith(magic)), None)
        if kind is None:
            return
        end = _FILE_ENDS[kind]
        file.seek(-min(len(end), file.seek(0, os.SEEK_END)), os.SEEK_END)
        if file.read() == end:
            return
        file.seek(0)
        _check_file(file.read())  # bytes after the image's end are no damage


def accept_large_images() -> None:
    """Lift Pillow's limit on pixels in this process: it is meant for strangers' uploads, not for a user's own files."""
    Image.MAX_IMAGE_PIXELS = None


def start_worker() -> None:
    """Prepare a process that does nothing but inspect: one thread, and libjpeg's messages kept for `inspect_pair`.

    libjpeg reports damage that it can decode around on file descriptor 2 only; OpenCV 5.0 and Pillow 13 pass
    nothing of it on.
    """
    global _messages
    accept_large_images()
    cv2.setNumThreads(1)
    _messages = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process lives
    os.dup2(_messages.fileno(), 2)


def _read_header(content: bytes) -> tuple[tuple[int, int], bool]:
    """The size that `read_image_size` tells, and `PairReport.turned`."""
    with Image.open(io.BytesIO(content)) as image:
        width_px, height_px = image.size
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    if orientation >= _FIRST_OF_SWAPPED_SIDES:
        return (width_px, height_px), width_px == height_px
    return (height_px, width_px), orientation > 1


def _inspect_image(pair: PairFiles, decode: bool) -> tuple[tuple[int, int] | None, bool, bytes | None, Fault | None]:
    """Size, `PairReport.turned`, digest and fault."""
    path = pair.image_path
    content, fault = _read_bytes(pair, path, "image")
    if content is None:
        return None, False, None, fault
    try:
        size_HW, turned = _read_header(content)
        _check_file(content)
    except _DECODER_ERRORS as error:
        return None, False, None, _decoder_fault("image", path, content, error)
    if not decode:
        return size_HW, turned, None, None
    image_HWC, damage = _decode_image(content)
    if image_HWC is None or damage:
        reason = f"truncated or damaged: {damage}" if damage else "OpenCV can't decode it; save it as JPEG or PNG"
        return size_HW, turned, None, _fault("damaged", "image", f"{path} ({len(content)} bytes)", reason, path)
    return size_HW, turned, _digest(image_HWC), None


def _check_file(content: bytes) -> str | None:
    """The format of an image; a decoder's error if it is cut short, or a PNG's checksums don't fit."""
    with Image.open(io.BytesIO(content)) as image:
        end = _FILE_ENDS.get(image.format or "")
        if end is None or not content.endswith(end):
            image.load()
        elif image.format == "PNG":
            image.verify()
        return image.format


def _decode_image(content: bytes) -> tuple[np.ndarray | None, str]:
    """The pixels as training decodes them, and what libjpeg has to say about damage, or an empty string."""
    if _messages is not None:
        _messages.seek(0)
        _messages.truncate()
    try:
        image_HWC = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error as error:
        return None, str(error)
    if _messages is None:
        return image_HWC, ""
    _messages.seek(0)
    lines = _messages.read().decode(errors="replace").splitlines()
    return image_HWC, next((line for line in lines if line.startswith(_DAMAGE)), "")


def _digest(image_HWC: np.ndarray) -> bytes | None:
    first = image_HWC[0, 0]
    if (image_HWC[0] == first).all() and (image_HWC == first).all():
        return None
    pixels = np.ascontiguousarray(image_HWC).data
    return hashlib.sha256(pixels, usedforsecurity=False).digest() + repr(image_HWC.shape).encode()


def _read_annotation(pair: PairFiles, path: str) -> tuple[np.ndarray | None, Fault | None]:
    content, fault = _read_bytes(pair, path, "annotation")
    if content is None:
        return None, fault
    try:
        file_format = _check_file(content)
        label = _decode_annotation(content, pair.decoder)
    except _DECODER_ERRORS as error:
        return None, _decoder_fault("annotation", path, content, error)
    if label is None:  # OpenCV's way to say that it can't
        return None, _decoder_fault("annotation", path, content, UnidentifiedImageError())
    label = label if label.ndim == 2 else label.squeeze()
    if label.ndim != 2:
        kind, message = _explain_channels(content, label, pair.decoder)
        return None, _fault(kind, "annotation", path, message)
    if file_format == "JPEG":
        return None, _fault("format", "annotation", path, "a JPEG, whose compression changes ids: write masks as PNG")
    if label.dtype.kind not in "bui":
        message = f"holds numbers of type {label.dtype}, but class ids are whole numbers: write masks as 8-bit PNG"
        return None, _fault("format", "annotation", path, message)
    return label, None


def _decode_annotation(content: bytes, decoder: str) -> np.ndarray | None:
    if decoder == "pillow":
        with Image.open(io.BytesIO(content)) as image:
            return np.asarray(image)
    import ds_seg.openmmlab  # noqa: F401

    import mmcv  # isort: skip

    return mmcv.imfrombytes(content, flag="unchanged", backend=decoder)


def _explain_channels(content: bytes, label_HWC: np.ndarray, decoder: str) -> tuple[str, str]:
    """Kind and message for an annotation of several channels."""
    with Image.open(io.BytesIO(content)) as image:
        has_palette = image.mode == "P"
    channels = label_HWC.shape[-1]
    if has_palette:
        return "format", (
            f"stored with a palette, which imdecode_backend='{decoder}' turns into colours: give LoadAnnotations "
            "imdecode_backend='pillow', which reads the ids"
        )
    transparency = channels in (2, 4)
    if (label_HWC[..., : channels - transparency] == label_HWC[..., :1]).all():
        return "format", (
            f"{channels} channels of equal content{' beside transparency' if transparency else ''}, but class ids take "
            "one: save one of them, say with Pillow's Image.open(path).getchannel(0).save(path)"
        )
    colours = len(np.unique(label_HWC.reshape(-1, channels), axis=0))
    return "colours", f"{channels} channels: {colours} colours in place of class ids, which take one 8-bit channel"


def _count_ids(label_HW: np.ndarray) -> dict[int, int]:
    if label_HW.dtype == np.uint8:
        counts = np.bincount(label_HW.ravel(), minlength=256)
        return {int(label): int(counts[label]) for label in np.flatnonzero(counts)}
    ids, counts = np.unique(label_HW, return_counts=True)
    return {int(label): int(count) for label, count in zip(ids, counts, strict=True)}


def _read_bytes(pair: PairFiles, path: str, kind: str) -> tuple[bytes | None, Fault | None]:
    try:
        content = _load_bytes(pair.file_client, path)
    except OSError as error:
        return None, _fault("unreadable", kind, path, f"can't be read: {error.strerror or error}")
    return (content, None) if content else (None, _fault("unreadable", kind, path, "the file is empty"))


def _load_bytes(file_client: Mapping[str, Any], path: str) -> bytes:
    if is_on_disk(file_client):
        return Path(path).read_bytes()
    import ds_seg.openmmlab  # noqa: F401

    from mmcv import FileClient  # isort: skip

    return bytes(FileClient(**file_client).get(path))


def _decoder_fault(kind: str, path: str, content: bytes, error: Exception) -> Fault:
    reason = "not an image" if isinstance(error, UnidentifiedImageError) else f"truncated or damaged: {error}"
    return _fault("damaged", kind, f"{path} ({len(content)} bytes)", reason, path)


def _fault(fault: str, kind: str, where: str, message: str, path: str | None = None) -> Fault:
    return Fault(fault, path or where, f"{kind} {where}: {message}")
