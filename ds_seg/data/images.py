"""Images without a dataset: what `ds-seg predict` reads, and what a program hands over as an array.

Shape suffixes: H, W pixels; 3 RGB.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import ds_seg.openmmlab  # noqa: F401
from ds_seg.config.data_section import evaluation_role
from ds_seg.data.build import describe_missing_classes, find_type_faults
from ds_seg.data.evaluation_samples import EvaluationSample, make_evaluation_sample
from ds_seg.data.lint import find_pair_faults
from ds_seg.data.pair_files import accept_large_images
from ds_seg.data.pairing import IMAGE_SUFFIXES
from ds_seg.errors import ConfigError, DataError

from mmseg.datasets import DATASETS, CustomDataset  # isort: skip
from mmseg.datasets.pipelines import Compose  # isort: skip


class ImageFiles(CustomDataset):
    """MMSeg's dataset over a list of files, in test mode and without annotations.

    Args:
        paths: image files.
        pipeline: MMSeg test pipeline.
        classes: class names, or a file with one a line.
        palette: RGB colour of each class; None draws random ones.
    """

    def __init__(self, paths: Sequence[Path], pipeline: Any, classes: str | Sequence[str], palette: Any) -> None:
        self.paths = paths
        classes = classes if isinstance(classes, str) else list(classes)
        super().__init__(pipeline=pipeline, img_dir="", test_mode=True, classes=classes, palette=palette)

    def load_annotations(self, *_args: object) -> list[dict[str, str]]:
        """List the files, in place of looking through a folder."""
        return [{"filename": str(path)} for path in self.paths]


class ArrayPipeline:
    """MMSeg's test pipeline for images that are in memory already.

    Args:
        pipeline: MMSeg test pipeline; its first step reads a file.

    Raises:
        ConfigError: the first step is another one, or a step can't be built.
    """

    def __init__(self, pipeline: Sequence[Mapping[str, Any]]) -> None:
        first = pipeline[0] if pipeline else {}
        if first.get("type") != "LoadImageFromFile":
            raise ConfigError(
                f"the test pipeline begins with {first.get('type', 'nothing')!r}, and an image in memory can only take "
                "the place of LoadImageFromFile. Begin data.test.pipeline with dict(type='LoadImageFromFile')."
            )
        self._dtype = np.float32 if first.get("to_float32") else np.uint8
        try:
            self._steps = Compose([dict(step) for step in pipeline[1:]])
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"the test pipeline can't be built: {error}. Import the module that registers its steps first."
            ) from error

    def __call__(self, index: int, image_HW3: np.ndarray) -> EvaluationSample:
        """The views of an RGB image, as if it had been read from a file without loss."""
        image_bgr_HW3 = np.ascontiguousarray(image_HW3[:, :, ::-1]).astype(self._dtype)
        sample: dict[str, Any] = {
            "filename": None,
            "ori_filename": None,
            "img": image_bgr_HW3,
            "seg_fields": [],
            "scale_factor": 1.0,
            "img_norm_cfg": {"mean": np.zeros(3, np.float32), "std": np.ones(3, np.float32), "to_rgb": False},
        }
        sample |= dict.fromkeys(("img_shape", "ori_shape", "pad_shape"), image_bgr_HW3.shape)
        return make_evaluation_sample(index, self._steps(sample))


def open_images(data: Mapping[str, Any], paths: Sequence[Path]) -> ImageFiles:
    """Files with the pipeline, classes and palette of `data.test`, or of `data.val` where there is none.

    Raises:
        ConfigError: a type in that config is not registered, or it names no classes.
    """
    accept_large_images()
    section = inference_section(data)
    classes, palette = _find_classes(section, f"data.{evaluation_role(data)}")
    return ImageFiles(paths, section["pipeline"], classes, palette)


def inference_section(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """The dataset config whose pipeline, classes and palette new images get; the first where several are listed."""
    return _find_first(data[evaluation_role(data)])


def _find_first(section: Any) -> Mapping[str, Any]:
    if isinstance(section, (list, tuple)):
        return _find_first(section[0])
    wrapped = section.get("dataset") or section.get("datasets")
    return _find_first(wrapped) if wrapped else section


def find_images(inputs: Sequence[str]) -> dict[Path, Path]:
    """The images that files and folders name.

    Args:
        inputs: paths; folders are searched through.

    Returns:
        Image path -> the PNG that its results go to, relative to a folder of results.

    Raises:
        DataError: an input does not exist, holds no image, or two images would write the same result.
    """
    found: dict[Path, Path] = {}
    for given in map(Path, inputs):
        if given.is_dir():
            images = sorted(
                path for path in given.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and _is_file(path)
            )
            if not images:
                raise DataError(f"{given} holds no image ({', '.join(IMAGE_SUFFIXES)}). Name another folder.")
            found.update({path: path.relative_to(given).with_suffix(".png") for path in images})
        elif given.is_file():
            found[given] = Path(given.stem + ".png")
        else:
            raise DataError(f"{given} does not exist. INPUT is an image or a folder of images.")
    owners: dict[Path, Path] = {}
    for path, result in found.items():
        other = owners.setdefault(result, path)
        if other != path:
            raise DataError(f"{other} and {path} would both write {result}. Predict them into different folders.")
    return found


def _is_file(path: Path) -> bool:
    """Whether it is a file, or a link to one that is gone, which is to be told; opening a pipe would wait for ever."""
    return path.is_file() or not path.exists()


def validate_images(dataset: ImageFiles) -> None:
    """Check that every image is whole.

    Raises:
        DataError: naming each one that is not.
    """
    faults = [fault for index in range(len(dataset)) for fault in find_pair_faults(dataset, index, decode_image=False)]
    if faults:
        raise DataError("\n".join([f"{len(faults)} of {len(dataset)} images can't be used:", *faults]))


def _find_classes(section: Mapping[str, Any], field: str) -> tuple[str | Sequence[str], Any]:
    """Class names and palette of a dataset config, without opening its folders."""
    if faults := find_type_faults(dict(section), field):
        raise ConfigError("\n".join(faults))
    dataset_class = DATASETS.get(section["type"])
    names = section.get("classes") or dataset_class.CLASSES
    if not names:
        raise ConfigError(describe_missing_classes(field, section["type"]))
    return names, section.get("palette") or (dataset_class.PALETTE if "classes" not in section else None)
