"""The grid of overlapping windows that covers one view of an image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ds_seg.errors import ConfigError

_SIZES = ("crop_size", "stride")


class Window(NamedTuple):
    """A rectangle in pixels, end exclusive: rows y1..y2, columns x1..x2."""

    y1: int
    x1: int
    y2: int
    x2: int

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.y2 - self.y1, self.x2 - self.x1


@dataclass(frozen=True)
class Grid:
    """How views are cut into windows.

    Args:
        test_cfg: dict(mode='slide', crop_size=(h, w), stride=(h, w)) or dict(mode='whole'), pixels.
        patch_size: Side of a transformer patch, pixels; every window must be a multiple of it. None: any size.

    Raises:
        ConfigError: test_cfg can't be used.
    """

    test_cfg: Mapping[str, Any]
    patch_size: int | None = None

    def __post_init__(self) -> None:
        mode = self.test_cfg.get("mode")
        if mode == "whole" or (mode == "slide" and all(_is_pair(self.test_cfg.get(key)) for key in _SIZES)):
            return
        raise ConfigError(
            f"model.test_cfg is {dict(self.test_cfg)}; wanted dict(mode='whole') or "
            "dict(mode='slide', crop_size=(504, 504), stride=(322, 322))."
        )

    def windows(self, height: int, width: int) -> list[Window]:
        """Cover a view of this size, pixels.

        Raises:
            ConfigError: crop and stride can't cover it, or a window is no multiple of the patch.
        """
        whole = (height, width)
        crop, stride = (
            [tuple(self.test_cfg[key]) for key in _SIZES] if self.test_cfg["mode"] == "slide" else (whole, whole)
        )
        return compute_windows(height, width, crop, stride, self.patch_size)


def compute_windows(
    height: int, width: int, crop: tuple[int, int], stride: tuple[int, int], patch_size: int | None = None
) -> list[Window]:
    """Cover a view with windows, row by row; the last one along an axis is shifted inward.

    A view smaller than the crop along an axis gets windows of its own size along that axis.

    Args:
        height: Of the view, pixels.
        width: Of the view, pixels.
        crop: Height and width of a window, pixels, > 0.
        stride: Vertical and horizontal distance between windows, pixels, > 0 and at most the crop.
        patch_size: Side of a transformer patch, pixels; every window must be a multiple of it. None: any size.

    Returns:
        At least one window. All have the same size.

    Raises:
        ConfigError: crop and stride can't cover the view, or a window is no multiple of the patch.

    Source: open-mmlab/mmsegmentation v0.30.0 mmseg/models/segmentors/encoder_decoder.py, slide_inference;
        there a stride beyond the crop leaves gaps that fail later.
    """
    _validate_grid(crop, stride)
    windows = [
        Window(y1, x1, y2, x2)
        for y1, y2 in _compute_spans(height, crop[0], stride[0])
        for x1, x2 in _compute_spans(width, crop[1], stride[1])
    ]
    if patch_size is not None:
        _validate_patches(windows[0], (height, width), patch_size)
    return windows


def _compute_spans(length: int, crop: int, stride: int) -> list[tuple[int, int]]:
    count = max(length - crop + stride - 1, 0) // stride + 1
    ends = [min(i * stride + crop, length) for i in range(count)]
    return [(max(end - crop, 0), end) for end in ends]


def _is_pair(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(side, int) for side in value)


def _validate_grid(crop: tuple[int, int], stride: tuple[int, int]) -> None:
    if min(*crop, *stride) <= 0 or stride[0] > crop[0] or stride[1] > crop[1]:
        raise ConfigError(
            f"model.test_cfg: crop_size {tuple(crop)} with stride {tuple(stride)} can't cover an image. Both must be "
            "positive and the stride at most the crop, as in crop_size=(504, 504), stride=(322, 322)."
        )


def _validate_patches(window: Window, view: tuple[int, int], patch_size: int) -> None:
    if window.size[0] % patch_size or window.size[1] % patch_size:
        raise ConfigError(
            f"model.test_cfg: a window of {window.size[0]}x{window.size[1]} px (of a view of {view[0]}x{view[1]} px) "
            f"is not a multiple of the backbone's patch of {patch_size} px. Make crop_size a multiple of {patch_size}, "
            f"and put dict(type='ResizeToMultiple', size_divisor={patch_size}) after Resize in the test pipeline."
        )
