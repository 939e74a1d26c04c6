from __future__ import annotations

import pytest
import torch
from torch import nn

from ds_seg.errors import ConfigError
from ds_seg.models.float32 import Float32Module, without_autocast


class Part(Float32Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.register_buffer("counts", torch.zeros(2, dtype=torch.int64))
        self.make_float32()


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.double(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to("cpu", torch.bfloat16),
        lambda m: nn.Sequential(m, nn.Linear(2, 2)).half()[0],
    ],
)
def test_no_cast_changes_dtype_or_value(cast):
    module = Part()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    after = cast(module).state_dict()
    assert {v.dtype for v in after.values()} == {torch.float32, torch.int64}
    for name, value in after.items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_a_move_still_moves_when_it_also_casts():
    module = Part().to("meta", torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.float32)}
    assert {p.dtype for p in module.to_empty(device="cpu").parameters()} == {torch.float32}


def test_fp32_also_where_the_default_dtype_is_not():
    torch.set_default_dtype(torch.bfloat16)
    try:
        module = Part()
    finally:
        torch.set_default_dtype(torch.float32)
    assert {t.dtype for t in module.state_dict().values()} == {torch.float32, torch.int64}


def test_a_partitioned_parameter_is_refused():
    module = Part()
    module.inner[0].weight.ds_id = 0  # the mark that deepspeed.zero.Init leaves
    with pytest.raises(ConfigError, match=r"Part was built inside deepspeed\.zero\.Init"):
        module.make_float32()


def test_without_autocast_keeps_fp32():
    x = torch.randn(3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with without_autocast(x.device):
            assert (x @ x).dtype == torch.float32
