"""Windows: the grid of MMSeg's slide_inference, and the messages for grids that can't be."""

from __future__ import annotations

import re

import numpy as np
import pytest

from ds_seg.errors import ConfigError
from ds_seg.evaluation.windows import Window, compute_windows


def mmseg_grid(height, width, crop, stride):
    """The loop of slide_inference in MMSeg 0.30, written out."""
    rows = max(height - crop[0] + stride[0] - 1, 0) // stride[0] + 1
    columns = max(width - crop[1] + stride[1] - 1, 0) // stride[1] + 1
    windows = []
    for row in range(rows):
        for column in range(columns):
            y2, x2 = min(row * stride[0] + crop[0], height), min(column * stride[1] + crop[1], width)
            windows.append((max(y2 - crop[0], 0), max(x2 - crop[1], 0), y2, x2))
    return windows


@pytest.mark.parametrize("height", [1, 27, 28, 29, 47, 48, 100])
@pytest.mark.parametrize("width", [13, 42, 43, 200])
def test_the_grid_is_mmsegs_and_covers_everything(height, width):
    windows = compute_windows(height, width, (28, 42), (20, 33))

    assert windows == mmseg_grid(height, width, (28, 42), (20, 33))
    covered = np.zeros((height, width), dtype=int)
    for window in windows:
        covered[window.y1 : window.y2, window.x1 : window.x2] += 1
    assert covered.min() >= 1
    assert {window.size for window in windows} == {(min(height, 28), min(width, 42))}


def test_the_published_recipe_on_a_4_to_3_image():
    windows = compute_windows(504, 672, (504, 504), (322, 322), patch_size=14)

    assert windows == [Window(0, 0, 504, 504), Window(0, 168, 504, 672)]


def test_a_small_view_is_one_window_of_its_own_size():
    assert compute_windows(30, 20, (504, 504), (322, 322)) == [Window(0, 0, 30, 20)]


@pytest.mark.parametrize(("view", "window"), [((30, 600), "30x504"), ((600, 30), "504x30")])
def test_a_view_that_is_no_multiple_of_the_patch_is_refused_with_the_remedy(view, window):
    message = f"a window of {window} px (of a view of {view[0]}x{view[1]} px) is not a multiple of the backbone's patch"
    with pytest.raises(ConfigError, match=re.escape(message) + " of 14 px.*ResizeToMultiple', size_divisor=14"):
        compute_windows(*view, (504, 504), (322, 322), patch_size=14)


@pytest.mark.parametrize(("crop", "stride"), [((28, 28), (29, 20)), ((28, 28), (20, 29)), ((28, 0), (20, 0))])
def test_a_grid_with_gaps_is_refused(crop, stride):
    with pytest.raises(ConfigError, match=r"can't cover an image\. Both must be positive and the stride at most"):
        compute_windows(100, 100, crop, stride)
