from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ds_seg.data.build import build_dataset, build_datasets, leaf_datasets, resolve_sample, sample_paths
from ds_seg.data.camvid import CamVidDataset
from ds_seg.data.demo_dataset import DemoScenesDataset
from ds_seg.errors import ConfigError, DataError

from mmseg.datasets import DATASETS, PIPELINES  # isort: skip

MakeCfg = Callable[..., dict[str, Any]]


class OnlyNumbers:
    """A dataset that is none of MMSeg's."""

    CLASSES = PALETTE = None

    def __len__(self) -> int:
        return 1


class Albu:
    """A step that has steps of another library."""

    def __init__(self, transforms: list[dict[str, Any]]) -> None:
        pass


def test_builds_without_touching_the_config(make_cfg: MakeCfg) -> None:
    cfg = make_cfg(img_dir=["images/train"] * 2, ann_dir=["annotations/train"] * 2, separate_eval=False)
    before = copy.deepcopy(cfg)
    assert len(build_dataset(cfg, role="train")) == 14
    assert cfg == before
    assert build_dataset(make_cfg("val"), role="val").test_mode


def test_images_of_any_size_may_be_read(make_cfg: MakeCfg, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    build_dataset(make_cfg(), role="train")
    assert Image.MAX_IMAGE_PIXELS is None


def test_wrappers_resolve_to_the_files(make_cfg: MakeCfg) -> None:
    repeated = {"type": "RepeatDataset", "times": 3, "dataset": make_cfg()}
    dataset = build_dataset([make_cfg(), repeated], role="train")
    assert len(dataset) == 28
    assert [len(leaf) for leaf in leaf_datasets(dataset)] == [7, 7]
    for index in (2, 7 + 2, 7 + 7 + 2):
        leaf, inner = resolve_sample(dataset, index)
        assert inner == 2
        assert sample_paths(leaf, inner)[0].endswith("images/train/street_2.jpg")
        assert sample_paths(leaf, inner)[1].endswith("annotations/train/street_2.png")


def test_cityscapes_datasets_are_joined_too(make_cfg: MakeCfg, folder: Path) -> None:
    part = make_cfg(type="CityscapesDataset", img_suffix=".jpg", seg_map_suffix=".png")
    assert len(build_dataset([part, part], role="train")) == 14


def test_a_concatenation_is_written_as_a_list(make_cfg: MakeCfg) -> None:
    joined = {"type": "ConcatDataset", "datasets": [make_cfg(), make_cfg()]}
    with pytest.raises(
        ConfigError, match=r"data\.train\.dataset\.type is 'ConcatDataset', .*: data\.train\.dataset=\["
    ):
        build_dataset({"type": "RepeatDataset", "times": 2, "dataset": joined}, role="train")


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for registry, part in ((DATASETS, OnlyNumbers), (PIPELINES, Albu)):
        monkeypatch.setitem(registry.module_dict, part.__name__, part)


@pytest.mark.usefixtures("registered")
def test_a_dataset_of_another_kind_than_mmsegs(make_cfg: MakeCfg) -> None:
    for cfg in ({"type": "OnlyNumbers"}, [make_cfg(), {"type": "OnlyNumbers"}]):
        with pytest.raises(
            ConfigError, match=r"^data\.train: OnlyNumbers is no dataset .* Derive it from CustomDataset"
        ):
            build_dataset(cfg, role="train")


@pytest.mark.usefixtures("registered")
def test_what_a_step_of_the_users_own_is_made_of_is_not_judged(make_cfg: MakeCfg) -> None:
    step = {"type": "Albu", "transforms": [{"type": "HorizontalFlip", "p": 0.5}]}
    assert len(build_dataset(make_cfg(pipeline=[*make_cfg()["pipeline"], step]), role="train")) == 7


def test_missing_folders_are_named_with_field_path_and_remedy(make_cfg: MakeCfg, folder: Path) -> None:
    with pytest.raises(DataError) as caught:
        build_dataset(make_cfg(img_dir="images/trian", ann_dir="labels", split="train.txt"), role="train")
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert f"data.train.img_dir: there is no folder {folder}/images/trian." in lines[0]
    assert "--cfg-options data.train.data_root=" in lines[0]
    assert f"data.train.ann_dir: there is no folder {folder}/labels" in lines[1]
    assert f"data.train.split: there is no file {folder}/train.txt" in lines[2]


def test_a_root_that_is_missing_is_one_line_of_each_role(make_cfg: MakeCfg, tmp_path: Path) -> None:
    absent = str(tmp_path / "absent")
    with pytest.raises(DataError) as caught:
        build_datasets({"train": make_cfg(data_root=absent), "val": make_cfg("val", data_root=absent)})
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    for line, role in zip(lines, ("train", "val"), strict=True):
        assert line.startswith(f"data.{role}.data_root: there is no folder {absent}. Put the dataset there")
        assert f"--cfg-options data.{role}.data_root=FOLDER" in line


def test_missing_folder_inside_wrappers(make_cfg: MakeCfg) -> None:
    cfg = [make_cfg(), {"type": "RepeatDataset", "times": 2, "dataset": make_cfg(img_dir="none")}]
    with pytest.raises(DataError, match=r"^data\.train\[1\]\.dataset\.img_dir: there is no folder .*/none\."):
        build_dataset(cfg, role="train")


def test_suffix_that_no_image_has(make_cfg: MakeCfg) -> None:
    cfg = make_cfg(type="CustomDataset", img_suffix=".tif", classes=[str(index) for index in range(11)])
    with pytest.raises(
        DataError, match=r"data\.val: no image with suffix '\.tif' in .*: \.jpg \(7\)\. Set data\.val\."
    ):
        build_dataset({**cfg, "pipeline": make_cfg("val")["pipeline"]}, role="val")


def test_empty_folder(make_cfg: MakeCfg, folder: Path) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match=r"no image with suffix '\.jpg' in .*/empty; found there: no file at all"):
        build_dataset(make_cfg(img_dir="empty"), role="train")


def test_images_without_annotation_are_counted_and_named(make_cfg: MakeCfg, folder: Path) -> None:
    for index in (1, 4):
        (folder / f"annotations/train/street_{index}.png").unlink()
    message = r"without an annotation in .*: 2 of 7 files are missing \(street_1\.png, street_4\.png\)\. Add the files"
    with pytest.raises(DataError, match=message):
        build_dataset(make_cfg(), role="train")
    for path in (folder / "annotations/train").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"7 of 7 .*street_4\.png, \.\.\.\)"):
        build_dataset(make_cfg("test"), role="test")


def test_split_that_lists_absent_images(make_cfg: MakeCfg, folder: Path) -> None:
    (folder / "train.txt").write_text("street_0\nstreet_9\n")
    (folder / "annotations/train/street_9.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"data\.train\.split lists images that are not in .*1 of 2 .*street_9\.jpg"):
        build_dataset(make_cfg(split="train.txt"), role="train")
    (folder / "train.txt").write_text("street_0\n")
    assert len(build_dataset(make_cfg(split="train.txt"), role="train")) == 1


def test_unknown_types_are_gathered_with_the_nearest_names(make_cfg: MakeCfg) -> None:
    pipeline = copy.deepcopy(make_cfg("val")["pipeline"])
    pipeline[0]["type"] = "LoadImageFromFiles"
    pipeline[1]["transforms"][0]["type"] = "mmdet.Resize"
    del pipeline[1]["transforms"][1]["type"]
    with pytest.raises(ConfigError) as caught:
        build_dataset(make_cfg(type="CamvidDataset", pipeline=pipeline), role="val")
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    assert "data.val.type is 'CamvidDataset', which is no registered dataset. Nearest: CamVidDataset" in lines[0]
    assert "custom_imports" in lines[0]
    assert "data.val.pipeline[0].type is 'LoadImageFromFiles'" in lines[1]
    assert "Nearest: LoadImageFromFile" in lines[1]
    assert "data.val.pipeline[1].transforms[0].type is 'mmdet.Resize'" in lines[2]
    assert "data.val.pipeline[1].transforms[1] has no `type`" in lines[3]


def test_argument_that_does_not_fit(make_cfg: MakeCfg) -> None:
    for changes, message in (
        ({"ann_dri": "x"}, r"data\.train\.ann_dri: unknown key\. Did you mean 'ann_dir'\? .*Correct data\.train"),
        ({"pipeline": [{"type": "RandomFlip", "prob": 2.0}]}, r"CamVidDataset: RandomFlip: assert prob >= 0 and prob"),
    ):
        with pytest.raises(ConfigError, match=rf"data\.train can't be built: {message}"):
            build_dataset(make_cfg(**changes), role="train")


@pytest.mark.parametrize(("key", "value"), [("img_dir", 5), ("split", ["a.txt", 3]), ("img_suffix", True)])
def test_a_folder_or_suffix_that_is_no_text(make_cfg: MakeCfg, key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^data\.train\.{key}: got (5|3|True), want text\.$"):
        build_dataset(make_cfg(**{key: value}), role="train")


@pytest.mark.parametrize("pipeline", ["abc", 5, ["LoadImageFromFile"]])
def test_a_pipeline_that_is_no_list_of_steps(make_cfg: MakeCfg, pipeline: Any) -> None:
    with pytest.raises(ConfigError, match=r"^data\.train\.pipeline: got .*, want a list of steps, such as \[dict"):
        build_dataset(make_cfg(pipeline=pipeline), role="train")


def test_joined_datasets_number_their_classes_alike(make_cfg: MakeCfg) -> None:
    for changes in ({"classes": list(CamVidDataset.CLASSES[::-1])}, {"ignore_index": 254}):
        with pytest.raises(ConfigError, match=r"^data\.train joins datasets that number their classes differently: "):
            build_dataset([make_cfg(), make_cfg(**changes)], role="train")


def test_annotations_are_needed_to_train_but_not_to_predict(make_cfg: MakeCfg) -> None:
    with pytest.raises(ConfigError, match=r"data\.train\.ann_dir is not set, and train needs annotations"):
        build_dataset(make_cfg(ann_dir=None), role="train")
    dataset = build_dataset(make_cfg("test", ann_dir=None), role="test")
    assert sample_paths(*resolve_sample(dataset, 0))[1] is None


def test_label_0_must_mean_the_same_in_training_and_evaluation(make_cfg: MakeCfg) -> None:
    pipeline = copy.deepcopy(make_cfg()["pipeline"])
    pipeline[1]["reduce_zero_label"] = True
    with pytest.raises(ConfigError, match=r"reduce_zero_label=True, but CamVidDataset has reduce_zero_label=False"):
        build_dataset(make_cfg(pipeline=pipeline), role="train")


def test_classes_must_be_named(make_cfg: MakeCfg) -> None:
    cfg = make_cfg(type="CustomDataset")
    with pytest.raises(
        ConfigError, match=r"data\.train\.classes is not set, and CustomDataset has no classes of its own"
    ):
        build_dataset(cfg, role="train")


def test_classes_of_one_name_are_refused(make_cfg: MakeCfg) -> None:
    with pytest.raises(ConfigError, match=r"data\.train\.classes names 'a', 'c' more than once, and scores go by name"):
        build_dataset(make_cfg(type="FoldersDataset", classes=list("acba" + "c")), role="train")


def test_some_of_a_datasets_classes(make_cfg: MakeCfg, folder: Path) -> None:
    dataset = build_dataset(make_cfg(classes=["road", "sky"]), role="train")
    label = np.arange(44 * 60, dtype=np.uint8).reshape(44, 60) % 12
    label[label == 11] = 255
    Image.fromarray(label).save(folder / "annotations/train/street_0.png")
    results = {"ann_info": dataset.get_ann_info(0)}
    dataset.pre_pipeline(results)
    loaded = dataset.pipeline.transforms[1](results)["gt_semantic_seg"]
    road, sky = CamVidDataset.CLASSES.index("road"), CamVidDataset.CLASSES.index("sky")
    assert (loaded == np.where(label == road, 0, np.where(label == sky, 1, 255))).all()
    assert dataset[1]["gt_semantic_seg"].data.shape == (1, 28, 28)


def test_picked_classes_where_label_0_is_reduced(make_cfg: MakeCfg) -> None:
    cfg = make_cfg(type="DemoScenesDataset", classes=["water", "tree"])
    cfg["pipeline"] = [
        {**step, **({"reduce_zero_label": True} if "reduce_zero_label" in step else {})} for step in cfg["pipeline"]
    ]
    with pytest.raises(ConfigError, match=r"picks or reorders classes of DemoScenesDataset, whose label 0 is reduced"):
        build_dataset(cfg, role="train")
    cfg["classes"] = list(DemoScenesDataset.CLASSES)
    assert len(build_dataset(cfg, role="train")) == 7


def test_a_suffix_that_would_find_the_files_is_named(make_cfg: MakeCfg, folder: Path) -> None:
    cfg = make_cfg(type="CustomDataset", classes=list("abcdefghijk"))
    message = r"7 of 7 files are .*street_0\.png is there: set data\.train\.seg_map_suffix='\.png' \(it is '_mask"
    with pytest.raises(DataError, match=message):
        build_dataset({**cfg, "seg_map_suffix": "_mask.png"}, role="train")
    with pytest.raises(
        DataError, match=r"found there: \.jpg \(7\)\. Set data\.train\.img_suffix='\.jpg' \(where its type"
    ):
        build_dataset({**cfg, "img_suffix": ".jpeg"}, role="train")
    (folder / "train.txt").write_text("street_0.jpg\n")
    with pytest.raises(
        DataError, match=r"street_0\.jpg\.jpg\)\. street_0\.jpg is there: lines of a split file are names wi"
    ):
        build_dataset({**cfg, "split": "train.txt"}, role="train")
    (folder / "train.txt").write_text("")
    with pytest.raises(
        DataError, match=r"split .*train\.txt lists no image\. Write a name without suffix on each line"
    ):
        build_dataset({**cfg, "split": "train.txt"}, role="train")
