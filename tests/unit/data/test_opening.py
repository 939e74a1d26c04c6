"""What opening the datasets of a run refuses, and what it warns of."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ds_seg.data.opening import open_datasets
from ds_seg.errors import ConfigError, DataError

from mmseg.datasets import DATASETS, CityscapesDataset  # isort: skip

CLASSES = ["ground", "roof", "road"]


@pytest.fixture
def root(tmp_path):
    """Four images, of which two are trained on, with masks of the ids 0, 1 and 2."""
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    for index in range(4):
        Image.fromarray(np.full((8, 9, 3), index, np.uint8)).save(tmp_path / f"images/a{index}.png")
        write_mask(tmp_path, index, np.arange(72).reshape(8, 9) % 3)
    (tmp_path / "train.txt").write_text("a0\na1\n")
    (tmp_path / "val.txt").write_text("a2\na3\n")
    return tmp_path


def write_mask(root, index, ids):
    Image.fromarray(np.broadcast_to(ids, (8, 9)).astype(np.uint8)).save(root / f"masks/a{index}.png")


def open_both(root, classes=CLASSES, roles=("train", "val"), check_data=True, **changes):
    cfg = {
        "type": "FoldersDataset", "data_root": str(root), "img_dir": "images", "ann_dir": "masks", "img_suffix": ".png",
        "pipeline": [{"type": "LoadImageFromFile"}, {"type": "LoadAnnotations"}], "classes": classes,
    }  # fmt: skip
    data = {role: {**cfg, "split": f"{role}.txt", **changes.get(role, {}), **changes.get("both", {})} for role in roles}
    head = {"type": "FCNHead", "num_classes": len(classes)}
    run = SimpleNamespace(data=data, model={"decode_head": head}, check_data=check_data, max_bad_samples=0)
    return open_datasets(run, *roles)


def warnings_of(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]


def test_good_datasets_come_in_order_and_without_a_word(root, capsys):
    assert [Path(dataset.split).name for dataset in open_both(root)] == ["train.txt", "val.txt"]
    assert warnings_of(capsys) == []


def test_images_that_an_exif_orientation_turns(root, capsys):
    picture = Image.open(root / "images/a1.png")
    picture.getexif()[0x0112] = 3
    picture.save(root / "images/a1.png", exif=picture.getexif())
    open_both(root)
    (warning,) = warnings_of(capsys)
    assert warning.startswith(f"warning: data.train: 1 image ({root / 'images/a1.png'}): an EXIF orientation turns or")
    assert warning.endswith("store the images without that tag.")


def test_masks_in_black_and_white(root, capsys):
    for index in range(4):
        write_mask(root, index, np.arange(9) % 2 * 255)
    open_both(root)
    (warning,) = warnings_of(capsys)
    assert warning.startswith("warning: data.train, data.val: The masks hold only 0 and 255")
    open_both(root, roles=("val",))
    assert warnings_of(capsys) == []  # a split alone may lack a class


def test_label_0_that_is_reduced_by_mistake(root, capsys):
    open_both(root, both={"reduce_zero_label": True})
    (warning,) = warnings_of(capsys)
    assert "each taken for its neighbour. Set reduce_zero_label=False" in warning


def test_images_in_both_splits(root, capsys):
    (root / "val.txt").write_text("a0\na3\n")
    open_both(root, check_data=False)
    assert warnings_of(capsys) == [
        f"warning: data.val: 1 of its images are in data.train too ({root / 'images/a0.png'}), so that its scores are "
        "not on unseen images. Remove the images from one of the two splits."
    ]


def test_images_that_a_folder_leaves_out(root, capsys):
    (root / "images/a0.png").rename(root / "images/a0.PNG")
    open_both(root, train={"split": None}, val={"split": "val.txt"})
    warning = next(line for line in warnings_of(capsys) if "left out" in line)
    assert warning == (
        f"warning: data.train: 1 images in {root / 'images'} are left out because they don't end with '.png' (a0.PNG). "
        "Rename them, or correct data.train.img_suffix (where its type takes one)."
    )
    (root / "images/a0.PNG").unlink()
    open_both(root, train={"split": None}, val={"split": "val.txt"})
    assert any(
        f"data.train: 1 annotations in {root / 'masks'} have no image (a0.png). Add" in line
        for line in warnings_of(capsys)
    )


@pytest.mark.parametrize("own", [["pre_eval", "evaluate"], []])
def test_scores_of_a_datasets_own_are_not_asked_for(root, capsys, monkeypatch, own):
    """MMSeg's Cityscapes has an `evaluate` that scores as all do."""
    names = {"CLASSES": CLASSES, "PALETTE": [[0, 0, 0]] * len(CLASSES)}
    kind = type("Mine", (CityscapesDataset,), names | {name: lambda *_: None for name in own})
    monkeypatch.setitem(DATASETS.module_dict, "Mine", kind)
    open_both(root, both={"type": "Mine", "seg_map_suffix": ".png"})
    wanted = "warning: data.val: pre_eval and evaluate of Mine are not called: scores are those of a confusion matrix"
    assert [line.startswith(wanted) for line in warnings_of(capsys)] == [True] * bool(own)


def test_a_split_of_which_nothing_counts(root, capsys):
    for index in (2, 3):
        write_mask(root, index, 255)
    open_both(root)
    assert warnings_of(capsys)[0].startswith("warning: data.val: Every pixel is ignored: only the ids 255 occur.")
    for index in (0, 1):
        write_mask(root, index, 255)
    with pytest.raises(DataError, match=r"^data\.train: Every pixel is ignored: only the ids 255 occur\. Correct"):
        open_both(root)


def test_classes_in_another_order(root):
    message = (
        r"^the classes 0, 2 are road, ground in data\.val, but ground, road in data\.train: scores would go by the "
        r"wrong names\. Give both the same `classes` in the same order\.$"
    )
    with pytest.raises(ConfigError, match=message):
        open_both(root, val={"classes": ["road", "roof", "ground"]})


def test_classes_that_do_not_fit_the_head(root):
    with pytest.raises(ConfigError, match=r"model\.decode_head\.num_classes is 3, but data\.val .* has 2 classes"):
        open_both(root, val={"classes": ["ground", "roof"]})
