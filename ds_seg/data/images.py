"""Images without a dataset: what `ds-seg predict` reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ds_seg.openmmlab  # noqa: F401
from ds_seg.data.lint import find_pair_faults
from ds_seg.errors import DataError

from mmseg.datasets import DATASETS, CustomDataset  # isort: skip

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


class ImageFiles(CustomDataset):
    """MMSeg's dataset over a list of files, in test mode and without annotations.

    Args:
        paths: image files.
        pipeline: MMSeg test pipeline.
        classes: class names.
        palette: RGB colour of each class; None draws random ones.
    """

    def __init__(self, paths: Sequence[Path], pipeline: Any, classes: Sequence[str], palette: Any) -> None:
        self.paths = paths
        super().__init__(pipeline=pipeline, img_dir="", test_mode=True, classes=list(classes), palette=palette)

    def load_annotations(self, *_args: object) -> list[dict[str, str]]:
        """List the files, in place of looking through a folder."""
        return [{"filename": str(path)} for path in self.paths]


def find_images(inputs: Sequence[str]) -> dict[Path, Path]:
    """The images that files and folders name.

    Args:
        inputs: paths; folders are searched through.

    Returns:
        Image path -> where its results go, relative to the output folder and without a suffix.

    Raises:
        DataError: an input does not exist, holds no image, or two images would write the same result.
    """
    found: dict[Path, Path] = {}
    for given in map(Path, inputs):
        if given.is_dir():
            images = sorted(path for path in given.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
            if not images:
                raise DataError(f"{given} holds no image ({', '.join(IMAGE_SUFFIXES)}). Name another folder.")
            found.update({path: path.relative_to(given).with_suffix("") for path in images})
        elif given.is_file():
            found[given] = Path(given.stem)
        else:
            raise DataError(f"{given} does not exist. INPUT is an image or a folder of images.")
    owners: dict[Path, Path] = {}
    for path, result in found.items():
        other = owners.setdefault(result, path)
        if other != path:
            raise DataError(f"{other} and {path} would both write {result}.png. Predict them into different folders.")
    return found


def validate_images(dataset: ImageFiles) -> None:
    """Check that every image is whole.

    Raises:
        DataError: naming each one that is not.
    """
    faults = [fault for index in range(len(dataset)) for fault in find_pair_faults(dataset, index, num_classes=256)]
    if faults:
        raise DataError("\n".join([f"{len(faults)} of {len(dataset)} images can't be used:", *faults]))


def find_classes(section: Mapping[str, Any]) -> tuple[Sequence[str], Any]:
    """Class names and palette of a dataset config, without opening its folders."""
    dataset_class = DATASETS.get(section["type"])
    names = section.get("classes") or dataset_class.CLASSES
    return names, section.get("palette") or (dataset_class.PALETTE if "classes" not in section else None)
