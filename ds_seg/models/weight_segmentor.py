"""Whole segmentation models, backbone and heads, from one weight file: InternVL's and MMSegmentation's releases.

A release of a frozen backbone may hold the heads alone, with or without the pyramid of `with_fpn`. The trunk then
comes from the file that the config names as pretrained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ds_seg import distributed
from ds_seg.errors import WeightsError, name_some
from ds_seg.models.load_weights import Log, load_backbone_weights, validate_finite
from ds_seg.models.weight_dialects import TRUNK, holds_pyramid, holds_trunk, translate_head_names
from ds_seg.models.weight_files import TensorEntry, WeightFiles
from ds_seg.models.weight_report import WeightReport, format_rows, summarise_names
from ds_seg.models.weight_stream import is_finite

_MAY_BE_ABSENT = ".num_batches_tracked"
"""A counter of BatchNorm that nothing here reads; files from before torch 0.4.1 lack it."""
_PARTS = {"decode_head": "decode_head", "auxiliary_heads": "auxiliary_head"}
"""Our modules -> their field in a config."""


@dataclass(frozen=True)
class HeadReport:
    """What a weight file gave to the heads.

    Args:
        tensors: parameters and buffers that were written.
        parameters: their numbers in all.
        classes: names of the classes, where the file tells them.
        left_initial: why parts of the heads keep their initial values; empty where none does.
        ignored: names of heads in the file that the config has not.
    """

    tensors: int
    parameters: int
    classes: tuple[str, ...]
    left_initial: list[str]
    ignored: list[str]

    def table(self) -> str:
        """The report as a few lines of text."""
        rows = [("heads", f"{self.tensors} tensors, {self.parameters:,} numbers")]
        if self.classes:
            rows.append(("classes", _describe_classes(self.classes)))
        rows += [("left initial", reason) for reason in self.left_initial]
        if self.ignored:
            rows.append(("ignored", summarise_names(self.ignored)))
        return format_rows(rows)

    def find_other_class(self, names: Sequence[str]) -> str | None:
        """The first class that a dataset of as many calls by another name; None where there is none."""
        if len(self.classes) != len(names):
            return None  # the head does not fit, and the report says so
        for index, (theirs, ours) in enumerate(zip(self.classes, names, strict=True)):
            if theirs != ours:
                return f"class {index} is '{theirs}' in the file and '{ours}' in the dataset"
        return None


@dataclass
class HeadPlan:
    """Which tensors go into which heads.

    Args:
        sources: our name -> the source's name, of what fits.
        faults: field of a head in a config -> why it keeps initial values.
        ignored: names in the source that no head takes.
    """

    sources: dict[str, str] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)

    def list_left_initial(self) -> list[str]:
        """The faults as sentences."""
        return [f"{config_field}: {reason}" for config_field, reason in self.faults.items()]


@dataclass(frozen=True)
class _Plan:
    heads: HeadPlan
    report: HeadReport
    trunk: bool
    pyramid: bool
    used_by_heads: frozenset[str]


def load_segmentor_weights(
    backbone: nn.Module,
    heads: nn.Module,
    path: str | Path,
    *,
    trunk_path: str | Path | None,
    needs_head: bool,
    log: Log = print,
) -> tuple[list[WeightReport], HeadReport]:
    """Load a weight file that may hold a backbone, heads, or both; a collective over all ranks.

    Heads that the file has not, or that don't fit, are an error where they are needed. Else they keep their initial
    values: all of a head with other tensors, and of one with the same tensors those of other shapes.

    Args:
        backbone: an InternViT, partitioned or not.
        heads: the heads, the same on every rank, on any device.
        path: the weight file (see `WeightFiles`).
        trunk_path: weight file of the backbone, for files that have none.
        needs_head: whether the decode head must come from the file, as for a prediction.
        log: gets both reports as text, on global rank 0.

    Returns:
        What each file gave to the backbone, that of the trunk first, and what the heads were given.

    Raises:
        WeightsError: the file, or that of the trunk, is missing, unreadable, doesn't fit, or has values that are not
            finite; on every rank alike.
    """
    opened: list[WeightFiles] = []

    def make_plan() -> _Plan:
        opened.append(WeightFiles(Path(path)))
        return _plan(heads, opened[0], has_trunk_path=trunk_path is not None, needs_head=needs_head)

    plan = distributed.agree_on_main(make_plan)
    not_finite = _write_heads(heads, plan.heads.sources, opened[0] if opened else None)
    opened.clear()
    distributed.agree(lambda: validate_finite(path, not_finite))
    taken = plan.used_by_heads
    if plan.trunk:
        reports = [load_backbone_weights(backbone, path, used_elsewhere=taken, log=log)]
    else:
        assert trunk_path is not None
        reports = [load_backbone_weights(backbone, trunk_path, log=log)]
        if plan.pyramid:
            reports += [load_backbone_weights(backbone, path, expected_missing=TRUNK, used_elsewhere=taken, log=log)]
    if distributed.is_main():
        log(plan.report.table())
    return reports, plan.report


def _plan(heads: nn.Module, files: WeightFiles, *, has_trunk_path: bool, needs_head: bool) -> _Plan:
    names = translate_head_names(files.entries)
    others = [name for name in files.entries if name not in names.values()]
    trunk, pyramid = holds_trunk(others), holds_pyramid(others)
    if names and not trunk and not has_trunk_path:
        raise WeightsError(
            f"Weight file {files.path} holds heads without a backbone. Set load_from or model.backbone.pretrained in "
            "the config to the file of the backbone that they were trained on."
        )
    if needs_head and not any(name.startswith("decode_head.") for name in names):
        raise WeightsError(
            f"Weight file {files.path} holds no decode head, so there is nothing to predict with. Name a segmentation "
            "checkpoint; a backbone alone is what 'ds-seg train --load-from' starts from."
        )
    plan = plan_heads(heads, names, files.entries)
    if needs_head and "decode_head" in plan.faults:
        classes = f" The file's classes: {_describe_classes(files.classes)}." if files.classes else ""
        raise WeightsError(
            f"Weight file {files.path} does not fit the heads of the config: decode_head: {plan.faults['decode_head']}."
            f" Set model.decode_head as in the config that it was trained with.{classes}"
        )
    sizes = [math.prod(files.entries[name].shape) for name in plan.sources.values()]
    report = HeadReport(len(sizes), sum(sizes), files.classes, plan.list_left_initial(), plan.ignored)
    return _Plan(plan, report, trunk or not names, pyramid, frozenset(names.values()))


def plan_heads(heads: nn.Module, names: Mapping[str, str], entries: Mapping[str, TensorEntry]) -> HeadPlan:
    """Compare tensors that were saved with those of the heads.

    Args:
        heads: as built.
        names: our name -> that in `entries`, of all tensors of heads there.
        entries: what was saved.
    """
    plan = HeadPlan()
    state = heads.state_dict()
    for module, config_field in _PARTS.items():
        wanted = {name: tensor for name, tensor in state.items() if name.startswith(f"{module}.")}
        got = {name: source for name, source in names.items() if name.startswith(f"{module}.")}
        if not wanted:
            plan.ignored += got.values()
            continue
        faults = _fit_head(wanted, got, entries, plan)
        if faults:
            plan.faults[config_field] = "; ".join(faults)
    return plan


def _fit_head(
    wanted: dict[str, Tensor], got: dict[str, str], entries: Mapping[str, TensorEntry], plan: HeadPlan
) -> list[str]:
    """Add what can be loaded of one head to the plan; returns what speaks against the rest."""
    if not got:
        return ["the file has none"]
    absent = [name for name in wanted if name not in got and not name.endswith(_MAY_BE_ABSENT)]
    unknown = [name for name in got if name not in wanted]
    if absent or unknown:
        plan.ignored += got.values()
        return _describe_other_structure(absent, unknown)
    wrong = []
    for name, source in got.items():
        shape = entries[source].shape
        if wanted[name].is_floating_point() and not entries[source].dtype.is_floating_point:
            wrong.append(f"{name} holds no floating-point numbers in the file")
        elif shape == tuple(wanted[name].shape):
            plan.sources[name] = source
        else:
            wrong.append(f"{name} is {list(shape)} in the file and {list(wanted[name].shape)} in the config")
    return wrong


def _describe_other_structure(absent: list[str], unknown: list[str]) -> list[str]:
    faults = []
    if absent:
        faults.append(f"the config's head has {len(absent)} tensors that the file lacks ({summarise_names(absent)})")
    if unknown:
        faults.append(f"the file's head has {len(unknown)} tensors that it lacks ({summarise_names(unknown)})")
    if any(".conv_cat." in name for name in unknown):
        faults.append(
            "InternVL's FCNHead applies conv_cat wherever concat_input is True, ours only with num_convs > 0, so a "
            "head of num_convs=0 and concat_input=True can't be carried over"
        )
    return faults


def _describe_classes(classes: tuple[str, ...]) -> str:
    return f"{len(classes)}: {name_some(classes, 8)}"


@torch.no_grad()
def _write_heads(heads: nn.Module, sources: dict[str, str], files: WeightFiles | None) -> list[str]:
    """Rank 0 reads, and names what is not finite; every rank gets one tensor at a time."""
    not_finite = []
    state = heads.state_dict()
    device = distributed.device() if distributed.world_size() > 1 else None  # only DeepSpeed knows it
    for name, source in sources.items():
        value = torch.empty_like(state[name], device=device)
        if files is not None:
            value.copy_(files.read(source))
            if not is_finite(value):
                not_finite.append(source)
        distributed.broadcast(value)
        state[name].copy_(value)
    return not_finite
