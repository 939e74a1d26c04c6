"""Weights whose shape follows from the image or patch size, brought to another one when they are loaded.

Shape legend: D channels out, C channels in, p and q the old and new side of a patch, N positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_seg.models.positions import compute_grid_side, resize_position_table

POSITION_TABLE = "pos_embed"
PATCH_KERNEL = "patch_embed.proj.weight"
PATCH_METHOD = "pseudo-inverse of bicubic resizing (FlexiViT) in FP32"
POSITION_METHOD = "bicubic in FP32"


def resize_patch_kernel(kernel_DCpp: Tensor, side_px: int) -> Tensor:
    """Resize a square patch embedding so that a resized patch keeps its embedding.

    The new kernel's product with a patch that was resized bicubically from p to q is, in the least-squares sense,
    the old one's with the patch itself: exactly so where q >= p. Resizing the kernel as if it were an image would
    scale the embedding by about (q / p)^2.

    Source: Beyer et al., FlexiViT (2023), section 3.4; google-research/big_vision
    big_vision/models/proj/flexi/vit.py. What differs: rows and columns are resized one after the other.

    Args:
        kernel_DCpp: (D, C, p, p), any float dtype.
        side_px: q.

    Returns:
        (D, C, q, q): FP32.
    """
    old_px = kernel_DCpp.shape[-1]
    identity_11pp = torch.eye(old_px, dtype=torch.float64)[None, None]
    enlarge_qp = F.interpolate(identity_11pp, size=(side_px, old_px), mode="bicubic", antialias=True)[0, 0]
    inverse_qp = torch.linalg.pinv(enlarge_qp.T).float()
    return inverse_qp @ kernel_DCpp.float() @ inverse_qp.T


def is_resizable(name: str, got: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a weight of our `name` can be brought from one shape to the other.

    Args:
        name: our name of the weight.
        got: its shape in a file.
        wanted: its shape in the backbone.
    """
    if name == POSITION_TABLE and len(got) == len(wanted) == 3:
        sides = compute_grid_side(got[1]), compute_grid_side(wanted[1])
        return got[::2] == wanted[::2] and None not in sides
    if name == PATCH_KERNEL and len(got) == len(wanted) == 4:
        return got[:2] == wanted[:2] and got[2] == got[3]
    return False


def resize_weight(name: str, value: Tensor, wanted: tuple[int, ...]) -> Tensor:
    """Bring a weight to the shape wanted; one that has it already is returned untouched."""
    if tuple(value.shape) == wanted:
        return value
    assert is_resizable(name, tuple(value.shape), wanted), f"{name}: {tuple(value.shape)} can't become {wanted}"
    if name == PATCH_KERNEL:
        return resize_patch_kernel(value, wanted[-1])
    side = compute_grid_side(wanted[1])
    assert side is not None
    return resize_position_table(value, (side, side))
