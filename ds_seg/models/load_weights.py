"""Pretrained weights into a backbone, whole or partitioned by ZeRO-3, with a report of what matched.

Nothing is written before the whole plan is known to be good, and every rank gets the same verdict.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import nn

from ds_seg import distributed
from ds_seg.errors import WeightsError
from ds_seg.models.positions import compute_grid_side
from ds_seg.models.weight_dialects import PYRAMID, Translation, translate_names
from ds_seg.models.weight_files import WeightFiles
from ds_seg.models.weight_report import Sides, WeightReport, summarise_names
from ds_seg.models.weight_resize import PATCH_KERNEL, POSITION_TABLE, is_resizable
from ds_seg.models.weight_shapes import Shapes, find_fitting_configs, measure_image_px, measure_shape
from ds_seg.models.weight_stream import Stretch, Write, plan_writes, stream_values, stream_weights

Log = Callable[[str], None]


@dataclass(frozen=True)
class _Plan:
    report: WeightReport
    writes: list[Write]


def load_backbone_weights(
    backbone: nn.Module,
    path: str | Path,
    *,
    expected_missing: Sequence[str] = (),
    used_elsewhere: Collection[str] = (),
    log: Log = print,
) -> WeightReport:
    """Load a weight file of any known dialect into a backbone.

    A backbone built under `deepspeed.zero.Init` is written parameter by parameter: only global rank 0 reads the
    file, and no rank ever holds more than one parameter beside its partition. This is a collective then. A plain
    backbone is read by each rank for itself. Position tables of another grid and patch embeddings of another
    patch are resized in FP32.

    Args:
        backbone: an InternViT, partitioned or not.
        path: a weight file, or a HuggingFace folder or index (see `WeightFiles`).
        expected_missing: fnmatch patterns of parameters that may be absent from the file. The layers of
            `with_fpn` always may, if the file has none of them.
        used_elsewhere: names in the file that are no concern of the backbone and of its report.
        log: gets the report as text, on global rank 0.

    Returns:
        What was matched, resized, ignored and left at its initial value, and how fast it was read.

    Raises:
        WeightsError: the file is missing, unreadable, of no known dialect, doesn't fit, or has values that are not
            finite; on every rank alike.
    """
    partitioned = any(hasattr(parameter, "ds_id") for parameter in backbone.parameters())
    opened: list[WeightFiles] = []

    def make_plan() -> _Plan | None:
        if partitioned and not distributed.is_main():
            return None
        opened.append(WeightFiles(Path(path)))
        return _plan(backbone, opened[0], expected_missing, used_elsewhere)

    # one broadcast or one gather: a rank never learns of a bad file while others already wait for a parameter
    own_plan = distributed.agree(make_plan)
    plan = distributed.broadcast_object(own_plan) if partitioned else own_plan
    assert plan is not None
    started = time.perf_counter()
    files = opened[0] if opened else None
    not_finite = stream_weights(backbone, plan.writes, files, partitioned=partitioned, progress=distributed.is_main())
    distributed.agree(lambda: validate_finite(path, not_finite))
    report = dataclasses.replace(plan.report, seconds=time.perf_counter() - started)
    if distributed.is_main():
        log(report.table())
    return report


def stream_rounded(backbone: nn.Module, report: WeightReport) -> Iterator[Stretch]:
    """Read what trained parameters had to round once more, now in FP32; a collective at each step.

    Args:
        backbone: that was loaded, partitioned or not.
        report: of `load_backbone_weights`.
    """
    shapes = {name: _shape_of(parameter) for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    writes = [write for write in report.rounded if write.target in shapes]
    files = distributed.agree(lambda: WeightFiles(Path(report.file)) if distributed.is_main() else None)
    return stream_values(shapes, writes, files, progress=distributed.is_main())


def validate_finite(path: str | Path, not_finite: Sequence[str]) -> None:
    """Refuse a weight file.

    Args:
        path: of the file.
        not_finite: names of its tensors that have values that are not finite.

    Raises:
        WeightsError: there are some.
    """
    if not_finite:
        raise WeightsError(
            f"Weight file {path} has NaN or infinite values in {len(not_finite)} tensors "
            f"({summarise_names(not_finite)}), so all that is computed with it would be NaN. Use weights from before "
            "they diverged, or download the file again."
        )


def _shape_of(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _plan(
    backbone: nn.Module,
    files: WeightFiles,
    expected_missing: Sequence[str],
    used_elsewhere: Collection[str],
) -> _Plan:
    named = dict(backbone.named_parameters())
    wanted = {name: _shape_of(parameter) for name, parameter in named.items()}
    try:
        translation = translate_names(name for name in files.entries if name not in used_elsewhere)
    except WeightsError as error:
        raise WeightsError(f"Weight file {files.path} can't be used: {error}") from error
    got = {name: _join_shapes(parts, files) for name, parts in translation.sources.items()}
    sources = {name: parts for name, parts in translation.sources.items() if name in wanted}
    unused = [part for name, parts in translation.sources.items() if name not in wanted for part in parts]
    ignored = sorted(translation.leftovers + unused)
    missing = [name for name in wanted if name not in sources]
    faults = _find_wrong_shapes(wanted, got, sources) + _find_integers(sources, files)
    faults += _find_unexplained(translation, ignored, missing, wanted, expected_missing)
    if faults:
        where = f"Weight file {files.path} ({translation.dialect.title})"
        faults = _find_differences(wanted, got) + faults
        raise WeightsError(f"{where} does not fit this backbone: {'; '.join(faults)}.{_suggest_config(wanted, got)}")
    writes = plan_writes(sources, files)
    rounded = {
        name
        for name, parts in sources.items()
        if _is_rounded(named[name], got[name], (files.entries[part].dtype for part in parts))
    }
    report = WeightReport(
        file=str(files.path),
        dialect=translation.dialect.title,
        release=_describe_network(got),
        image_px=measure_image_px(got),
        tensors=len(sources),
        parameters=sum(math.prod(wanted[name]) for name in sources),
        rounded=[write for write in writes if write.target in rounded],
        resized_positions=_find_sides(POSITION_TABLE, wanted, got),
        resized_patch=_find_sides(PATCH_KERNEL, wanted, got),
        ignored=ignored,
        ignored_parameters=sum(math.prod(files.entries[name].shape) for name in ignored),
        missing=missing,
        bytes=sum(piece.bytes for write in writes for piece in write.pieces),
    )
    return _Plan(report, writes)


def _join_shapes(parts: Sequence[str], files: WeightFiles) -> tuple[int, ...]:
    """Shape of tensors joined along dimension 0; nothing that fits anywhere if they can't be joined."""
    first, *others = [files.entries[part].shape for part in parts]
    if not others:
        return first
    return (sum(shape[0] for shape in (first, *others)), *first[1:]) if others == [first] * len(others) else ()


def _is_rounded(parameter: nn.Parameter, shape: tuple[int, ...], dtypes: Iterable[torch.dtype]) -> bool:
    """Whether values of a file lose bits in a parameter; what is resized is made in FP32."""
    kept = torch.finfo(parameter.dtype).eps
    resized = [torch.float32] if shape != _shape_of(parameter) else []
    return any(torch.finfo(dtype).eps < kept for dtype in (*dtypes, *resized))


def _find_sides(name: str, wanted: Shapes, got: Shapes) -> Sides | None:
    """Sides of the file's and the backbone's position grid or patch, where they differ."""
    if name not in wanted or name not in got or wanted[name] == got[name]:
        return None
    if name == PATCH_KERNEL:
        return got[name][-1], wanted[name][-1]
    sides = compute_grid_side(got[name][1]), compute_grid_side(wanted[name][1])
    assert sides[0] is not None and sides[1] is not None
    return sides[0], sides[1]


def _find_wrong_shapes(wanted: Shapes, got: Shapes, sources: Iterable[str]) -> list[str]:
    wrong = [
        f"{name} is {list(got[name])} in the file and {list(wanted[name])} in the backbone"
        for name in sources
        if got[name] != wanted[name] and not is_resizable(name, got[name], wanted[name])
    ]
    if not wrong:
        return []
    rest = f", and {len(wrong) - 4} more" if len(wrong) > 4 else ""
    return [f"{'; '.join(wrong[:4])}{rest}: check embed_dim, mlp_ratio, patch_size and in_chans in model.backbone"]


def _find_integers(sources: Mapping[str, Sequence[str]], files: WeightFiles) -> list[str]:
    wrong = [part for parts in sources.values() for part in parts if not files.entries[part].dtype.is_floating_point]
    if not wrong:
        return []
    return [
        f"{len(wrong)} tensors hold no floating-point numbers ({summarise_names(wrong)}): use the weights from before "
        "they were quantised"
    ]


def _find_unexplained(
    translation: Translation,
    ignored: Sequence[str],
    missing: Sequence[str],
    wanted: Shapes,
    expected_missing: Sequence[str],
) -> list[str]:
    missing_patterns = list(expected_missing)
    if not any(fnmatchcase(name, pattern) for name in translation.sources for pattern in PYRAMID):
        missing_patterns += PYRAMID
    # a final norm that the backbone was built without
    unused_patterns = () if any(name.startswith("norm.") for name in wanted) else ("norm.*", "layernorm.*")
    absent = [name for name in missing if not any(fnmatchcase(name, pattern) for pattern in missing_patterns)]
    unknown = [name for name in ignored if not translation.is_expected_leftover(name, unused_patterns)]
    remedy = "check depth, qkv_bias, qk_normalization, init_values and output_norm in model.backbone"
    faults = []
    if absent:
        faults.append(f"the backbone has {len(absent)} parameters that the file lacks ({summarise_names(absent)})")
    if unknown:
        faults.append(f"the file has {len(unknown)} tensors that the backbone lacks ({summarise_names(unknown)})")
    return [f"{fault}; {remedy}" for fault in faults]


def _find_differences(wanted: Shapes, got: Shapes) -> list[str]:
    shape_got, shape_wanted = measure_shape(got), measure_shape(wanted)
    return shape_got.find_differences(shape_wanted) if shape_got and shape_wanted else []


def _suggest_config(wanted: Shapes, got: Shapes) -> str:
    fitting = find_fitting_configs(got) if _find_differences(wanted, got) else []
    return f" The file fits {' or '.join(fitting)}: use it as the config's base." if fitting else ""


def _describe_network(got: Shapes) -> str:
    shape, image_px = measure_shape(got), measure_image_px(got)
    if shape is None:
        return "no whole backbone"
    fitting = ", ".join(find_fitting_configs(got)) or "in no shipped config"
    positions = f"positions for {image_px} px" if image_px else "positions of no square"
    return f"{shape.depth} blocks of {shape.embed_dim} channels, {positions}; {fitting}"
