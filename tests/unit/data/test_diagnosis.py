"""The doctor's survey and diagnosis, on one folder with everything wrong and one with nothing."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

import ds_seg.data.survey as survey_module
from ds_seg.commands import doctor
from ds_seg.data.build import build_dataset
from ds_seg.data.diagnosis import Diagnosis, diagnose
from ds_seg.data.label_rules import LabelRule
from ds_seg.data.pair_files import PairFiles, PairReport, inspect_pair
from ds_seg.data.survey import survey_datasets
from ds_seg.errors import ConfigError, DataError, UserError

MakeCfg = Callable[..., dict[str, Any]]
Doctor = Callable[..., int]


def inspect_here(pairs: list[PairFiles], _workers: int, _progress: bool) -> list[PairReport]:
    return [inspect_pair(pair, decode_image=True) for pair in pairs]


def examine(model: dict[str, Any] | None = None, **cfgs: Any) -> Diagnosis:
    datasets = {f"data.{role}": build_dataset(cfg, role=role, tolerate_missing=True) for role, cfg in cfgs.items()}
    return diagnose(survey_datasets(datasets, workers=1, progress=False), datasets, model)


def findings_of(diagnosis: Diagnosis, kind: str) -> list[str]:
    return [finding.message for finding in diagnosis.findings if finding.kind == kind]


def split_folder(folder: Path, role: str, count: int) -> None:
    """Move the last images of train to another split."""
    for kind, suffix in (("images", "jpg"), ("annotations", "png")):
        (folder / kind / role).mkdir()
        for index in range(7 - count, 7):
            name = f"street_{index}.{suffix}"
            shutil.move(folder / kind / "train" / name, folder / kind / role / name)


@pytest.fixture
def val(make_cfg: MakeCfg, folder: Path) -> dict[str, Any]:
    split_folder(folder, "val", 2)
    return make_cfg("val", img_dir="images/val", ann_dir="annotations/val")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read in this process."""
    monkeypatch.setattr(survey_module, "_inspect_all", inspect_here)


@pytest.mark.usefixtures("quick")
def test_counts_are_those_of_the_files(make_cfg: MakeCfg, folder: Path, val: dict[str, Any]) -> None:
    diagnosis = examine(train=make_cfg(), val=val)
    labels = [np.array(Image.open(path)) for path in sorted((folder / "annotations/train").iterdir())]
    train, other = diagnosis.survey.splits
    assert train.class_pixels == [sum(int((label == i).sum()) for label in labels) for i in range(11)]
    assert train.class_images == [sum(bool((label == i).any()) for label in labels) for i in range(11)]
    assert train.ignored_share == pytest.approx(np.mean([label == 255 for label in labels]), abs=1e-12)
    assert (train.annotated, other.annotated, diagnosis.survey.pairs_read) == (5, 2, 7)
    assert diagnosis.faults == [] and diagnosis.to_dict()["ok"]
    tables = diagnosis.tables()
    assert re.search(r"data\.train \| +5 \| +5 \| +60 x 44 \| +4\.5 % \| +0 ", tables)
    road = 100 * train.class_pixels[3] / sum(train.class_pixels)
    assert re.search(rf"road +\| +{road:.2f} % \| +{train.class_images[3]} \| +\d+\.\d\d % \| +\d \|", tables)
    assert json.loads(json.dumps(diagnosis.to_dict()))["splits"]["data.val"]["images"] == 2


@pytest.mark.usefixtures("quick")
def test_wrappers_are_read_once(make_cfg: MakeCfg) -> None:
    repeated = {"type": "RepeatDataset", "times": 50, "dataset": make_cfg()}
    diagnosis = examine(train=[make_cfg(), repeated])
    assert diagnosis.survey.pairs_read == len(diagnosis.survey.splits[0].pairs) == 7
    assert diagnosis.faults == []


@pytest.mark.usefixtures("quick")
def test_every_kind_of_fault_has_its_file(make_cfg: MakeCfg, folder: Path, val: dict[str, Any]) -> None:
    images, annotations = folder / "images/train", folder / "annotations/train"
    (annotations / "street_0.png").unlink()
    (images / "street_1.jpg").rename(images / "street_1.jpeg")
    (images / "street_2.jpg").write_bytes((images / "street_2.jpg").read_bytes()[:-40])
    Image.fromarray(np.full((9, 9), 99, np.uint8)).save(annotations / "street_3.png")
    Image.fromarray(np.full((44, 60, 3), (9, 8, 7), np.uint8)).save(annotations / "street_4.png")
    diagnosis = examine(train=make_cfg(), val=val)
    found = {finding.kind: finding.path for finding in diagnosis.faults if finding.kind != "unpaired"}
    assert found == {
        "damaged": str(images / "street_2.jpg"),
        "size": str(annotations / "street_3.png"),
        "ids": str(annotations / "street_3.png"),
        "colours": str(annotations / "street_4.png"),
    }
    assert findings_of(diagnosis, "unpaired") == [
        f"{annotations / 'street_0.png'} is not there, but there is an image for it",
        f"{annotations / 'street_1.png'} has no image {images / 'street_1.jpg'}",
    ]
    assert findings_of(diagnosis, "unread") == [f"{images / 'street_1.jpeg'} does not end with '.jpg'"]
    assert any("must be rewritten as the numbers of the classes" in cure for cure in diagnosis.cures)
    assert any(cure.startswith("Turn masks in colour into ids as docs/own-data.md") for cure in diagnosis.cures)
    assert len(diagnosis.cures) == 5
    text = diagnosis.format_findings(diagnosis.faults)
    assert "files are damaged (1):\n  data.train: image " in text


@pytest.mark.usefixtures("quick")
def test_images_in_two_splits(make_cfg: MakeCfg, folder: Path, val: dict[str, Any]) -> None:
    pixels = cv2.imread(str(folder / "images/train/street_1.jpg"))
    shutil.copy(folder / "images/train/street_0.jpg", folder / "images/val/street_5.jpg")
    diagnosis = examine(train=make_cfg(), val=val, test=val)
    (fault,) = diagnosis.faults
    assert (fault.kind, fault.split, fault.path) == (
        "duplicate",
        "data.val, data.test",
        str(folder / "images/val/street_5.jpg"),
    )
    assert fault.message.endswith(f"has the same pixels as {folder / 'images/train/street_0.jpg'} of data.train")
    assert "Remove the images from one of the two splits." in diagnosis.cures
    bmp = {"type": "CustomDataset", "classes": list("abcdefghijk"), "img_suffix": ".bmp"}
    cv2.imwrite(str(folder / "images/val/street_6.bmp"), pixels)
    diagnosis = examine(train=make_cfg(), val={**val, **bmp})
    assert "street_6.bmp has the same pixels as" in findings_of(diagnosis, "duplicate")[0]
    diagnosis = examine(train=make_cfg(), val=make_cfg("val"))
    assert len(findings_of(diagnosis, "duplicate")) == 5
    assert "street_0.jpg is the same file as" in findings_of(diagnosis, "duplicate")[0]


@pytest.mark.usefixtures("quick")
def test_what_may_be_on_purpose_is_a_warning(make_cfg: MakeCfg, folder: Path) -> None:
    shutil.copy(folder / "images/train/street_0.jpg", folder / "images/train/street_1.jpg")
    for path in (folder / "annotations/train").iterdir():
        label = np.array(Image.open(path))
        label[label == 3] = 4
        Image.fromarray(label).save(path)
    Image.fromarray(np.full((44, 60), 255, np.uint8)).save(folder / "annotations/train/street_2.png")
    upside_down = Image.open(folder / "images/train/street_4.jpg")
    upside_down.getexif()[0x0112] = 3
    upside_down.save(folder / "images/train/street_4.jpg", exif=upside_down.getexif())
    diagnosis = examine(train=make_cfg())
    assert diagnosis.faults == []
    assert findings_of(diagnosis, "turned") == [str(folder / "images/train/street_4.jpg")]
    assert findings_of(diagnosis, "absent class") == ["'road' has no pixel: it can't be learned"]
    assert findings_of(diagnosis, "ignored") == [f"{folder / 'annotations/train/street_2.png'} holds only ignored ids"]
    assert len(findings_of(diagnosis, "repeated")) == 1


@pytest.mark.usefixtures("quick")
def test_names_that_a_split_file_lists_more_than_once(make_cfg: MakeCfg, folder: Path) -> None:
    (folder / "train.txt").write_text("street_0\nstreet_1\nstreet_0\nstreet_0\n")
    diagnosis = examine(train=make_cfg(split="train.txt"))
    assert diagnosis.faults == []
    image = folder / "images/train/street_0.jpg"
    assert findings_of(diagnosis, "repeated") == [f"{image} is listed 3 times in {folder / 'train.txt'}"]


@pytest.mark.usefixtures("quick")
def test_an_image_that_a_split_file_lists_and_nobody_has(make_cfg: MakeCfg, folder: Path) -> None:
    (folder / "train.txt").write_text("street_0\nstreet_9\n")
    message, _ = findings_of(examine(train=make_cfg(split="train.txt")), "unpaired")
    assert message == f"{folder / 'images/train/street_9.jpg'} is not there, but {folder / 'train.txt'} lists it"


@pytest.mark.usefixtures("quick")
def test_what_a_class_without_a_pixel_scores(make_cfg: MakeCfg, val: dict[str, Any]) -> None:
    names = [*map(str, range(11)), "absent"]
    diagnosis = examine(val={**val, "type": "FoldersDataset", "classes": names, "img_suffix": ".jpg"})
    message = (
        "'absent' has no pixel: if it is predicted for a labelled pixel, its IoU is 0 and counts in mIoU; else mIoU"
    )
    assert findings_of(diagnosis, "absent class")[-1].startswith(message)


@pytest.mark.usefixtures("quick")
def test_mistakes_that_only_the_whole_dataset_tells(make_cfg: MakeCfg, folder: Path) -> None:
    binary = make_cfg(type="FoldersDataset", classes=["ground", "roof"])
    for path in (folder / "annotations/train").iterdir():
        Image.fromarray(np.eye(44, 60, dtype=np.uint8) * 255).save(path)
    assert "hold only 0 and 255" in findings_of(examine(train=binary), "labels")[0]
    for path in (folder / "annotations/train").iterdir():
        Image.fromarray(np.eye(44, 60, dtype=np.uint8)).save(path)
    assert examine(train=binary).faults == []
    reduced = {**binary, "reduce_zero_label": True}
    assert "each taken for its neighbour" in findings_of(examine(train=reduced, val=reduced), "labels")[0]


@pytest.mark.usefixtures("quick")
def test_a_split_of_which_nothing_counts_is_a_fault(make_cfg: MakeCfg, folder: Path, val: dict[str, Any]) -> None:
    for path in (folder / "annotations/val").iterdir():
        Image.fromarray(np.full((44, 60), 255, np.uint8)).save(path)
    (fault,) = examine(train=make_cfg(), val=val).faults
    assert (fault.kind, fault.split) == ("labels", "data.val") and fault.message.startswith("Every pixel is ignored")


@pytest.mark.usefixtures("quick")
def test_classes_in_another_order_than_in_training(make_cfg: MakeCfg, val: dict[str, Any]) -> None:
    names = list("abcdefghijk")
    own = {"type": "FoldersDataset", "img_suffix": ".jpg"}
    train = make_cfg(**own, classes=names)
    (fault,) = examine(train=train, val={**val, **own, "classes": names[::-1]}).faults
    assert (fault.kind, fault.split) == ("classes", "data.val")
    assert fault.message.startswith(
        "the classes 0, 1, 2, 3, 4, ... are k, j, i, h, g, ... in data.val, but a, b, c, d, e,"
    )


@pytest.mark.usefixtures("quick")
def test_heads_that_do_not_fit(make_cfg: MakeCfg) -> None:
    model = {
        "decode_head": {"type": "FCNHead", "num_classes": 12},
        "auxiliary_head": {"type": "FCNHead", "num_classes": 11, "ignore_index": 0},
    }
    found = findings_of(examine(model, train=make_cfg()), "classes")
    assert "model.decode_head.num_classes is 12, but data.train (CamVidDataset) has 11 classes" in found[0]
    assert "set model.decode_head.num_classes=11, or correct data.train.classes" in found[0]
    assert found[1] == "model.auxiliary_head.ignore_index is 0, but that of data.train is 255. Give both the same."


def test_a_worker_that_is_killed_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey_module, "start_worker", os.abort)
    pairs = [PairFiles(f"image_{index}.jpg", None, LabelRule(2)) for index in range(3)]
    with pytest.raises(
        DataError, match=r"was ended from outside while .* image_0\.jpg on\. .*fewer --workers \(now 1\)"
    ):
        survey_module._inspect_all(pairs, 4, False)


@pytest.fixture
def run_doctor(make_cfg: MakeCfg, tmp_path_factory: pytest.TempPathFactory) -> Doctor:
    """The command on a config of these roles."""

    def run(*, options: tuple[str, ...] = (), **cfgs: Any) -> int:
        path = tmp_path_factory.mktemp("config") / "mine.py"
        path.write_text(f"data = dict({', '.join(f'{role}={cfg!r}' for role, cfg in cfgs.items())})\n")
        parser = argparse.ArgumentParser()
        doctor.add_parser(parser.add_subparsers())
        args = parser.parse_args(["doctor", str(path), "--workers", "2", *options])
        return args.run(args)

    return run


def test_a_clean_dataset_in_real_worker_processes(
    run_doctor: Doctor, make_cfg: MakeCfg, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_doctor(options=("--json", str(tmp_path / "found.json")), train=make_cfg()) == 0
    assert "no fault found" in capsys.readouterr().out
    assert json.loads((tmp_path / "found.json").read_text())["images_read"] == 7


@pytest.mark.usefixtures("quick")
def test_faults_are_an_error_that_names_at_most_a_few_files(
    run_doctor: Doctor, make_cfg: MakeCfg, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for index in range(7):
        Image.fromarray(np.full((44, 60), 11, np.uint8)).save(folder / f"annotations/train/street_{index}.png")
    with pytest.raises(DataError) as caught:
        run_doctor(train=make_cfg())
    message = str(caught.value)
    assert message.startswith("7 faults in the dataset of ") and message.count("ids 11 are outside") == 5
    assert "and 2 more (--json FILE names all)" in message
    assert "the class count is off by one" in message
    assert "'sky' has no pixel" in capsys.readouterr().out


def test_datasets_that_can_not_be_built_are_one_error(run_doctor: Doctor, make_cfg: MakeCfg) -> None:
    with pytest.raises(DataError) as caught:
        run_doctor(train=make_cfg(img_dir="absent"), val=make_cfg("val", ann_dir="gone"))
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("data.train.img_dir: there is no folder") and lines[1].startswith("data.val.ann_dir")
    with pytest.raises(DataError, match=r"7 of 7 files are missing .* set data\.train\.seg_map_suffix='\.png'"):
        run_doctor(train=make_cfg(type="CustomDataset", classes=["a"], seg_map_suffix=".gif"))
    with pytest.raises(ConfigError, match=r"the config has none of data\.train, data\.val, data\.test"):
        run_doctor()


def test_how_the_command_is_not_started(run_doctor: Doctor, make_cfg: MakeCfg, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--workers: got 0, want at least 1"):
        run_doctor(options=("--workers", "0"), train=make_cfg())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="start it alone, without a launcher"):
        run_doctor(train=make_cfg())
