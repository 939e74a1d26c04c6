"""The datasets of a run, opened and checked by all ranks together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ds_seg import distributed
from ds_seg.config import RunConfig
from ds_seg.config.head_fields import predicting_head
from ds_seg.data.build import build_datasets
from ds_seg.data.doubts import find_doubts
from ds_seg.data.head_fit import find_class_name_faults, find_misfits
from ds_seg.data.label_rules import PixelCounts, add_counts, find_nothing_labelled
from ds_seg.data.lint import TURNED, validate_annotations
from ds_seg.errors import ConfigError, DataError, count, name_some

_LINT_THREADS = 4
_NAMED_AT_MOST = 3


def open_datasets(run: RunConfig, *roles: str) -> list[Any]:
    """The MMSeg datasets of some roles, checked: files, classes, and every annotation where the run asks for it.

    What is most likely a mistake is printed as a warning; a collective over all ranks.

    Raises:
        DataError: folders, images or annotations are missing or damaged, or nothing in those of data.train counts.
        ConfigError: their classes, ignored id or padding do not fit the head, or their classes each other.
    """
    datasets = distributed.agree(lambda: _build_datasets(run, roles))
    counts = {field: _check_annotations(run, field, dataset) for field, dataset in datasets.items() if run.check_data}
    unlabelled = find_nothing_labelled(counts.get("data.train", {}))
    if unlabelled:
        raise DataError(f"data.train: {unlabelled}")
    if distributed.is_main():
        for doubt in find_doubts(datasets, counts):
            print(f"warning: {doubt}")
    return list(datasets.values())


def _build_datasets(run: RunConfig, roles: Sequence[str]) -> dict[str, Any]:
    head_field, head = predicting_head(run.model)
    tolerant = [role for role in roles if _most_bad(run, f"data.{role}")]
    datasets = build_datasets({role: run.data[role] for role in roles}, tolerant=tolerant)
    misfits = (fault for item in datasets.items() for fault in find_misfits(head_field, head, *item))
    faults = [*misfits, *find_class_name_faults(datasets).values()]
    if faults:
        raise ConfigError("\n".join(faults))
    return datasets


def _most_bad(run: RunConfig, field: str) -> int:
    return run.max_bad_samples if field == "data.train" else 0


def _check_annotations(run: RunConfig, field: str, dataset: Any) -> PixelCounts:
    most_bad = _most_bad(run, field)
    checked = distributed.agree(
        lambda: validate_annotations(
            dataset,
            num_classes=int(predicting_head(run.model)[1]["num_classes"]),
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            threads=_LINT_THREADS,
            progress=distributed.is_main(),
            most_bad=most_bad,
        )
    )
    shares = distributed.gather_objects(checked)
    if most_bad:
        _tell_of_bad_files([message for share in shares for message in share.bad], most_bad)
    turned = sorted(path for share in shares for path in share.turned)
    if turned and distributed.is_main():
        print(f"warning: {field}: {count(len(turned), 'image')} ({name_some(turned, _NAMED_AT_MOST)}): {TURNED}.")
    return add_counts(share.pixels_by_rule for share in shares)


def _tell_of_bad_files(bad: list[str], most: int) -> None:
    listed = "\n".join(f"  {message}" for message in bad)
    if len(bad) > most:
        raise DataError(
            f"{len(bad)} files of data.train can't be read, and data.max_bad_samples allows {most}:\n{listed}\n"
            "Repair or replace them, or allow more."
        )
    if bad and distributed.is_main():
        print(f"warning: {len(bad)} files of data.train can't be read; other samples replace theirs:\n{listed}")
