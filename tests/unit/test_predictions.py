"""Evaluations of a run whose files are not on a disk: its pictures, and what is found before the first step."""

from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from ds_seg.data.build import build_dataset
from ds_seg.errors import DataError
from ds_seg.evaluation.lockstep import Prediction
from ds_seg.predictions import PredictingEvaluator
from ds_seg.session import try_first_images
from ds_seg.tracking.tracker import Tracker

from mmcv.fileio import BaseStorageBackend, FileClient  # isort: skip

VAULT = {"backend": "vault"}
TEST_CFG = {"mode": "slide", "crop_size": (28, 28), "stride": (14, 14)}
SCALED = [
    {"type": "ImageToTensor", "keys": ["img"]},
    {"type": "Collect", "keys": ["img"], "meta_keys": ("ori_shape", "img_shape")},
]


@FileClient.register_backend("vault", force=True)
class Vault(BaseStorageBackend):
    """Stands for a store of objects: no file of it can be opened by its name."""

    def get(self, filepath):
        return self.find(filepath).read_bytes()

    def get_text(self, filepath):
        raise NotImplementedError

    def join_path(self, *parts):
        return "/".join(parts)

    def list_dir_or_file(self, dir_path, list_dir, list_file, suffix, recursive):
        return sorted(path.name for path in self.find(dir_path).glob(f"*{suffix}"))

    @staticmethod
    def find(name):
        return Path(name.removeprefix("vault:"))


@pytest.fixture
def build(tmp_path):
    """Builds the validation set of two images in a vault."""
    for kind, suffix in (("images", "jpg"), ("masks", "png")):
        (tmp_path / kind).mkdir()
        for index in range(2):
            assert cv2.imwrite(
                str(tmp_path / kind / f"{index}.{suffix}"),
                np.full((28, 42, 3)[: 2 + (kind == "images")], index, np.uint8),
            )

    def build(**changes):
        cfg = {
            "type": "CustomDataset",
            "data_root": f"vault:{tmp_path}",
            "img_dir": "images",
            "ann_dir": "masks",
            "classes": ["ground", "sky"],
            "pipeline": [{"type": "LoadImageFromFile", "file_client_args": VAULT}, *SCALED],
            "file_client_args": VAULT,
            "gt_seg_map_loader_cfg": {"file_client_args": VAULT},
        }
        return build_dataset(cfg | changes, role="val")

    return build


def test_pictures_are_read_from_where_the_dataset_reads_its_images(build):
    dataset, logged = build(), []
    labels_HW = np.zeros((28, 42), np.uint8)

    def evaluate(_engines, on_prediction):
        on_prediction(Prediction(1, labels_HW, {}), labels_HW)
        return "result"

    evaluate.dataset = dataset
    tracker = Tracker()
    tracker.log_pictures = lambda step, pictures: logged.append((step, pictures))
    assert PredictingEvaluator(evaluate, None, tracker)(7) == "result"
    ((step, ((picture, image_HW3, *_),)),) = logged
    assert (step, picture, image_HW3.shape) == (7, "1", (28, 42, 3)) and (image_HW3 == 1).all()


def test_annotations_that_an_evaluation_could_not_read_are_found_before_it(build):
    run = SimpleNamespace(model=SimpleNamespace(test_cfg=TEST_CFG, backbone={}), patch_size=14)
    try_first_images(run, build())
    with pytest.raises(DataError, match=r"masks/0\.png\) can be read, but its pipeline failed: FileNotFoundError"):
        try_first_images(run, build(gt_seg_map_loader_cfg=None))
