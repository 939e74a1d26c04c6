"""MMSeg datasets from a config, refused with the reason and the remedy where they can't serve."""

from __future__ import annotations

import copy
import difflib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from torch.utils.data import Dataset

import ds_seg.data.camvid
import ds_seg.data.demo_dataset
import ds_seg.data.folders
import ds_seg.data.transforms  # noqa: F401
from ds_seg.config.build_errors import describe_build_error
from ds_seg.data.image_lists import build_through_lists, find_encoding_fault
from ds_seg.data.pair_files import accept_large_images, is_on_disk
from ds_seg.data.pairing import count_suffixes, find_unpaired
from ds_seg.errors import ConfigError, DataError, name_some
from ds_seg.openmmlab import mend_concatenation, mend_label_map

from mmcv.utils import Registry  # isort: skip
from mmseg.datasets import DATASETS, PIPELINES, CustomDataset  # isort: skip
from mmseg.datasets import build_dataset as build_mmseg_dataset  # isort: skip

mend_concatenation()

_NAMED_AT_MOST = 5
_OF_STEPS = ("MultiScaleFlipAug", "Compose")
"""Steps whose `transforms` are steps too; those of a user's own, such as Albu, may be anything."""
_NAMES = ("data_root", "img_dir", "ann_dir", "split", "img_suffix", "seg_map_suffix")
"""What is text in a dataset's config, or a list of texts."""


def build_datasets(sections: Mapping[str, Any], *, tolerant: Collection[str] = ()) -> dict[str, Dataset]:
    """Build the datasets of several roles; the faults of all come as one error.

    Args:
        sections: role -> its MMSeg config, as `build_dataset` takes it.
        tolerant: roles of which some files may be missing.

    Returns:
        Dotted field, such as `data.train`, -> dataset.

    Raises:
        ConfigError: as from `build_dataset`.
        DataError: likewise.
    """
    datasets, failures = {}, []
    for role, section in sections.items():
        try:
            datasets[f"data.{role}"] = build_dataset(section, role=role, tolerate_missing=role in tolerant)
        except (ConfigError, DataError) as error:
            failures.append(error)
    if failures:
        raise type(failures[0])("\n".join(map(str, failures)))
    return datasets


def build_dataset(cfg: dict[str, Any], *, role: str, tolerate_missing: bool = False) -> Dataset:
    """Build the dataset of `data.<role>` and check its folders and files by name.

    Args:
        cfg: MMSeg dataset config (or a list of them, which MMSeg concatenates). Any may have `max_image_num`: it then
            uses that many images, of each folder where `img_dir` lists several.
        role: "train", "val" or "test"; the last two build in MMSeg's test mode.
        tolerate_missing: Whether some files, though not all, may be missing.

    Returns:
        The dataset, or MMSeg's wrapper around several.

    Raises:
        ConfigError: a type is not registered, an argument does not fit, classes are not named, or label 0 is treated
            one way by the pipeline and another way by the dataset; all faults in one message.
        DataError: a folder or split file is missing, no image is found, or an image has no annotation.
    """
    accept_large_images()
    field = f"data.{role}"
    parts = list(_parts(cfg, field))
    _raise_all(ConfigError, [fault for name, part in parts for fault in find_type_faults(part, name)])
    _raise_all(DataError, [fault for name, part in parts for fault in _path_faults(part, name)])
    own_cfg = copy.deepcopy(cfg)
    for _, part in list(_parts(own_cfg, field)):
        build_through_lists(part)
    try:
        dataset = build_mmseg_dataset(own_cfg, None if role == "train" else {"test_mode": True})
    except (TypeError, ValueError, KeyError, AssertionError, AttributeError, OSError, NotImplementedError) as error:
        fault = describe_build_error(error, field, cfg)
        raise ConfigError(f"{field} can't be built: {fault}. Correct {field}.") from error
    leaves = leaf_datasets(dataset)
    strange = [type(leaf).__name__ for leaf in leaves if not isinstance(leaf, CustomDataset)]
    if strange:
        raise ConfigError(f"{field}: {strange[0]} is no dataset of MMSeg's kind. Derive it from CustomDataset.")
    _raise_all(ConfigError, [fault for leaf in leaves for fault in _label_faults(leaf, field, role)])
    _raise_all(ConfigError, _mixture_faults(leaves, field))
    _raise_all(DataError, [fault for leaf in leaves for fault in _file_faults(leaf, field, tolerate_missing)])
    for leaf in leaves:
        mend_label_map(leaf)
    return cast("Dataset", dataset)


def leaf_datasets(dataset: Any) -> list[CustomDataset]:
    """The datasets that read files, inside any of MMSeg's wrappers (concatenated, repeated, mixed)."""
    if hasattr(dataset, "datasets"):
        return [leaf for part in dataset.datasets for leaf in leaf_datasets(part)]
    return leaf_datasets(dataset.dataset) if hasattr(dataset, "dataset") else [dataset]


def resolve_sample(dataset: Any, index: int) -> tuple[CustomDataset, int]:
    """The dataset that reads sample `index` of `dataset`, and the sample's index there."""
    if isinstance(dataset, CustomDataset):
        return dataset, index
    if hasattr(dataset, "datasets"):
        part, inner = dataset.get_dataset_idx_and_sample_idx(index)
        return resolve_sample(dataset.datasets[part], int(inner))
    return resolve_sample(dataset.dataset, index % len(dataset.dataset))


def sample_paths(leaf: CustomDataset, index: int) -> tuple[str, str | None]:
    """Paths of the image and, where the dataset has annotations, of the annotation."""
    info = leaf.img_infos[index]
    join = leaf.file_client.join_path
    annotation = None if leaf.ann_dir is None else str(join(leaf.ann_dir, info["ann"]["seg_map"]))
    return str(join(leaf.img_dir, info["filename"])), annotation


def _raise_all(kind: type[ConfigError] | type[DataError], faults: list[str]) -> None:
    if faults:
        raise kind("\n".join(faults))


def _parts(cfg: Any, field: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every dataset config inside `cfg` with its dotted field, wrappers included."""
    if isinstance(cfg, list | tuple):
        for index, part in enumerate(cfg):
            yield from _parts(part, f"{field}[{index}]")
        return
    yield field, cfg
    if "dataset" in cfg:
        yield from _parts(cfg["dataset"], f"{field}.dataset")
    if "datasets" in cfg:
        yield from _parts(cfg["datasets"], f"{field}.datasets")


def find_type_faults(cfg: dict[str, Any], field: str) -> list[str]:
    """What is wrong with the types in one dataset config, named by field, and what to do."""
    if cfg.get("type") == "ConcatDataset":
        return [
            f"{field}.type is 'ConcatDataset', whose parts MMSeg does not build. Give the list of them: {field}=[...]."
        ]
    faults = _registry_faults(cfg, field, DATASETS)
    count = cfg.get("max_image_num")
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
        faults.append(f"{field}.max_image_num: got {count!r}, want a number of images of at least 1. Or leave it out.")
    for key in _NAMES:
        for name in cfg[key] if isinstance(cfg.get(key), list | tuple) else [cfg.get(key)]:
            if name is not None and not isinstance(name, str):
                faults.append(f"{field}.{key}: got {name!r}, want text.")
    return faults + _pipeline_faults(cfg.get("pipeline") or [], f"{field}.pipeline")


def _pipeline_faults(pipeline: list[dict[str, Any]], field: str) -> list[str]:
    if not isinstance(pipeline, list | tuple) or not all(isinstance(step, dict) for step in pipeline):
        return [f"{field}: got {pipeline!r}, want a list of steps, such as [dict(type='LoadImageFromFile'), ...]."]
    faults = []
    for index, step in enumerate(pipeline):
        faults += _registry_faults(step, f"{field}[{index}]", PIPELINES)
        if step.get("type") in _OF_STEPS:
            faults += _pipeline_faults(step.get("transforms") or [], f"{field}[{index}].transforms")
    return faults


def _registry_faults(cfg: dict[str, Any], field: str, registry: Registry) -> list[str]:
    name = cfg.get("type")
    if name is None:
        return [f"{field} has no `type`. Name a registered {registry.name}, such as {_nearest('', registry)}."]
    if not isinstance(name, str) or name in registry.module_dict:
        return []
    return [
        f"{field}.type is '{name}', which is no registered {registry.name}. Nearest: {_nearest(name, registry)}. "
        "Correct the name, or import the module that registers it through custom_imports."
    ]


def _nearest(name: str, registry: Registry) -> str:
    known = sorted(registry.module_dict)
    return ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known[:3])


def _path_faults(cfg: dict[str, Any], field: str) -> list[str]:
    if not is_on_disk(cfg.get("file_client_args", {})):
        return []
    root = Path(cfg.get("data_root") or "")
    remedy = (
        f"Put the dataset there, or set {field}.data_root (now {cfg.get('data_root')!r}) with "
        f"--cfg-options {field}.data_root=FOLDER."
    )
    if not root.is_dir() and not Path(cfg.get("img_dir") or "").is_absolute():
        return [f"{field}.data_root: there is no folder {root.resolve()}. {remedy}"]
    faults = []
    for key, exists, kind in (
        ("img_dir", Path.is_dir, "folder"),
        ("ann_dir", Path.is_dir, "folder"),
        ("split", Path.is_file, "file"),
    ):
        values = cfg.get(key)
        for value in values if isinstance(values, list | tuple) else [values]:
            path = None if value is None else root / value
            if path is not None and not exists(path):
                faults.append(f"{field}.{key}: there is no {kind} {path.resolve()}. {remedy}")
            elif path is not None and key == "split" and (fault := find_encoding_fault(path)):
                faults.append(f"{field}.split: {fault}")
    return faults


def describe_missing_classes(field: str, dataset_type: str) -> str:
    """That a dataset names no classes, and how to name them."""
    return (
        f"{field}.classes is not set, and {dataset_type} has no classes of its own. Give their names in the order of "
        "the ids: classes=['background', 'roof']."
    )


def _label_faults(leaf: CustomDataset, field: str, role: str) -> list[str]:
    if leaf.CLASSES is None:
        return [describe_missing_classes(field, type(leaf).__name__)]
    twice = [f"'{name}'" for name, count in Counter(leaf.CLASSES).items() if count > 1]
    if twice:
        return [
            f"{field}.classes names {', '.join(twice)} more than once, and scores go by name. Give each its own name."
        ]
    if leaf.ann_dir is None:
        needs = role in ("train", "val")
        return [f"{field}.ann_dir is not set, and {role} needs annotations. Set it."] if needs else []
    if leaf.reduce_zero_label and any(old != new for old, new in (leaf.label_map or {}).items()):
        return [
            f"{field}.classes picks or reorders classes of {type(leaf).__name__}, whose label 0 is reduced: MMSeg 0.30 "
            "renumbers before it reduces, and would take each class for its neighbour. Leave `classes` out, or write "
            "annotations with the ids that you want."
        ]
    flags = [step.reduce_zero_label for step in leaf.pipeline.transforms if hasattr(step, "reduce_zero_label")]
    if all(flag == leaf.reduce_zero_label for flag in flags):
        return []
    return [
        f"{field}: LoadAnnotations in its pipeline has reduce_zero_label={flags[0]}, but {type(leaf).__name__} has "
        f"reduce_zero_label={leaf.reduce_zero_label}: training and evaluation would number the classes "
        "differently. Give both the same value."
    ]


def _mixture_faults(leaves: list[CustomDataset], field: str) -> list[str]:
    first, *others = [(list(leaf.CLASSES), leaf.ignore_index) for leaf in leaves]
    differing = [other for other in others if other != first]
    if not differing:
        return []
    (names, ignored), (other_names, other_ignored) = first, differing[0]
    return [
        f"{field} joins datasets that number their classes differently: {names} with ignore_index={ignored}, and "
        f"{other_names} with ignore_index={other_ignored}. Give all the same classes, in one order, and ignore_index."
    ]


def _file_faults(leaf: CustomDataset, field: str, tolerate_missing: bool) -> list[str]:
    if len(leaf) == 0:
        return [_no_image_fault(leaf, field)]
    unpaired = find_unpaired(leaf, field)
    if tolerate_missing and max(len(unpaired.absent_images), len(unpaired.absent_annotations)) < len(leaf):
        return []
    listed = f"{field}.split lists images that are not in {leaf.img_dir}"
    bare = f"{field}: images without an annotation in {leaf.ann_dir}"
    return [
        *_absent_fault(unpaired.absent_images, len(leaf), listed, unpaired.image_hint),
        *_absent_fault(unpaired.absent_annotations, len(leaf), bare, unpaired.annotation_hint),
    ]


def _no_image_fault(leaf: CustomDataset, field: str) -> str:
    if leaf.split:
        return f"{field}: split {leaf.split} lists no image. Write a name without suffix on each line."
    suffixes = count_suffixes(leaf.img_dir) if is_on_disk(leaf.file_client_args) else []
    found = ", ".join(f"{suffix or 'no suffix'} ({count})" for suffix, count in suffixes) or "no file at all"
    cure = f"{field}.img_suffix='{suffixes[0][0]}' (where its type takes one) or " if suffixes else ""
    folder = Path(leaf.img_dir).resolve()
    return (
        f"{field}: no image with suffix '{leaf.img_suffix}' in {folder}; found there: {found}. "
        f"Set {cure}{field}.img_dir."
    )


def _absent_fault(absent: list[str], total: int, what: str, hint: str) -> list[str]:
    if not absent:
        return []
    cure = hint or "Add the files, or leave the images out with a split file."
    return [f"{what}: {len(absent)} of {total} files are missing ({name_some(absent, _NAMED_AT_MOST)}). {cure}"]
