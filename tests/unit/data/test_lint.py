from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from ds_seg.data.build import build_dataset
from ds_seg.data.lint import describe_pairs, find_pair_faults, validate_annotations
from ds_seg.data.pair_files import read_image_size
from ds_seg.errors import DataError

MakeCfg = Callable[..., dict[str, Any]]


def check(dataset: Any, *, num_classes: int = 11, rank: int = 0, world_size: int = 1) -> None:
    validate_annotations(dataset, num_classes=num_classes, rank=rank, world_size=world_size, threads=2, progress=False)


def write_label(folder: Path, index: int, label: np.ndarray) -> Path:
    path = folder / f"annotations/train/street_{index}.png"
    Image.fromarray(label).save(path)
    return path


def test_clean_folder_passes_and_shows_progress(make_cfg: MakeCfg, capfd: pytest.CaptureFixture[str]) -> None:
    dataset = build_dataset(make_cfg(), role="train")
    capfd.readouterr()  # MMSeg's own log of what it loaded
    check(dataset)
    assert capfd.readouterr().err == ""
    validate_annotations(dataset, num_classes=11, rank=0, world_size=1, threads=1, progress=True)
    assert "7/7" in capfd.readouterr().err


def test_ids_outside_the_classes_name_file_and_ids(make_cfg: MakeCfg, folder: Path) -> None:
    label = np.zeros((44, 60), np.uint8)
    label[0, :2] = (11, 254)
    path = write_label(folder, 3, label)
    dataset = build_dataset(make_cfg(), role="train")
    with pytest.raises(DataError) as caught:
        check(dataset)
    assert str(caught.value) == (
        "1 of 7 images can't be used with 11 classes:\n"
        f"  annotation {path}: ids 11, 254 are outside the classes 0..10 (255 is ignored)\n"
        "Ids in these files must be rewritten as the numbers of the classes, in the order of `classes`, or as 255 for "
        "pixels that don't count; or correct `classes`, num_classes and reduce_zero_label."
    )
    with pytest.raises(DataError, match=r"ids 254 are outside the classes 0\.\.11"):
        check(dataset, num_classes=12)


def test_label_0_is_reduced_first(make_cfg: MakeCfg, folder: Path) -> None:
    cfg = make_cfg("test", type="CustomDataset", reduce_zero_label=True, classes=[str(index) for index in range(11)])
    dataset = build_dataset(cfg, role="test")
    label = np.arange(44 * 60).reshape(44, 60) % 12
    label[-1] = 255
    write_label(folder, 0, label.astype(np.uint8))
    check(dataset)
    write_label(folder, 0, (label + (label == 11)).astype(np.uint8))
    with pytest.raises(DataError, match=r"ids 12 are outside the classes 1\.\.11 \(0 and 255 are ignored\)"):
        check(dataset)


def test_ids_that_uint8_would_wrap(make_cfg: MakeCfg, folder: Path) -> None:
    label = np.full((44, 60), 257, np.uint16)
    write_label(folder, 0, label)
    with pytest.raises(DataError, match=r"street_0\.png: ids 257 are outside the classes 0\.\.10"):
        check(build_dataset(make_cfg(), role="train"))


def test_annotation_in_colour(make_cfg: MakeCfg, folder: Path) -> None:
    label = np.zeros((44, 60, 3), np.uint8)
    label[0, 0] = (128, 64, 128)
    write_label(folder, 0, label)
    with pytest.raises(
        DataError, match=r"street_0\.png: 3 channels: 2 colours in place of .*\n.*'Masks in colour', sho"
    ):
        check(build_dataset(make_cfg(), role="train"))


def test_sizes_that_differ(make_cfg: MakeCfg, folder: Path) -> None:
    write_label(folder, 0, np.zeros((60, 44), np.uint8))
    with pytest.raises(DataError, match=r"street_0\.png: 44 x 60 px .* its image .*street_0\.jpg has 60 x 44 px"):
        check(build_dataset(make_cfg(), role="train"))


@pytest.mark.parametrize("share", [0.4, 0.9])
@pytest.mark.parametrize("kind", ["images/train/street_2.jpg", "annotations/train/street_2.png"])
def test_truncated_files(make_cfg: MakeCfg, folder: Path, kind: str, share: float) -> None:
    path = folder / kind
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(DataError, match=rf"1 of 7 images .*\n .*{path} \(\d+ bytes\): truncated or damaged: "):
        check(build_dataset(make_cfg(), role="train"))


def test_truncation_that_opencv_does_not_notice(make_cfg: MakeCfg, folder: Path) -> None:
    path = folder / "images/train/street_2.jpg"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * 0.9)])
    assert cv2.imread(str(path)).shape == (44, 60, 3)
    with pytest.raises(DataError, match=r"street_2\.jpg \(\d+ bytes\): truncated"):
        check(build_dataset(make_cfg(), role="train"))


def test_bytes_after_the_end_are_no_fault(make_cfg: MakeCfg, folder: Path) -> None:
    path = folder / "images/train/street_2.jpg"
    path.write_bytes(path.read_bytes() + b"\0 camera's own data")
    check(build_dataset(make_cfg(), role="train"))


@pytest.mark.parametrize("kind", ["images/train/street_2.jpg", "annotations/train/street_2.png"])
def test_files_that_are_no_images(make_cfg: MakeCfg, folder: Path, kind: str) -> None:
    dataset = build_dataset(make_cfg(), role="train")
    path = folder / kind
    path.write_bytes(b"")
    with pytest.raises(DataError, match=rf"{path}: the file is empty"):
        check(dataset)
    path.write_bytes(b"<html>404</html>")
    with pytest.raises(DataError, match=rf"{path} \(16 bytes\): not an image\n"):
        check(dataset)
    path.unlink()
    with pytest.raises(DataError, match=rf"{path}: can't be read: No such file"):
        check(dataset)


def test_annotation_that_opencv_can_not_decode(make_cfg: MakeCfg, folder: Path) -> None:
    (folder / "annotations/train/street_2.png").write_bytes(b"<html>404</html>")
    cfg = make_cfg(gt_seg_map_loader_cfg={"imdecode_backend": "cv2"})
    with pytest.raises(DataError, match=r"street_2\.png \(16 bytes\): not an image\n") as caught:
        check(build_dataset(cfg, role="train"))
    assert "street_2.jpg" not in str(caught.value)


def test_several_faults_come_in_one_message(make_cfg: MakeCfg, folder: Path) -> None:
    for index in range(7):
        write_label(folder, index, np.full((44, 60), 99, np.uint8))
    (folder / "images/train/street_0.jpg").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        check(build_dataset(make_cfg(), role="train"))
    message = str(caught.value)
    assert message.startswith("7 of 7 images can't be used")
    assert message.count("ids 99") == 5
    assert "street_0.jpg: the file is empty" in message
    assert "and 2 more" in message


def test_each_rank_checks_its_share(make_cfg: MakeCfg, folder: Path) -> None:
    write_label(folder, 3, np.full((44, 60), 99, np.uint8))
    dataset = build_dataset(make_cfg(), role="train")
    check(dataset, rank=0, world_size=2)
    with pytest.raises(DataError, match=r"1 of 3 images in the share of rank 1 of 2 can't be used"):
        check(dataset, rank=1, world_size=2)


def test_images_without_annotations_are_checked_too(make_cfg: MakeCfg, folder: Path) -> None:
    dataset = build_dataset(make_cfg("test", ann_dir=None), role="test")
    check(dataset)
    (folder / "images/train/street_2.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"street_2\.jpg: the file is empty"):
        check(dataset)


def test_turned_photograph_has_the_size_that_it_is_loaded_with(make_cfg: MakeCfg, folder: Path) -> None:
    path = folder / "images/train/street_2.jpg"
    picture = Image.open(path)
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(path, exif=exif)
    assert read_image_size(path.read_bytes()) == cv2.imread(str(path)).shape[:2] == (60, 44)
    dataset = build_dataset(make_cfg(), role="train")
    assert any("60 x 44" in fault for fault in find_pair_faults(dataset, 2, decode_image=False))


def test_uncompressed_formats_are_decoded(make_cfg: MakeCfg, folder: Path) -> None:
    for path in (folder / "images/train").iterdir():
        Image.open(path).save(path.with_suffix(".bmp"))
    cfg = make_cfg(type="CustomDataset", img_suffix=".bmp", classes=[str(index) for index in range(11)])
    dataset = build_dataset(cfg, role="train")
    check(dataset)
    path = folder / "images/train/street_2.bmp"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"street_2\.bmp \(\d+ bytes\): truncated"):
        check(dataset)


@pytest.mark.parametrize(
    ("ids", "reduced", "cure"),
    [
        ((1, 2, 3), False, "Ids run from 1 to 3, and 0 never occurs"),
        (
            (0, 1, 2, 3),
            False,
            "the class count is off by one. If every id is a class, name the missing one in `classes`",
        ),
        ((0, 1, 2, 3, 4), True, "the class count is off by one"),
    ],
)
def test_the_cure_of_a_wrong_class_count(
    make_cfg: MakeCfg, folder: Path, ids: tuple[int, ...], reduced: bool, cure: str
) -> None:
    for index in range(7):
        write_label(folder, index, np.resize(np.array(ids, np.uint8), (44, 60)))
    cfg = make_cfg(type="FoldersDataset", classes=["a", "b", "c"], reduce_zero_label=reduced)
    with pytest.raises(DataError) as caught:
        check(build_dataset(cfg, role="train"), num_classes=3)
    assert str(caught.value).splitlines()[-1].startswith(("Ids run up to", "Ids run from"))
    assert cure in str(caught.value)


def test_annotations_are_decoded_as_the_pipeline_does(make_cfg: MakeCfg) -> None:
    assert describe_pairs(build_dataset(make_cfg(), role="train"), 11)[0].decoder == "pillow"
    pipeline = [
        {**step, **({"imdecode_backend": "cv2"} if step["type"] == "LoadAnnotations" else {})}
        for step in make_cfg()["pipeline"]
    ]
    assert describe_pairs(build_dataset(make_cfg(pipeline=pipeline), role="train"), 11)[0].decoder == "cv2"
    cfg = make_cfg("val", gt_seg_map_loader_cfg={"imdecode_backend": "tifffile"})
    assert describe_pairs(build_dataset(cfg, role="val"), 11)[0].decoder == "tifffile"


def test_as_many_unreadable_files_as_stated_are_tolerated_and_no_other_fault(make_cfg: MakeCfg, folder: Path) -> None:
    dataset = build_dataset(make_cfg(), role="train")
    arguments = dict(num_classes=11, rank=0, world_size=1, threads=1, progress=False)
    for index in range(2):
        (folder / f"images/train/street_{index}.jpg").unlink()
    bad = validate_annotations(dataset, **arguments, most_bad=2).bad
    assert len(bad) == 2 and "street_0.jpg: can't be read" in bad[0]
    with pytest.raises(DataError, match="2 of 7 images can't be used"):
        validate_annotations(dataset, **arguments, most_bad=1)
    write_label(folder, 5, np.full((44, 60), 30, np.uint8))
    with pytest.raises(DataError, match="3 of 7 images can't be used"):
        validate_annotations(dataset, **arguments, most_bad=9)
