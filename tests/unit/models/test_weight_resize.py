"""Resizing of weights at load time.

Shape legend: B images, D channels out, C channels in, p and q the old and new side of a patch.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ds_seg.models.weight_resize import PATCH_KERNEL, POSITION_TABLE, is_resizable, resize_patch_kernel, resize_weight


def embed(kernel_DCqq, patch_BCqq):
    return torch.einsum("dchw,bchw->bd", kernel_DCqq, patch_BCqq)


def resize_as_image(kernel_DCpp, side_px):
    return F.interpolate(kernel_DCpp, size=(side_px, side_px), mode="bicubic", antialias=True)


def measure(resize, old_px, new_px, patch_BCpp):
    """Distance of the embeddings of resized patches from those of the patches, over the size of the latter."""
    torch.manual_seed(0)
    kernel_DCpp = torch.randn(6, 3, old_px, old_px)
    before_BD = embed(kernel_DCpp, patch_BCpp)
    after_BD = embed(resize(kernel_DCpp, new_px), resize_as_image(patch_BCpp, new_px))
    return ((after_BD - before_BD).norm() / before_BD.norm()).item()


@pytest.mark.parametrize(("old_px", "new_px"), [(14, 16), (14, 28), (16, 16)])
def test_enlarged_patches_keep_their_embedding(old_px, new_px):
    torch.manual_seed(1)
    patches = torch.randn(8, 3, old_px, old_px)
    assert measure(resize_patch_kernel, old_px, new_px, patches) < 1e-5  # measured 1e-6; as an image 0.3 to 3
    if old_px != new_px:
        assert measure(resize_as_image, old_px, new_px, patches) > 0.1


def test_reduced_patches_nearly_keep_the_embedding_of_what_they_can_show():
    torch.manual_seed(1)
    smooth = F.interpolate(torch.randn(8, 3, 4, 4), size=(16, 16), mode="bicubic")
    assert measure(resize_patch_kernel, 16, 14, smooth) < 0.02  # measured 0.004
    assert measure(resize_as_image, 16, 14, smooth) > 0.1


def test_bf16_kernels_are_resized_in_fp32():
    kernel = torch.randn(2, 3, 16, 16).bfloat16()
    resized = resize_weight(PATCH_KERNEL, kernel, (2, 3, 14, 14))
    assert resized.dtype == torch.float32
    torch.testing.assert_close(resized, resize_patch_kernel(kernel.float(), 14), rtol=0, atol=0)


def test_what_fits_is_returned_untouched():
    value = torch.ones(3)
    assert resize_weight("blocks.0.norm1.weight", value, (3,)) is value


@pytest.mark.parametrize(
    ("name", "got", "wanted", "expected"),
    [
        (POSITION_TABLE, (1, 17, 8), (1, 37, 8), True),
        (POSITION_TABLE, (1, 17, 8), (1, 37, 9), False),
        (POSITION_TABLE, (1, 18, 8), (1, 37, 8), False),
        (POSITION_TABLE, (17, 8), (1, 37, 8), False),
        (PATCH_KERNEL, (8, 3, 16, 16), (8, 3, 14, 14), True),
        (PATCH_KERNEL, (8, 1, 16, 16), (8, 3, 14, 14), False),
        (PATCH_KERNEL, (8, 3, 16, 14), (8, 3, 14, 14), False),
        ("blocks.0.mlp.fc1.weight", (8, 3, 16, 16), (8, 3, 14, 14), False),
    ],
)
def test_what_may_be_resized(name, got, wanted, expected):
    assert is_resizable(name, got, wanted) is expected
