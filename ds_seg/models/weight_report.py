"""What a weight file gave to a backbone, for people."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from ds_seg.models.weight_resize import PATCH_METHOD, POSITION_METHOD
from ds_seg.models.weight_stream import Write

Sides = tuple[int, int]
_KINDS_AT_MOST = 8


@dataclass(frozen=True)
class WeightReport:
    """What a weight file gave to a backbone.

    Args:
        file: path read.
        dialect: naming scheme found in it.
        release: the network in it, and the shipped configs that have it.
        image_px: side of the image whose patch grid the file's position table has, if it has one.
        tensors: parameters of the backbone that were written.
        parameters: their numbers in all.
        rounded: the writes of tensors that the file has in more bits than the backbone.
        resized_positions: sides, in patches, of the file's and of the backbone's position grid, if they differ.
        resized_patch: sides, in pixels, of the file's and of the backbone's patch, if they differ.
        ignored: names in the file that were left unused, as expected.
        ignored_parameters: their numbers in all.
        missing: parameters of the backbone that keep their initial values, as expected.
        bytes: read from disk.
        seconds: from the first to the last of them.
    """

    file: str
    dialect: str
    release: str
    image_px: int | None
    tensors: int
    parameters: int
    rounded: list[Write]
    resized_positions: Sides | None
    resized_patch: Sides | None
    ignored: list[str]
    ignored_parameters: int
    missing: list[str]
    bytes: int
    seconds: float = field(default=0.0, compare=False)

    def table(self) -> str:
        """The report as a few lines of text."""
        ignored = f"{len(self.ignored)} tensors, {self.ignored_parameters:,} parameters: " if self.ignored else ""
        rows = [
            ("weights", self.file),
            ("naming", self.dialect),
            ("network", self.release),
            ("matched", f"{self.tensors} tensors, {self.parameters:,} parameters"),
            ("patches", _describe_resizing(self.resized_patch, "px", PATCH_METHOD)),
            ("positions", _describe_resizing(self.resized_positions, "patches", POSITION_METHOD)),
            ("ignored", ignored + summarise_names(self.ignored)),
            ("left initial", summarise_names(self.missing)),
            ("read", format_rate(self.bytes, self.seconds)),
        ]
        if self.rounded:
            tensors = len({write.target for write in self.rounded})
            rows.append(("rounded", f"{tensors} tensors have more bits in the file; FP32 masters get them all"))
        return format_rows(rows)


def summarise_names(names: Iterable[str]) -> str:
    """Say which tensors are meant, in one line: layer numbers are folded, long lists cut."""
    folded = Counter(re.sub(r"(?<=\.)\d+(?=\.)", "N", name) for name in names)
    shown = [f"{name} (x{count})" if count > 1 else name for name, count in folded.items()]
    rest = f", and {len(shown) - _KINDS_AT_MOST} more kinds" if len(shown) > _KINDS_AT_MOST else ""
    return ", ".join(shown[:_KINDS_AT_MOST]) + rest if shown else "none"


def format_rows(rows: Iterable[tuple[str, str]]) -> str:
    """Labels and values, one pair a line."""
    return "\n".join(f"{label:<13} {value}" for label, value in rows)


def format_rate(size_bytes: int, seconds: float) -> str:
    """Bytes, seconds, and bytes a second, for people."""
    mib = size_bytes / 2**20
    return f"{mib:,.1f} MiB in {seconds:.1f} s, {mib / max(seconds, 1e-9):,.0f} MiB/s"


def _describe_resizing(sides: Sides | None, unit: str, method: str) -> str:
    if sides is None:
        return "as in the file"
    old, new = sides
    return f"resized {old} x {old} -> {new} x {new} {unit}, {method}"
