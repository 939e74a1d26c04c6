from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ds_seg.data.build  # noqa: F401  (registers the datasets)
from ds_seg.data.pairing import Unpaired, count_suffixes, find_unpaired

from mmseg.datasets import build_dataset  # isort: skip

MakeCfg = Callable[..., dict[str, Any]]


def unpaired_of(cfg: dict[str, Any]) -> Unpaired:
    return find_unpaired(build_dataset(cfg), "data.train")


@pytest.fixture
def custom(make_cfg: MakeCfg) -> Callable[..., dict[str, Any]]:
    def make(**changes: Any) -> dict[str, Any]:
        return make_cfg(type="CustomDataset", classes=[str(index) for index in range(11)], **changes)

    return make


def test_a_whole_folder_lacks_nothing(make_cfg: MakeCfg) -> None:
    assert unpaired_of(make_cfg()) == Unpaired([], [], [], [], "", "")


def test_files_that_are_missing_on_either_side(make_cfg: MakeCfg, folder: Path) -> None:
    (folder / "annotations/train/street_2.png").unlink()
    (folder / "images/train/street_4.jpg").rename(folder / "images/train/street_4.JPG")
    found = unpaired_of(make_cfg())
    assert found.absent_annotations == ["street_2.png"] and found.annotation_hint == ""
    assert found.orphaned_annotations == ["street_4.png"]
    assert found.unread_images == ["street_4.JPG"]


def test_an_image_that_no_split_lists_is_no_orphan(make_cfg: MakeCfg, folder: Path) -> None:
    (folder / "train.txt").write_text("street_0\nstreet_9\n")
    found = unpaired_of(make_cfg(split="train.txt"))
    assert (found.absent_images, found.orphaned_annotations) == (["street_9.jpg"], [])


def test_the_suffix_of_annotations_is_found(custom: MakeCfg, folder: Path) -> None:
    for path in (folder / "annotations/train").iterdir():
        path.rename(path.with_name(f"{path.stem}_mask.tif"))
    shutil.copy(folder / "annotations/train/street_1_mask.tif", folder / "annotations/train/street_10_mask.tif")
    found = unpaired_of(custom())
    assert len(found.absent_annotations) == 7
    assert (
        found.annotation_hint == "street_0_mask.tif is there: set data.train.seg_map_suffix='_mask.tif' (it is '.png')."
    )
    assert unpaired_of(custom(seg_map_suffix="_mask.tif")).absent_annotations == []


def test_the_suffix_of_listed_images_is_found(custom: MakeCfg, folder: Path) -> None:
    (folder / "train.txt").write_text("street_0\n")
    found = unpaired_of(custom(split="train.txt", img_suffix=".png"))
    assert found.image_hint == "street_0.jpg is there: set data.train.img_suffix='.jpg' (it is '.png')."
    (folder / "train.txt").write_text("street_0.jpg\n")
    found = unpaired_of(custom(split="train.txt"))
    assert found.image_hint.startswith("street_0.jpg is there: lines of a split file are names without their suffix.")


def test_a_second_suffix_is_not_told_to_replace_the_first(custom: MakeCfg, folder: Path) -> None:
    (folder / "train.txt").write_text("street_0\nstreet_1\nstreet_2\n")
    (folder / "images/train/street_1.jpg").rename(folder / "images/train/street_1.png")
    found = unpaired_of(custom(split="train.txt"))
    assert found.image_hint == (
        "street_1.png is there, but a dataset has one suffix, and data.train.img_suffix is '.jpg': save all files in "
        "one format, or leave those of the other out with a split file."
    )
    (folder / "images/train/street_1.png").rename(folder / "images/train/street_1\nb.jpg")
    found = unpaired_of(custom(split="train.txt"))
    assert (found.absent_images, found.image_hint) == (["street_1.jpg"], "")


@pytest.mark.parametrize("line", ["street_0.jpg street_0.png", "street_0 1"])
def test_lines_of_several_columns_are_explained(custom: MakeCfg, folder: Path, line: str) -> None:
    (folder / "train.txt").write_text(f"{line}\n")
    hint = f"'{line}' is more than a name: each line of a split file is one name without suffix. Remove the rest."
    found = unpaired_of(custom(split="train.txt"))
    assert (found.image_hint, found.annotation_hint) == (hint, hint if "png" not in line else "")


def test_images_and_masks_in_one_folder(custom: MakeCfg, folder: Path) -> None:
    for path in (folder / "annotations/train").iterdir():
        path.rename(folder / "images/train" / path.name)
    found = unpaired_of(custom(ann_dir="images/train"))
    assert found == Unpaired([], [], [], [], "", "")
    assert count_suffixes(str(folder / "images/train")) == [(".jpg", 7), (".png", 7)]
    (folder / "images/train/street_0.jpg").unlink()
    assert count_suffixes(str(folder / "images/train")) == [(".png", 7), (".jpg", 6)]


def test_masks_in_a_folder_among_the_images_are_no_images(custom: MakeCfg, folder: Path) -> None:
    shutil.move(folder / "annotations/train", folder / "images/train/masks")
    assert unpaired_of(custom(ann_dir="images/train/masks")).unread_images == []


def test_what_is_not_on_a_disk_and_what_pairs_by_its_own_rule_is_left_alone(make_cfg: MakeCfg, folder: Path) -> None:
    (folder / "annotations/train/street_2.png").unlink()
    leaf = build_dataset(make_cfg())
    leaf.img_infos[0]["ann"]["seg_map"] = "street_1.png"
    (folder / "images/train/street_4.jpg").unlink()
    assert find_unpaired(leaf, "data.train").orphaned_annotations == []
    leaf.file_client_args = {"backend": "petrel"}
    assert find_unpaired(leaf, "data.train") == Unpaired([], [], [], [], "", "")
