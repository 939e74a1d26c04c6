"""Pretrained weights into a backbone, whole or partitioned by ZeRO-3, with a report of what matched.

Nothing is written before the whole plan is known to be good, and every rank gets the same verdict.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn

from ds_seg import distributed
from ds_seg.errors import WeightsError
from ds_seg.models.positions import compute_grid_side, resize_position_table
from ds_seg.models.weight_dialects import Translation, translate_names
from ds_seg.models.weight_files import WeightFiles

POSITION_TABLE = "pos_embed"
_PYRAMID = "up[1-4].*"


@dataclass(frozen=True)
class WeightReport:
    """What a weight file gave to a backbone.

    Args:
        file: path read.
        dialect: naming scheme found in it.
        tensors: parameters of the backbone that were written.
        parameters: their numbers in all.
        resized_positions: sides, in patches, of the file's and of the backbone's position grid, if they differ.
        ignored: names in the file that were left unused, as expected.
        missing: parameters of the backbone that keep their initial values, as expected.
    """

    file: str
    dialect: str
    tensors: int
    parameters: int
    resized_positions: tuple[int, int] | None
    ignored: list[str]
    missing: list[str]

    def table(self) -> str:
        """The report as a few lines of text."""
        rows = [
            ("weights", self.file),
            ("naming", self.dialect),
            ("matched", f"{self.tensors} tensors, {self.parameters:,} parameters"),
        ]
        if self.resized_positions:
            old, new = self.resized_positions
            rows.append(("positions", f"resized {old} x {old} -> {new} x {new} patches, bicubic in FP32"))
        else:
            rows.append(("positions", "as in the file"))
        rows.append(("ignored", summarise_names(self.ignored)))
        rows.append(("left initial", summarise_names(self.missing)))
        return "\n".join(f"{label:<13} {value}" for label, value in rows)


@dataclass
class _Plan:
    report: WeightReport
    sources: dict[str, tuple[str, ...]] = field(default_factory=dict)


def load_backbone_weights(
    backbone: nn.Module,
    path: str | Path,
    *,
    expected_missing: Sequence[str] = (),
    expected_unexpected: Sequence[str] = (),
    log: Callable[[str], None] = print,
) -> WeightReport:
    """Load a weight file of any known dialect into a backbone.

    A backbone built under `deepspeed.zero.Init` is written block by block: only global rank 0 reads the
    file, and no rank ever holds more than one block. This is a collective then. A plain backbone is read
    by each rank for itself. Position tables of another grid are resized in FP32.

    Args:
        backbone: an InternViT, partitioned or not.
        path: a weight file, or a HuggingFace folder or index (see `WeightFiles`).
        expected_missing: fnmatch patterns of parameters that may be absent from the file. The layers of
            `with_fpn` always may, if the file has none of them.
        expected_unexpected: fnmatch patterns of names in the file that may stay unused, beside those that
            each dialect is known for and a final norm that the backbone was built without.
        log: gets the report as text, on global rank 0.

    Returns:
        What was matched, resized, ignored and left at its initial value.

    Raises:
        WeightsError: the file is missing, unreadable, of no known dialect, or doesn't fit; on every rank alike.
    """
    partitioned = any(hasattr(parameter, "ds_id") for parameter in backbone.parameters())
    opened: list[WeightFiles] = []

    def make_plan() -> _Plan | None:
        if partitioned and not distributed.is_main():
            return None
        opened.append(WeightFiles(Path(path)))
        return _plan(backbone, opened[0], expected_missing, expected_unexpected)

    # one broadcast or one gather: a rank never learns of a bad file while others already wait for a block
    own_plan = distributed.agree(make_plan)
    plan = distributed.broadcast_object(own_plan) if partitioned else own_plan
    assert plan is not None
    _write(backbone, plan, opened[0] if opened else None, partitioned)
    if distributed.is_main():
        log(plan.report.table())
    return plan.report


def summarise_names(names: Sequence[str], limit: int = 8) -> str:
    """Say which tensors are meant, in one line: layer numbers are folded, long lists cut.

    Args:
        names: tensor names.
        limit: folded names to show.
    """
    folded = Counter(re.sub(r"(?<=\.)\d+(?=\.)", "N", name) for name in names)
    shown = [f"{name} (x{count})" if count > 1 else name for name, count in folded.items()]
    rest = f", and {len(shown) - limit} more kinds" if len(shown) > limit else ""
    return ", ".join(shown[:limit]) + rest if shown else "none"


def _shape_of(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _plan(
    backbone: nn.Module, files: WeightFiles, expected_missing: Sequence[str], expected_unexpected: Sequence[str]
) -> _Plan:
    shapes = {name: _shape_of(parameter) for name, parameter in backbone.named_parameters()}
    try:
        translation = translate_names(files.shapes)
    except WeightsError as error:
        raise WeightsError(f"Weight file {files.path} can't be used: {error}") from error
    sources = {name: parts for name, parts in translation.sources.items() if name in shapes}
    unused = [part for name, parts in translation.sources.items() if name not in shapes for part in parts]
    ignored = translation.leftovers + unused
    missing = [name for name in shapes if name not in sources]
    faults, resized = _compare_shapes(shapes, sources, files)
    faults += _find_unexplained(translation, ignored, missing, shapes, expected_missing, expected_unexpected)
    if faults:
        where = f"Weight file {files.path} ({translation.dialect.title})"
        raise WeightsError(f"{where} does not fit this backbone: {'; '.join(faults)}.")
    parameters = sum(math.prod(shapes[name]) for name in sources)
    report = WeightReport(
        str(files.path), translation.dialect.title, len(sources), parameters, resized, sorted(ignored), missing
    )
    return _Plan(report, sources)


def _find_unexplained(
    translation: Translation,
    ignored: Sequence[str],
    missing: Sequence[str],
    shapes: dict[str, tuple[int, ...]],
    expected_missing: Sequence[str],
    expected_unexpected: Sequence[str],
) -> list[str]:
    missing_patterns = list(expected_missing)
    if not any(fnmatchcase(name, _PYRAMID) for name in translation.sources):
        missing_patterns.append(_PYRAMID)
    unused_patterns = list(expected_unexpected)
    if not any(name.startswith("norm.") for name in shapes):
        unused_patterns += ["norm.*", "layernorm.*"]
    absent = [name for name in missing if not any(fnmatchcase(name, pattern) for pattern in missing_patterns)]
    unknown = [name for name in ignored if not translation.is_expected_leftover(name, unused_patterns)]
    faults = []
    if absent:
        faults.append(
            f"the backbone has {len(absent)} parameters that the file lacks ({summarise_names(absent)}); check depth, "
            "qkv_bias, qk_normalization, init_values and output_norm in model.backbone, or name them as "
            "expected_missing"
        )
    if unknown:
        faults.append(
            f"the file has {len(unknown)} tensors that the backbone lacks ({summarise_names(unknown)}); check the same "
            "settings, or name them as expected_unexpected"
        )
    return faults


def _compare_shapes(
    shapes: dict[str, tuple[int, ...]], sources: dict[str, tuple[str, ...]], files: WeightFiles
) -> tuple[list[str], tuple[int, int] | None]:
    wrong, resized = [], None
    for name, parts in sources.items():
        first, *others = [files.shapes[part] for part in parts]
        got = (first[0] + sum(other[0] for other in others), *first[1:]) if others else first
        if got == shapes[name] and all(other == first for other in others):
            continue
        sides = [compute_grid_side(shape[1]) if len(shape) == 3 else None for shape in (got, shapes[name])]
        if name == POSITION_TABLE and got[-1] == shapes[name][-1] and sides[0] and sides[1]:
            resized = (sides[0], sides[1])
            continue
        wrong.append(f"{name} is {list(got)} in the file and {list(shapes[name])} in the backbone")
    if not wrong:
        return [], resized
    rest = f", and {len(wrong) - 4} more" if len(wrong) > 4 else ""
    fault = "; ".join(wrong[:4]) + rest
    return [f"{fault}: check embed_dim, mlp_ratio, patch_size and in_chans in model.backbone"], resized


@contextlib.contextmanager
def _gathered(parameters: list[nn.Parameter], partitioned: bool) -> Iterator[None]:
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
        yield


@torch.no_grad()
def _write(backbone: nn.Module, plan: _Plan, files: WeightFiles | None, partitioned: bool) -> None:
    groups: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in backbone.named_parameters():
        if name in plan.sources:
            group = re.match(r"blocks\.\d+|[^.]+", name)
            groups.setdefault(group[0] if group else name, {})[name] = parameter
    for named in groups.values():
        with _gathered(list(named.values()), partitioned):
            if files is None:
                continue
            for name, parameter in named.items():
                parameter.data.copy_(_read_value(files, plan.sources[name], name, parameter))


def _read_value(files: WeightFiles, parts: tuple[str, ...], name: str, parameter: nn.Parameter) -> Tensor:
    value = files.read(parts[0]) if len(parts) == 1 else torch.cat([files.read(part) for part in parts])
    if name == POSITION_TABLE and value.shape != parameter.shape:
        side = compute_grid_side(parameter.shape[1])
        assert side is not None
        return resize_position_table(value, (side, side))
    return value
