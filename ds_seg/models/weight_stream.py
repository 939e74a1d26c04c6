"""Weights from disk into a backbone, one parameter at a time, so that no process ever holds the model.

Global rank 0 alone reads; on its node and on all others the shards get their parts through DeepSpeed. It goes file
after file, each opened once and closed before the next: what it holds beside its own partition are the touched pages
of one file and one gathered parameter, and every other rank holds the gathered parameter alone.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from ds_seg import distributed
from ds_seg.models.weight_files import WeightFiles
from ds_seg.models.weight_resize import resize_weight
from ds_seg.models.weight_shapes import Shapes
from ds_seg.supervision.progress import tick

_LINE_EVERY_S = 15.0


@dataclass(frozen=True)
class Piece:
    """A tensor of a file, and the rows of its target that it is; no rows for the whole of it."""

    source: str
    rows: tuple[int, int] | None
    bytes: int


@dataclass(frozen=True)
class Write:
    """One visit to a parameter: the pieces of it that lie in one file."""

    target: str
    pieces: tuple[Piece, ...]


class Stretch(NamedTuple):
    """Neighbouring values of a flat parameter.

    Args:
        target: name of the parameter.
        start: index of the first of them.
        values: FP32, flat.
    """

    target: str
    start: int
    values: torch.Tensor


def plan_writes(sources: Mapping[str, tuple[str, ...]], files: WeightFiles) -> list[Write]:
    """Order the reading so that each file is opened once.

    Args:
        sources: parameter -> tensors that make it, joined along dimension 0.
        files: where these lie; a parameter of several tensors may lie in several files.
    """
    order = {file: index for index, file in enumerate(dict.fromkeys(entry.file for entry in files.entries.values()))}
    pieces: list[tuple[int, str, Piece]] = []
    for target, names in sources.items():
        start = 0
        for name in names:
            entry = files.entries[name]
            stop = start + (entry.shape[0] if entry.shape else 1)
            rows = (start, stop) if len(names) > 1 else None
            pieces.append((order[entry.file], target, Piece(name, rows, entry.bytes)))
            start = stop
    pieces.sort(key=lambda placed: placed[0])
    visits = groupby(pieces, key=lambda placed: placed[:2])
    return [Write(target, tuple(piece for *_, piece in placed)) for (_, target), placed in visits]


@torch.no_grad()
def stream_weights(
    backbone: nn.Module, writes: Iterable[Write], files: WeightFiles | None, *, partitioned: bool, progress: bool
) -> list[str]:
    """Carry out the writes; with a partitioned backbone a collective over all ranks.

    Args:
        backbone: whose parameters are written.
        writes: the same on every rank.
        files: open on the ranks that read; None on the others.
        partitioned: whether the parameters exist only as shards.
        progress: whether to show a bar: on a terminal at once, elsewhere as a line every 15 s.

    Returns:
        Names of the tensors that this rank read and that have values that are not finite.
    """
    not_finite: list[str] = []
    parameters = dict(backbone.named_parameters())
    for write in _track(writes, "loading weights", progress):
        with _gather(parameters[write.target], partitioned) as parameter:
            if files is not None:
                not_finite += _write(parameter, write, files)
    if files is not None:
        files.close()
    return not_finite


@torch.no_grad()
def stream_values(
    shapes: Shapes, writes: Iterable[Write], files: WeightFiles | None, *, progress: bool
) -> Iterator[Stretch]:
    """What the writes would write, in FP32 and on every rank; a collective at each step.

    Args:
        shapes: of the parameters, by name.
        writes: the same on every rank.
        files: open on global rank 0; None on the others.
        progress: as in `stream_weights`.
    """
    for write in _track(writes, "loading FP32 masters", progress):
        rows, *others = shapes[write.target]
        for piece in write.pieces:
            first, stop = piece.rows or (0, rows)
            values = torch.empty((stop - first, *others), dtype=torch.float32, device=distributed.device())
            if files is not None:
                values.copy_(resize_weight(write.target, files.read(piece.source), tuple(values.shape)))
            distributed.broadcast(values)
            yield Stretch(write.target, first * math.prod(others), values.flatten())
    if files is not None:
        files.close()


def _track(writes: Iterable[Write], label: str, progress: bool) -> Iterator[Write]:
    """The writes, with a bar that counts their bytes as they are done."""
    writes = list(writes)
    on_terminal = sys.stderr.isatty()
    with tqdm(
        total=sum(piece.bytes for write in writes for piece in write.pieces),
        desc=label,
        unit="B",
        unit_scale=True,
        disable=not progress,
        leave=not on_terminal,
        mininterval=0.1 if on_terminal else _LINE_EVERY_S,
        delay=0 if on_terminal else _LINE_EVERY_S,
    ) as bar:
        for write in writes:
            yield write
            bar.update(sum(piece.bytes for piece in write.pieces))
            tick()


def is_finite(values: torch.Tensor) -> bool:
    """Whether a tensor has neither NaN nor infinities.

    NaN passes through `aminmax`, which takes a twentieth of the time of `isfinite` on every value (torch 2.13.0, CPU).
    """
    return all(bound.isfinite().item() for bound in values.aminmax())


def _write(parameter: nn.Parameter, write: Write, files: WeightFiles) -> list[str]:
    not_finite = []
    for piece in write.pieces:
        value = files.read(piece.source)
        if piece.rows is None:
            target = parameter.data.copy_(resize_weight(write.target, value, tuple(parameter.shape)))
        else:
            target = parameter.data[slice(*piece.rows)].copy_(value)
        if not is_finite(target):
            not_finite.append(piece.source)
    return not_finite


@contextlib.contextmanager
def _gather(parameter: nn.Parameter, partitioned: bool) -> Iterator[nn.Parameter]:
    """The whole parameter; what rank 0 leaves in it goes into the shards of all ranks."""
    if not partitioned:
        yield parameter
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter], modifier_rank=0):
        yield parameter
