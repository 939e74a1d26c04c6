"""From what a survey of the files found to what is wrong with a dataset, and what to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from prettytable import PrettyTable

import ds_seg.openmmlab  # noqa: F401
from ds_seg.config.head_fields import classifying_heads
from ds_seg.data.build import leaf_datasets
from ds_seg.data.head_fit import find_class_name_faults, find_misfits
from ds_seg.data.label_rules import find_mistakes, find_nothing_labelled
from ds_seg.data.lint import TURNED, explain_ids, find_cures
from ds_seg.data.pairing import Unpaired, find_unpaired
from ds_seg.data.survey import SplitSurvey, Survey

_NAMED_AT_MOST = 5
_TRAIN = "data.train"
_NO_PIXEL_TO_SCORE = "if it is predicted for a labelled pixel, its IoU is 0 and counts in mIoU; else mIoU leaves it out"
_HEADLINES = {
    "labels": "the ids mean something else than the config says",
    "classes": "classes don't fit the head or each other",
    "unpaired": "images or annotations lack each other",
    "unreadable": "files can't be read",
    "damaged": "files are damaged",
    "thin": "images have a side of 1 px",
    "size": "annotations have another size than their image",
    "colours": "annotations hold colours in place of ids",
    "format": "annotations are of a format that can't hold ids",
    "ids": "annotations hold ids outside the classes",
    "duplicate": "images are in two splits, so that scores on one are not on unseen images",
    "repeated": "images occur more than once in a split",
    "unread": "images are left out because of their suffix",
    "absent class": "classes never occur",
    "ignored": "annotations are ignored wholly",
    "turned": f"images may lie otherwise than their annotations: {TURNED}",
}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a dataset, or may be."""

    kind: str
    """A key of `_HEADLINES`."""
    is_fault: bool
    """False for what a dataset may have on purpose."""
    split: str
    """Dotted config field, such as data.train, or several with commas between them."""
    path: str | None
    """The file; None where it is about the split as a whole."""
    message: str


@dataclass(frozen=True)
class Diagnosis:
    """A surveyed dataset and its findings."""

    survey: Survey
    findings: tuple[Finding, ...]
    cures: tuple[str, ...]
    """What to do, a sentence or two each."""

    @property
    def faults(self) -> list[Finding]:
        """What keeps the dataset from being used as it is."""
        return [finding for finding in self.findings if finding.is_fault]

    @property
    def warnings(self) -> list[Finding]:
        """What a dataset may have on purpose."""
        return [finding for finding in self.findings if not finding.is_fault]

    def format_findings(self, findings: Iterable[Finding]) -> str:
        """Findings by kind, the first of each by name."""
        lines = []
        for kind, group in groupby(sorted(findings, key=_kind_order), key=lambda finding: finding.kind):
            found = list(group)
            lines.append(f"{_HEADLINES[kind]} ({len(found)}):")
            lines += [f"  {finding.split}: {finding.message}" for finding in found[:_NAMED_AT_MOST]]
            if len(found) > _NAMED_AT_MOST:
                lines.append(f"  and {len(found) - _NAMED_AT_MOST} more (--json FILE names all)")
        return "\n".join(lines)

    def tables(self) -> str:
        """Splits and class frequencies, for people."""
        splits = PrettyTable(["split", "images", "annotations", "width x height px", "ignored", "faults"], align="r")
        splits.align["split"] = "l"
        for split in self.survey.splits:
            faults = sum(split.field in finding.split.split(", ") for finding in self.faults)
            share = f"{100 * split.ignored_share:.1f} %"
            splits.add_row([split.field, len(split.pairs), split.annotated, split.size_range(), share, faults])
        return (
            f"{splits}\n{self._class_table()}" if any(split.annotated for split in self.survey.splits) else f"{splits}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything, for a JSON file."""
        return {
            "ok": not self.faults,
            "images_read": self.survey.pairs_read,
            "seconds": self.survey.seconds,
            "images_per_s": self.survey.pairs_read / self.survey.seconds,
            "workers": self.survey.workers,
            "splits": {split.field: _describe_split(split) for split in self.survey.splits},
            "faults": [asdict(finding) for finding in self.faults],
            "warnings": [asdict(finding) for finding in self.warnings],
            "cures": list(self.cures),
        }

    def _class_table(self) -> PrettyTable:
        names = self.survey.splits[0].class_names
        shown = [split for split in self.survey.splits if split.annotated and split.class_names == names]
        titles = [title for split in shown for title in (f"{split.field} pixels", f"{split.field} images")]
        table = PrettyTable(["class", *titles], align="r")
        table.align["class"] = "l"
        for index, name in enumerate(names):
            row: list[Any] = [name]
            for split in shown:
                pixels = split.class_pixels[index] / max(1, sum(split.class_pixels))
                row += [f"{100 * pixels:.2f} %", split.class_images[index]]
            table.add_row(row)
        return table


def diagnose(survey: Survey, datasets: Mapping[str, Any], model: Mapping[str, Any] | None) -> Diagnosis:
    """Name what is wrong with surveyed datasets.

    Args:
        survey: of `datasets`.
        datasets: dotted config field -> MMSeg dataset, or MMSeg's wrapper around several.
        model: `model` section of the config, whose heads must fit; None where the config has none.
    """
    unpaired = {
        field: [find_unpaired(leaf, field) for leaf in leaf_datasets(dataset)] for field, dataset in datasets.items()
    }
    pairing = [finding for field in datasets for finding in _pairing_findings(field, datasets[field], unpaired[field])]
    known = {finding.path for finding in pairing}
    findings = _merge_splits(
        *_label_findings(survey),
        *_head_findings(model or {}, datasets),
        *pairing,
        *(finding for split in survey.splits for finding in _file_findings(split) if finding.path not in known),
        *_duplicate_findings(survey),
        *(finding for field, dataset in datasets.items() for finding in _repeat_findings(field, dataset)),
        *(finding for split in survey.splits for finding in _class_findings(split)),
    )
    read = {pair: report for split in survey.splits for pair, report in zip(split.pairs, split.reports, strict=True)}
    hints = [hint for found in unpaired.values() for one in found for hint in (one.image_hint, one.annotation_hint)]
    kinds = {finding.kind for finding in findings if finding.is_fault}
    cures = [*hints, *find_cures(kinds), *explain_ids(read.keys(), read.values())]
    return Diagnosis(survey, tuple(findings), tuple(dict.fromkeys(cure for cure in cures if cure)))


def _merge_splits(*findings: Finding) -> list[Finding]:
    """One finding in place of several that differ in their split alone: data.test often has the files of data.val."""
    splits: dict[Finding, list[str]] = {}
    for finding in findings:
        splits.setdefault(replace(finding, split=""), []).append(finding.split)
    return [replace(finding, split=", ".join(fields)) for finding, fields in splits.items()]


def _kind_order(finding: Finding) -> int:
    return list(_HEADLINES).index(finding.kind)


def _describe_split(split: SplitSurvey) -> dict[str, Any]:
    return {
        "images": len(split.pairs),
        "annotations": split.annotated,
        "ignored_share": split.ignored_share,
        "classes": {
            name: {"pixels": pixels, "images": images}
            for name, pixels, images in zip(split.class_names, split.class_pixels, split.class_images, strict=True)
        },
    }


def _label_findings(survey: Survey) -> Iterator[Finding]:
    for split in survey.splits:
        unlabelled = find_nothing_labelled(split.pixels_by_rule)
        if unlabelled:
            yield Finding("labels", True, split.field, None, unlabelled)
    for fields, message in find_mistakes({split.field: split.pixels_by_rule for split in survey.splits}):
        yield Finding("labels", True, fields, None, message)


def _head_findings(model: Mapping[str, Any], datasets: Mapping[str, Any]) -> Iterator[Finding]:
    for field, mismatch in find_class_name_faults(datasets).items():
        yield Finding("classes", True, field, None, mismatch)
    for field, dataset in datasets.items():
        for head_field, head in classifying_heads(model):
            for message in find_misfits(head_field, head, field, dataset):
                yield Finding("classes", True, field, None, message)


def _pairing_findings(field: str, dataset: Any, unpaired: Iterable[Unpaired]) -> Iterator[Finding]:
    for leaf, found in zip(leaf_datasets(dataset), unpaired, strict=True):
        images, annotations = Path(leaf.img_dir), Path(leaf.ann_dir or "")
        for name in found.absent_images:
            message = f"{images / name} is not there, but {leaf.split} lists it"
            yield Finding("unpaired", True, field, str(images / name), message)
        for name in found.absent_annotations:
            message = f"{annotations / name} is not there, but there is an image for it"
            yield Finding("unpaired", True, field, str(annotations / name), message)
        for name in found.orphaned_annotations:
            wanted = images / (name[: len(name) - len(leaf.seg_map_suffix)] + leaf.img_suffix)
            message = f"{annotations / name} has no image {wanted}"
            yield Finding("unpaired", True, field, str(annotations / name), message)
        for name in found.unread_images:
            message = f"{images / name} does not end with '{leaf.img_suffix}'"
            yield Finding("unread", False, field, str(images / name), message)


def _file_findings(split: SplitSurvey) -> Iterator[Finding]:
    for report in split.reports:
        for fault in report.faults:
            yield Finding(fault.kind, True, split.field, fault.path, fault.message)
    for path in split.ignored_wholly:
        yield Finding("ignored", False, split.field, path, f"{path} holds only ignored ids")
    for pair, report in zip(split.pairs, split.reports, strict=True):
        if report.turned:
            yield Finding("turned", False, split.field, pair.image_path, pair.image_path)


def _duplicate_findings(survey: Survey) -> Iterator[Finding]:
    first: dict[bytes, tuple[str, str]] = {}
    for split in survey.splits:
        for pair, report in zip(split.pairs, split.reports, strict=True):
            if report.digest is None:
                continue
            field, path = first.setdefault(report.digest, (split.field, pair.image_path))
            if field == split.field and path != pair.image_path:
                message = f"{pair.image_path} has the same pixels as {path}"
                yield Finding("repeated", False, split.field, pair.image_path, message)
            elif field != split.field and (field == _TRAIN or path != pair.image_path):
                what = "is the same file as" if path == pair.image_path else "has the same pixels as"
                message = f"{pair.image_path} {what} {path} of {field}"
                yield Finding("duplicate", field == _TRAIN, split.field, pair.image_path, message)


def _repeat_findings(field: str, dataset: Any) -> Iterator[Finding]:
    for leaf in leaf_datasets(dataset):
        for name, count in Counter(info["filename"] for info in leaf.img_infos).items():
            if count > 1:
                path = str(Path(leaf.img_dir, name))
                yield Finding("repeated", False, field, path, f"{path} is listed {count} times in {leaf.split}")


def _class_findings(split: SplitSurvey) -> Iterator[Finding]:
    if not split.annotated:
        return
    for name, pixels in zip(split.class_names, split.class_pixels, strict=True):
        if not pixels:
            effect = "it can't be learned" if split.field == _TRAIN else _NO_PIXEL_TO_SCORE
            yield Finding("absent class", False, split.field, None, f"'{name}' has no pixel: {effect}")
