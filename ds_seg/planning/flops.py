"""FLOPs of the backbone by formula, beside those that torch's counter finds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_seg.config.zero_sizes import count_block


def compute_tokens(crop_size_px: tuple[int, int], patch_px: int) -> int:
    """Tokens of one crop, class token included."""
    height, width = crop_size_px
    return (height // patch_px) * (width // patch_px) + 1


def compute_forward_flops(backbone: Mapping[str, Any], crop_size_px: tuple[int, int]) -> float:
    """FLOPs of the forward pass for one crop; a backward pass takes twice as many.

    Args:
        backbone: the config of InternViT; blocks behind the last tap are not run.
        crop_size_px: height and width.

    Returns:
        Those of the matrix products and of attention: 16.34e12 for InternViT-6B at 504 px.
    """
    channels, patch_px = int(backbone["embed_dim"]), int(backbone.get("patch_size", 14))
    tokens = compute_tokens(crop_size_px, patch_px)
    block = 2 * tokens * count_block(backbone) + 4 * tokens**2 * channels
    patches = 2 * (tokens - 1) * int(backbone.get("in_chans", 3)) * patch_px**2 * channels
    return (int(backbone["out_indices"][-1]) + 1) * block + patches
