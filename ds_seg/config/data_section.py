"""The `data` section: what has to be right before a dataset is opened."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ds_seg.config.dialect import list_ignored_names
from ds_seg.config.faults import Faults, list_fields

_ROLES = ("train", "val", "test")
_LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")


def validate_data(data: Mapping[str, Any], patch_px: int, faults: Faults) -> None:
    """Check the `data` section; datasets may be given as a list, which MMSeg puts one after another.

    Args:
        data: the section.
        patch_px: side of the backbone's patch, which must divide every crop.
        faults: gets the messages.
    """
    known = ("samples_per_gpu", "workers_per_gpu", "max_bad_samples", *_ROLES, *_LOADERS)
    faults.section("data", data, (*known, *list_ignored_names("data")))
    for key in _LOADERS:
        if key in data:
            faults.add(
                f"data.{key}",
                "is not read. Remove it, and write samples_per_gpu and workers_per_gpu into `data` itself; evaluation "
                "takes image by image, and evaluation.window_batch windows of it at once.",
            )
    for role in _ROLES:
        datasets = list_fields(f"data.{role}", data.get(role))
        is_missing = not datasets and role != "test"
        if is_missing or not all(isinstance(dataset, Mapping) for _, dataset in datasets):
            faults.add(f"data.{role}", "missing; give the MMSeg dataset that this role reads, or a list of them.")
        for where, step in pipeline_steps(data.get(role), f"data.{role}"):
            if step.get("type") == "RandomCrop":
                faults.size_px(f"{where}.crop_size", step.get("crop_size"), multiple=patch_px)
    _check_lists(data, faults)
    _check_padding(data, faults)
    faults.integer("data.workers_per_gpu", data, 2, minimum=0)


def _check_lists(data: Mapping[str, Any], faults: Faults) -> None:
    """Crops must fit into one batch, and images to predict go through one pipeline."""
    for role in _ROLES:
        (first_field, first), *others = list_fields(f"data.{role}", data.get(role)) or [("", None)]
        for field, dataset in others:
            crop, first_crop = find_crop_size(dataset), find_crop_size(first)
            if role == "train" and crop != first_crop:
                faults.add(field, f"has crop_size {crop}, but {first_field} has {first_crop}. Give all the same.")
            if role != "train" and list_steps(dataset) != list_steps(first):
                faults.add(f"{field}.pipeline", f"differs from {first_field}'s. Give all the same.")


def _check_padding(data: Mapping[str, Any], faults: Faults) -> None:
    """What fills up a crop of a small image must fill it up to the size of all crops."""
    crops: dict[str, Any] = {}
    for where, step in pipeline_steps(data.get("train"), "data.train"):
        pipeline = where.rpartition("[")[0]
        if step.get("type") == "RandomCrop":
            crops[pipeline] = _as_tuple(step.get("crop_size"))
        size = _as_tuple(step.get("size"))
        if step.get("type") == "Pad" and pipeline in crops and size not in (None, crops[pipeline]):
            faults.add(f"{where}.size", f"got {size}, but RandomCrop cuts {crops[pipeline]}. Give both the same.")


def evaluation_role(data: Mapping[str, Any]) -> str:
    """The role that evaluations and predictions of a finished run read: `test`, or `val` where there is none."""
    return "test" if data.get("test") else "val"


def find_crop_size(section: Any) -> Any:
    """What a dataset's last RandomCrop has as `crop_size`, no list but a tuple; None where there is none."""
    crops = [step.get("crop_size") for step in list_steps(section) if step.get("type") == "RandomCrop"]
    return _as_tuple(crops[-1]) if crops else None


def _as_tuple(size: Any) -> Any:
    return tuple(size) if isinstance(size, list) else size


def list_steps(section: Any) -> list[dict[str, Any]]:
    """The steps of `pipeline_steps` without their fields."""
    return [step for _, step in pipeline_steps(section, "")]


def pipeline_steps(section: Any, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The steps of a dataset's pipeline, of each in a list and of those inside wrappers, with their dotted fields."""
    for place, dataset in list_fields(where, section):
        if not isinstance(dataset, Mapping):
            continue
        pipeline = dataset.get("pipeline")
        for index, step in enumerate(pipeline if isinstance(pipeline, (list, tuple)) else []):
            if isinstance(step, dict):
                yield f"{place}.pipeline[{index}]", step
        yield from pipeline_steps(dataset.get("dataset"), f"{place}.dataset")
