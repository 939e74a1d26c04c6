from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from ds_seg.data import demo_scenes
from ds_seg.data.build import build_dataset
from ds_seg.data.demo_dataset import DemoScenesDataset
from ds_seg.data.demo_scenes import draw_scene, write_demo_dataset
from ds_seg.data.lint import validate_annotations
from ds_seg.data.pair_files import read_image_size
from ds_seg.errors import DataError

from mmcv import Config  # isort: skip

SMALL = {"train_images": 6, "val_images": 3, "size_px": 140}


def read_files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_layout_is_ade20k_and_files_depend_on_the_seed_alone(tmp_path: Path) -> None:
    write_demo_dataset(tmp_path / "a", **SMALL, workers=1)
    write_demo_dataset(tmp_path / "b", **SMALL, workers=3)
    write_demo_dataset(tmp_path / "c", **SMALL, seed=1)
    first = read_files(tmp_path / "a")
    assert sum(name.startswith("images/training/") and name.endswith(".jpg") for name in first) == 6
    assert sum(name.startswith("annotations/validation/") and name.endswith(".png") for name in first) == 3
    assert first == read_files(tmp_path / "b")
    other = read_files(tmp_path / "c")
    assert first.keys() == other.keys()
    assert all(first[name] != other[name] for name in first)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_splits_and_scenes_differ() -> None:
    pictures = [draw_scene(0, split, index, 140)[0] for split in (0, 1) for index in (0, 1)]
    assert len({picture.tobytes() for picture in pictures}) == 4
    assert len({picture.shape for picture in pictures}) > 1


def test_every_class_occurs_and_regions_have_an_ignored_outline() -> None:
    labels = [draw_scene(0, 0, index, 196)[1] for index in range(30)]
    counts = sum(np.bincount(label.ravel(), minlength=7) for label in labels)
    shares = counts / counts.sum()
    assert len(shares) == 7
    assert shares[1:].min() > 0.08
    assert 0.03 < shares[0] < 0.15
    for label in labels:
        sideways = (label[:, 1:] != label[:, :-1]) & (label[:, 1:] > 0) & (label[:, :-1] > 0)
        assert not sideways.any()


def test_colour_alone_does_not_tell_classes_apart() -> None:
    means = {class_id: [] for class_id in range(1, 7)}
    for index in range(80):
        picture, label = draw_scene(0, 0, index, 140)
        for class_id in np.unique(label[label > 0]):
            means[int(class_id)].append(picture[label == class_id].mean(0))
    features = np.concatenate([np.stack(rows) for rows in means.values()])
    classes = np.concatenate([[class_id] * len(rows) for class_id, rows in means.items()])
    centres = np.stack([np.stack(rows).mean(0) for rows in means.values()])
    nearest = 1 + ((features[:, None] - centres[None]) ** 2).sum(-1).argmin(1)
    assert 0.2 < (nearest == classes).mean() < 0.6  # measured 0.36; chance is 0.17


def test_patch_14_resolution_is_fine_enough() -> None:
    confusion = np.zeros((6, 6), np.int64)
    for index in range(20):
        label = draw_scene(0, 1, index, 196)[1]
        height_px, width_px = (size // 14 * 14 for size in label.shape)
        label = label[:height_px, :width_px]
        onehot = (label[..., None] == np.arange(1, 7)).astype(np.float32)
        cells = onehot.reshape(height_px // 14, 14, width_px // 14, 14, 6).mean((1, 3))
        guess = np.repeat(np.repeat(cells, 14, 0), 14, 1).argmax(-1)
        kept = label > 0
        confusion += np.bincount((label[kept] - 1) * 6 + guess[kept], minlength=36).reshape(6, 6)
    iou = np.diag(confusion) / (confusion.sum(0) + confusion.sum(1) - np.diag(confusion))
    assert iou.mean() > 0.8  # measured 0.87 in whole patches; 0.97 with bilinear interpolation


def test_complete_dataset_is_left_alone_and_other_parameters_replace_it(tmp_path: Path) -> None:
    root = tmp_path / "deep" / "demo"
    write_demo_dataset(root, **SMALL)
    marked = root / "images/training/scene_00000.jpg"
    before = marked.stat().st_mtime_ns
    write_demo_dataset(root, **SMALL)
    assert marked.stat().st_mtime_ns == before
    write_demo_dataset(root, **{**SMALL, "train_images": 2})
    assert len(list((root / "images/training").iterdir())) == 2
    assert [path.name for path in root.parent.iterdir()] == ["demo"]


def test_interrupted_write_leaves_no_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(demo_scenes, "draw_scene", stop)
        with pytest.raises(KeyboardInterrupt):
            write_demo_dataset(tmp_path / "demo", **SMALL)
    assert not (tmp_path / "demo").exists()
    write_demo_dataset(tmp_path / "demo", **SMALL)
    assert len(list((tmp_path / "demo/images/training").iterdir())) == 6


@pytest.mark.parametrize("as_file", [True, False])
def test_foreign_folder_is_never_overwritten(tmp_path: Path, as_file: bool) -> None:
    root = tmp_path / "photos"
    foreign = root if as_file else root / "holiday.jpg"
    foreign.parent.mkdir(exist_ok=True)
    foreign.write_bytes(b"mine")
    with pytest.raises(DataError, match=r"photos: something is there that is not a demo dataset .*Name an empty"):
        write_demo_dataset(root, **SMALL)
    assert foreign.read_bytes() == b"mine"


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match=r"can't be written to .*/file/demo: .*Name another folder"):
        write_demo_dataset(tmp_path / "file" / "demo", **SMALL)


def test_default_size_takes_seconds(tmp_path: Path) -> None:
    start = time.process_time()
    write_demo_dataset(tmp_path / "demo")
    assert time.process_time() - start < 12  # measured 2 to 4 s of processor time
    sizes = {read_image_size(path.read_bytes()) for path in (tmp_path / "demo/images/validation").iterdir()}
    assert len(sizes) > 20


def test_demo_config_builds_and_is_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_demo_dataset(tmp_path, **SMALL)
    monkeypatch.setenv("DS_SEG_DEMO_ROOT", str(tmp_path))
    cfg = Config.fromfile(str(Path(__file__).parents[3] / "ds_configs/datasets/demo.py"))
    train = build_dataset(cfg.data.train, role="train")
    val = build_dataset(cfg.data.val, role="val")
    assert isinstance(train, DemoScenesDataset)
    assert len(train.CLASSES) == len(train.PALETTE) == 6
    assert len(train) == 6
    assert len(val) == 3
    sample = train[0]
    assert sample["img"].data.shape == (3, 112, 112)
    assert set(np.unique(sample["gt_semantic_seg"].data)) <= {0, 1, 2, 3, 4, 5, 255}
    assert all(size % 14 == 0 for size in val[0]["img"][0].shape[1:])
    for dataset in (train, val):
        validate_annotations(dataset, num_classes=6, rank=0, world_size=1, threads=2, progress=False)
