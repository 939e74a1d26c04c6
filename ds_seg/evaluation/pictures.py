"""Overlays, side-by-side comparisons and mask files.

Shape suffixes: H, W pixels; 3 RGB; K classes.
"""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ds_seg.errors import DataError
from ds_seg.files import write_bytes_atomic

Palette = Sequence[Sequence[int]]
Picture = tuple[str, np.ndarray, np.ndarray, "np.ndarray | None"]
"""Name of its file without the suffix, image (H, W, 3), prediction (H, W) and ground truth (H, W) or None."""

MOST_IN_PALETTE = 256
"""Classes that masks of 8 bits hold."""
_BACKGROUND = (255, 255, 255)
_INK = (38, 42, 48)
_IGNORED = (0, 0, 0)
_GAP_PX = 10
_TITLE_PX = 30
_LEGEND_ROW_PX = 26
_SMALLEST_PANEL_PX = 320
_LARGEST_PANEL_PX = 1024


def draw_overlay(image_HW3: np.ndarray, labels_HW: np.ndarray, palette: Palette, opacity: float = 0.55) -> np.ndarray:
    """Tint an image with the colours of its classes, with a darker line between segments.

    Args:
        image_HW3: RGB, uint8.
        labels_HW: Class ids; ids without a colour (the ignored ones) are drawn black.
        palette: RGB colour of each class, 0..255.
        opacity: Weight of the class colour, 0..1.

    Returns:
        RGB, uint8, (H, W, 3).
    """
    colours_HW3 = _colourise(labels_HW, palette)
    blended_HW3 = (1 - opacity) * image_HW3 + opacity * colours_HW3
    blended_HW3[_find_borders(labels_HW)] *= 0.5
    return blended_HW3.round().astype(np.uint8)


def draw_comparison(
    image_HW3: np.ndarray,
    prediction_HW: np.ndarray,
    label_HW: np.ndarray | None,
    palette: Palette,
    class_names: Sequence[str],
) -> np.ndarray:
    """Image, ground truth and prediction side by side, with a legend of the classes in them.

    Args:
        image_HW3: RGB, uint8.
        prediction_HW: Class ids.
        label_HW: Class ids; None where there is no ground truth, which leaves that panel out.
        palette: RGB colour of each class, 0..255.
        class_names: In the order of the class ids.

    Returns:
        RGB, uint8; small images are enlarged and large ones reduced, so that the text stays in proportion.
    """
    panels = [("image", image_HW3)]
    if label_HW is not None:
        panels.append(("ground truth", draw_overlay(image_HW3, label_HW, palette, 0.75)))
    panels.append(("prediction", draw_overlay(image_HW3, prediction_HW, palette, 0.75)))
    sides = image_HW3.shape[:2]
    scale = min(max(1.0, _SMALLEST_PANEL_PX / sides[1]), _LARGEST_PANEL_PX / max(sides))
    height, width = (max(1, round(side * scale)) for side in sides)
    column_width = max(width, _SMALLEST_PANEL_PX)
    shown = [prediction_HW] if label_HW is None else [prediction_HW, label_HW]
    present = [int(i) for i in np.unique(np.concatenate([ids.ravel() for ids in shown])) if i < len(class_names)]
    canvas_width = len(panels) * (column_width + _GAP_PX) + _GAP_PX
    names = [_name_legend(i, class_names[i]) for i in present]
    legend = _place_legend(names, canvas_width)
    legend_rows = legend[-1][1] + 1 if legend else 0
    canvas_height = _TITLE_PX + height + _GAP_PX + legend_rows * _LEGEND_ROW_PX + _GAP_PX
    canvas = Image.new("RGB", (canvas_width, canvas_height), _BACKGROUND)
    pen = ImageDraw.Draw(canvas)
    for column, (title, panel_HW3) in enumerate(panels):
        left = _GAP_PX + column * (column_width + _GAP_PX)
        pen.text((left, _TITLE_PX / 2), title, fill=_INK, font=_font(), anchor="lm")
        canvas.paste(Image.fromarray(panel_HW3).resize((width, height), Image.Resampling.BILINEAR), (left, _TITLE_PX))
    for class_id, name, (x, row) in zip(present, names, legend, strict=True):
        y = _TITLE_PX + height + _GAP_PX + row * _LEGEND_ROW_PX
        pen.rounded_rectangle((x, y + 4, x + 16, y + 20), radius=3, fill=tuple(palette[class_id]), outline=_INK)
        pen.text((x + 23, y + 12), name, fill=_INK, font=_font(), anchor="lm")
    return np.asarray(canvas)


def name_picture(filename: str) -> str:
    """Name of a comparison of an image: its path in the dataset, folders joined by underscores, without a suffix."""
    path = Path(filename).with_suffix("")
    return "_".join(path.relative_to(path.anchor).parts)


def save_mask(labels_HW: np.ndarray, path: str | os.PathLike[str], palette: Palette) -> None:
    """Write class ids as a PNG whose pixel values are the ids: paletted, so that viewers show the colours.

    Of more than 256 classes, which no palette holds, it is a 16-bit grey one.

    Args:
        labels_HW: Class ids, 0..255; 0..65535 where the palette has more than 256 colours.
        path: Of the .png file; its folder is made if need be.
        palette: RGB colour of each class, 0..255.
    """
    most = 255 if len(palette) <= MOST_IN_PALETTE else 65535
    assert labels_HW.min() >= 0, f"negative class id {labels_HW.min()}"
    assert labels_HW.max() <= most, f"class id {labels_HW.max()} does not fit a mask of {len(palette)} classes"
    if len(palette) > MOST_IN_PALETTE:
        _save_png(Image.fromarray(labels_HW.astype(np.uint16)), Path(path))
        return
    mask = Image.fromarray(labels_HW.astype(np.uint8)).convert("P")
    mask.frombytes(labels_HW.astype(np.uint8).tobytes())
    colours_K3 = np.asarray(palette, dtype=np.uint8)
    table_K3 = np.zeros((256, 3), dtype=np.uint8)
    table_K3[: len(colours_K3)] = colours_K3
    mask.putpalette(table_K3.tobytes())
    _save_png(mask, Path(path))


def save_picture(image_HW3: np.ndarray, path: str | os.PathLike[str]) -> None:
    """Write an RGB uint8 picture as PNG, whole or not at all; its folder is made if need be."""
    _save_png(Image.fromarray(image_HW3), Path(path))


def load_rgb(path: str | os.PathLike[str]) -> np.ndarray:
    """Read an image file as `decode_rgb` does its content.

    Raises:
        DataError: the file is missing or no image.
    """
    try:
        content = Path(path).read_bytes()  # cv2.imread crashes on names that are not UTF-8
    except OSError:
        content = b""
    return decode_rgb(content, os.fspath(path))


def decode_rgb(content: bytes, path: str) -> np.ndarray:
    """Decode an image as RGB, uint8, (H, W, 3), rotated by its EXIF tag as MMSeg's pipelines do.

    Args:
        content: Of its file.
        path: Of its file, for messages.

    Raises:
        DataError: it is no image.
    """
    try:
        image_bgr_HW3 = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:
        image_bgr_HW3 = None
    if image_bgr_HW3 is None:
        raise DataError(f"{path} can't be read as an image. Check that it exists and opens in a viewer.")
    return cv2.cvtColor(image_bgr_HW3, cv2.COLOR_BGR2RGB)


def _save_png(image: Image.Image, path: Path) -> None:
    content = io.BytesIO()
    image.save(content, format="PNG")
    write_bytes_atomic(path, content.getvalue())


def _colourise(labels_HW: np.ndarray, palette: Palette) -> np.ndarray:
    table_K3 = np.array([*palette, _IGNORED], dtype=np.float32)
    ids_HW = labels_HW.astype(np.int64)
    without_colour_HW = (ids_HW < 0) | (ids_HW >= len(palette))
    return table_K3[np.where(without_colour_HW, len(palette), ids_HW)]


def _find_borders(labels_HW: np.ndarray) -> np.ndarray:
    borders_HW = np.zeros(labels_HW.shape, dtype=bool)
    borders_HW[:, :-1] |= labels_HW[:, :-1] != labels_HW[:, 1:]
    borders_HW[:-1] |= labels_HW[:-1] != labels_HW[1:]
    return borders_HW


@functools.cache
def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(_find_font(), size=14)


def _find_font() -> str:
    """Matplotlib's, because Pillow's own has no letter beyond ASCII."""
    import matplotlib

    return str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"))


@functools.cache
def _find_letters() -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(_find_font()).get_charmap())


def _name_legend(class_id: int, name: str) -> str:
    """The name of a class, or its id where the font lacks a letter of it, such as a Chinese one."""
    return name if _find_letters().issuperset(map(ord, name)) else f"class {class_id}"


def _place_legend(names: list[str], width_px: int) -> list[tuple[int, int]]:
    """Left edge (pixels) and row of each entry, wrapped to the width."""
    places: list[tuple[int, int]] = []
    x, row = _GAP_PX, 0
    for name in names:
        entry_px = 23 + round(_font().getlength(name)) + 22
        if x > _GAP_PX and x + entry_px > width_px:
            x, row = _GAP_PX, row + 1
        places.append((x, row))
        x += entry_px
    return places
