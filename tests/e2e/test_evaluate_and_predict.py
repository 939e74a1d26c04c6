"""What a trained checkpoint is for: scores, masks and overlays, with any number of processes."""

import json

import numpy as np
import pytest
from PIL import Image

from ds_seg.data.demo_dataset import DemoScenesDataset


def scores(path):
    content = json.loads(path.read_text())
    return {name: value for name, value in content.items() if name.startswith("eval/")}


@pytest.mark.parametrize("processes", [1, 2])
def test_evaluate_repeats_the_scores_of_the_training(cli, trained, tiny_config, tmp_path, processes):
    done = cli(
        "evaluate", tiny_config, trained, "--out", tmp_path / "scores.json", processes=processes, launcher="torchrun"
    )
    assert done.returncode == 0, done.stderr
    assert "mIoU" in done.stdout and "building" in done.stdout
    summary = json.loads((trained / "summary.json").read_text())
    found = scores(tmp_path / "scores.json")
    assert found["eval/mIoU"] == pytest.approx(summary["mIoU"], abs=1e-12)
    assert {f"eval/IoU/{name}": iou for name, iou in summary["IoU"].items()} == {
        name: value for name, value in found.items() if "/IoU/" in name
    }


def test_test_time_augmentation_runs_and_changes_the_scores(cli, trained, tiny_config, tmp_path):
    done = cli("evaluate", tiny_config, trained, "--tta", "--window-batch", "2", "--out", tmp_path / "tta.json")
    assert done.returncode == 0, done.stderr
    plain = json.loads((trained / "summary.json").read_text())["mIoU"]
    assert scores(tmp_path / "tta.json")["eval/mIoU"] not in (None, plain)


def test_predict_writes_a_mask_and_an_overlay_for_every_image(cli, trained, tiny_config, scenes, tmp_path):
    folder = scenes / "images" / "validation"
    single = scenes / "images" / "training" / "scene_00009.jpg"
    done = cli(
        "predict", tiny_config, trained, folder, single, "--out", tmp_path / "out", processes=2, launcher="torchrun"
    )
    assert done.returncode == 0, done.stderr
    assert "wrote 7 masks and overlays" in done.stdout
    names = {path.stem for path in folder.iterdir()} | {single.stem}
    for kind in ("masks", "overlays"):
        assert {path.stem for path in (tmp_path / "out" / kind).iterdir()} == names
    mask, image = Image.open(tmp_path / "out" / "masks" / "scene_00009.png"), Image.open(single)
    assert mask.size == image.size and mask.mode == "P"
    assert set(np.unique(np.array(mask))) <= set(range(len(DemoScenesDataset.CLASSES)))
    assert mask.getpalette()[:3] == list(DemoScenesDataset.PALETTE[0])
