from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ds_seg.models.positions import compute_grid_side, resize_position_table


@pytest.mark.parametrize(("positions", "side"), [(1025, 32), (257, 16), (2, 1), (256, None), (1, None), (0, None)])
def test_grid_side(positions, side):
    assert compute_grid_side(positions) == side


def test_same_grid_is_the_same_tensor():
    table = torch.randn(1, 10, 4).bfloat16()
    assert resize_position_table(table, (3, 3)) is table


def test_resize_is_bicubic_in_fp32_and_keeps_the_class_token():
    table = torch.randn(1, 17, 6).bfloat16()
    out = resize_position_table(table, (5, 7))
    assert out.dtype == torch.float32
    assert out.shape == (1, 36, 6)
    torch.testing.assert_close(out[:, 0], table[:, 0].float(), rtol=0, atol=0)
    grid = table[:, 1:].float().view(4, 4, 6).permute(2, 0, 1)[None]
    wanted = F.interpolate(grid, size=(5, 7), mode="bicubic", align_corners=False)[0].permute(1, 2, 0).reshape(35, 6)
    torch.testing.assert_close(out[0, 1:], wanted, rtol=0, atol=0)


def test_resize_is_differentiable():
    table = torch.randn(1, 17, 2, dtype=torch.float32, requires_grad=True)
    resize_position_table(table, (3, 8)).sum().backward()
    assert table.grad is not None
    assert (table.grad[:, 1:] != 0).all()


def test_rows_that_make_no_square_are_refused():
    with pytest.raises(AssertionError, match="6 rows has no square grid"):
        resize_position_table(torch.zeros(1, 6, 2), (2, 2))
