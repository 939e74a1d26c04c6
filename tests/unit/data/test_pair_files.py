from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

import ds_seg.data.pair_files as pair_files
from ds_seg.data.label_rules import LabelRule
from ds_seg.data.pair_files import PairFiles, accept_large_images, inspect_pair, read_image_size, start_worker

RULE = LabelRule(num_classes=11)


def pair_of(folder: Path, index: int = 2, decoder: str = "pillow") -> PairFiles:
    image, annotation = folder / f"images/train/street_{index}.jpg", folder / f"annotations/train/street_{index}.png"
    return PairFiles(str(image), str(annotation), RULE, decoder)


def faults_of(pair: PairFiles, decode_image: bool = False) -> list[str]:
    return [fault.message for fault in inspect_pair(pair, decode_image=decode_image).faults]


def test_a_worker_process_needs_neither_torch_nor_mmcv(folder: Path) -> None:
    code = (
        "import sys, ds_seg.data.pair_files as p; from ds_seg.data.label_rules import LabelRule; p.start_worker(); "
        f"r = p.inspect_pair(p.PairFiles({str(folder / 'images/train/street_0.jpg')!r}, "
        f"{str(folder / 'annotations/train/street_0.png')!r}, LabelRule(11)), decode_image=True); "
        "assert not r.faults, r; assert not {'torch', 'mmcv', 'mmseg'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_what_a_good_pair_holds_is_counted(folder: Path) -> None:
    report = inspect_pair(pair_of(folder), decode_image=True)
    label = cv2.imread(pair_of(folder).annotation_path or "", cv2.IMREAD_UNCHANGED)
    assert report.faults == () and report.size_HW == (44, 60)
    assert report.pixels_by_id == {int(i): int((label == i).sum()) for i in np.unique(label)}
    assert sum(report.pixels_by_id.values()) == 44 * 60
    assert inspect_pair(pair_of(folder), decode_image=False).digest is None


@pytest.mark.parametrize(
    ("orientation", "size", "turned"),
    [(None, (60, 44), False), (1, (60, 44), False), (2, (60, 44), True), (3, (60, 44), True), (6, (60, 44), False),
     (6, (50, 50), True)],
)  # fmt: skip
def test_an_orientation_that_no_size_gives_away_is_noted(
    folder: Path, orientation: int | None, size: tuple[int, int], turned: bool
) -> None:
    picture = Image.new("RGB", size)
    exif = picture.getexif()
    if orientation:
        exif[0x0112] = orientation
    picture.save(pair_of(folder).image_path, exif=exif)
    assert inspect_pair(pair_of(folder), decode_image=False).turned == turned


def test_images_of_equal_pixels_have_equal_digests(folder: Path) -> None:
    first = inspect_pair(pair_of(folder), decode_image=True)
    pixels = cv2.imread(pair_of(folder).image_path)
    copy = folder / "copy.png"
    cv2.imwrite(str(copy), pixels)
    assert inspect_pair(PairFiles(str(copy), None, RULE), decode_image=True).digest == first.digest is not None
    pixels[3, 4, 1] ^= 1
    cv2.imwrite(str(copy), pixels)
    assert inspect_pair(PairFiles(str(copy), None, RULE), decode_image=True).digest != first.digest
    cv2.imwrite(str(copy), np.full_like(pixels, 7))
    assert inspect_pair(PairFiles(str(copy), None, RULE), decode_image=True).digest is None


@pytest.fixture
def damaged_inside(folder: Path) -> PairFiles:
    """A JPEG whose header and end are as they were, that OpenCV decodes without a word to its caller."""
    path = folder / "images/train/street_2.jpg"
    content = bytearray(path.read_bytes())
    start = content.index(b"\xff\xda") + 20
    content[start : start + 60] = bytes(60)
    path.write_bytes(content)
    assert cv2.imread(str(path)).shape == (44, 60, 3)
    return pair_of(folder)


def test_a_jpeg_that_is_damaged_inside_is_found_in_a_worker_process(damaged_inside: PairFiles) -> None:
    assert faults_of(damaged_inside) == []
    code = (
        "import json, sys, ds_seg.data.pair_files as p; from ds_seg.data.label_rules import LabelRule; "
        "p.start_worker(); found = [p.inspect_pair(p.PairFiles(path, None, LabelRule(11)), decode_image=True) "
        "for path in sys.argv[1:]]; print(json.dumps([[f.message for f in r.faults] for r in found]))"
    )
    good = damaged_inside.image_path.replace("street_2", "street_1")
    done = subprocess.run(
        [sys.executable, "-c", code, damaged_inside.image_path, good], capture_output=True, text=True, timeout=60
    )
    (fault,), no_faults = json.loads(done.stdout)
    assert "street_2.jpg (" in fault and "bytes): truncated or damaged: Corrupt JPEG data" in fault
    assert no_faults == []


def test_start_worker_keeps_what_libjpeg_says(monkeypatch: pytest.MonkeyPatch, damaged_inside: PairFiles) -> None:
    redirected = []
    monkeypatch.setattr(pair_files, "_messages", None)
    monkeypatch.setattr(pair_files.os, "dup2", lambda source, target: redirected.append((source, target)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    threads = cv2.getNumThreads()
    start_worker()
    cv2.setNumThreads(threads)
    assert Image.MAX_IMAGE_PIXELS is None
    assert pair_files._messages is not None and redirected == [(pair_files._messages.fileno(), 2)]
    assert faults_of(damaged_inside, decode_image=True) == []  # libjpeg's words went elsewhere


@pytest.mark.parametrize("shape", [(44, 1), (1, 60), (1, 1)])
def test_a_side_of_one_pixel_is_what_mmseg_drops(folder: Path, shape: tuple[int, int]) -> None:
    pair = pair_of(folder)
    Image.fromarray(np.zeros((*shape, 3), np.uint8)).save(pair.image_path)
    Image.fromarray(np.zeros(shape, np.uint8)).save(pair.annotation_path or "")
    (fault,) = faults_of(pair)
    assert fault.endswith(
        f"{shape[1]} x {shape[0]} px (width x height), and MMSeg's LoadAnnotations drops a side of 1 px"
    )
    assert inspect_pair(PairFiles(pair.image_path, None, RULE), decode_image=True).faults == ()


def test_pillows_limit_is_lifted_for_a_users_own_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    accept_large_images()
    assert faults_of(pair_of(folder), decode_image=True) == []


def test_an_image_that_opencv_can_not_decode(folder: Path) -> None:
    path = folder / "images/train/street_2.jpg"
    Image.open(path).save(path, format="ICO")
    (fault,) = faults_of(pair_of(folder), decode_image=True)[:1]
    assert "street_2.jpg (" in fault and "OpenCV can't decode it; save it as JPEG or PNG" in fault


def test_a_png_whose_checksum_does_not_fit(folder: Path) -> None:
    path = Path(pair_of(folder).annotation_path or "")
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 10] ^= 1
    path.write_bytes(content)
    (fault,) = faults_of(pair_of(folder))
    assert "street_2.png (" in fault and "truncated or damaged" in fault


def test_masks_in_colour_are_told_from_ids_in_three_channels(folder: Path) -> None:
    path = Path(pair_of(folder).annotation_path or "")
    colours = np.zeros((44, 60, 3), np.uint8)
    colours[:9] = (128, 64, 128)
    Image.fromarray(colours).save(path)
    (fault,) = faults_of(pair_of(folder))
    assert fault == f"annotation {path}: 3 channels: 2 colours in place of class ids, which take one 8-bit channel"
    Image.fromarray(np.repeat(colours[..., :1], 3, axis=-1)).save(path)
    (fault,) = faults_of(pair_of(folder))
    assert "3 channels of equal content, but class ids take one" in fault and "getchannel(0).save(path)" in fault
    Image.fromarray(np.dstack([colours[..., 0], np.full((44, 60), 255, np.uint8)])).save(path)
    (fault,) = faults_of(pair_of(folder))
    assert "2 channels of equal content beside transparency, but class ids take one" in fault


def test_a_palette_is_read_as_ids_by_pillow_and_as_colours_by_opencv(folder: Path) -> None:
    path = Path(pair_of(folder).annotation_path or "")
    mask = Image.fromarray(np.eye(44, 60, dtype=np.uint8))
    mask.putpalette([0, 0, 0, 200, 30, 60])
    mask.save(path)
    report = inspect_pair(pair_of(folder), decode_image=False)
    assert report.faults == () and report.pixels_by_id == {0: 44 * 59, 1: 44}
    (fault,) = faults_of(pair_of(folder, decoder="cv2"))
    assert "stored with a palette, which imdecode_backend='cv2' turns into colours" in fault
    assert "give LoadAnnotations imdecode_backend='pillow'" in fault


def test_formats_that_can_not_hold_ids(folder: Path) -> None:
    path = Path(pair_of(folder).annotation_path or "")
    Image.fromarray(np.zeros((44, 60), np.uint8)).save(path, format="JPEG")
    assert "a JPEG, whose compression changes ids: write masks as PNG" in faults_of(pair_of(folder))[0]
    Image.fromarray(np.zeros((44, 60), np.float32)).save(path, format="TIFF")
    assert "holds numbers of type float32, but class ids are whole numbers" in faults_of(pair_of(folder))[0]


def test_files_of_another_storage_are_read_through_mmcv(folder: Path) -> None:
    pair = pair_of(folder)
    stored = PairFiles(pair.image_path, pair.annotation_path, RULE, file_client={"backend": "disk", "db_path": "x"})
    assert stored == pair  # how they are read makes no other file of them
    content = Path(pair.image_path).read_bytes()
    assert pair_files._load_bytes({"backend": "http"}, Path(pair.image_path).as_uri()) == content
    assert read_image_size(content) == Image.open(io.BytesIO(content)).size[::-1]
