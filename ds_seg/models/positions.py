"""The learned position table, resized to whatever patch grid an image has.

Shape legend: N positions (class token first), D channels, h and w the patch grid.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def compute_grid_side(positions: int) -> int | None:
    """Side of the square patch grid behind a table of `positions` rows, the class token's included.

    Returns:
        The side in patches, or None if the rows don't make a square.
    """
    side = math.isqrt(max(positions - 1, 0))
    return side if side > 0 and side * side == positions - 1 else None


def resize_position_table(table_1ND: Tensor, grid_hw: tuple[int, int]) -> Tensor:
    """Interpolate a square position table to another patch grid; the class token's row is kept.

    Bicubic in FP32, differentiable. A table that already has the grid is returned untouched.

    Args:
        table_1ND: (1, 1 + side * side, D), any float dtype.
        grid_hw: height and width wanted, in patches.

    Returns:
        (1, 1 + h * w, D): FP32 if it was resized, else the very tensor passed in.
    """
    side = compute_grid_side(table_1ND.shape[1])
    assert side is not None, f"a position table of {table_1ND.shape[1]} rows has no square grid"
    if (side, side) == tuple(grid_hw):
        return table_1ND
    table_1ND = table_1ND.float()
    grid_1Dhw = table_1ND[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    grid_1Dhw = F.interpolate(grid_1Dhw, size=grid_hw, mode="bicubic", align_corners=False, antialias=False)
    return torch.cat([table_1ND[:, :1], grid_1Dhw.flatten(2).transpose(1, 2)], dim=1)
