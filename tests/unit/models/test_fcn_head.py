from __future__ import annotations

import pytest
import torch
from torch import nn

from ds_seg.models import FCNHead, SyncBatchNorm

from mmseg.models.builder import HEADS, build_head  # isort: skip
from mmseg.models.decode_heads.fcn_head import FCNHead as MMSegFCNHead  # isort: skip

LOSS = {"type": "CrossEntropyLoss", "avg_non_ignore": True}
PROBE = {"in_channels": 8, "channels": 8, "num_convs": 0, "num_classes": 5, "with_norm": True, "loss_decode": LOSS}


def test_the_seed_pages_head_builds_as_written():
    head = build_head(
        dict(type="FCNHead", in_channels=3200, channels=3200, num_convs=0, num_classes=150, with_norm=True)
    )
    assert type(head) is FCNHead
    assert HEADS.get("FCNHead") is FCNHead
    assert sum(p.numel() for p in head.parameters()) == 486_550
    assert not any(isinstance(m, nn.Conv2d) for name, m in head.named_modules() if name != "conv_seg")
    assert isinstance(head.norm, SyncBatchNorm)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"num_convs": 1, "concat_input": False},
        {"num_convs": 3, "kernel_size": 1, "norm_cfg": {"type": "BN"}},
        {"dilation": 2, "input_transform": "resize_concat", "in_index": [0, 1], "in_channels": [6, 4]},
        {"num_convs": 0, "concat_input": False, "channels": 6},
    ],
)
def test_equals_mmseg_where_both_are_defined(arguments):
    arguments = {"in_channels": 6, "channels": 4, "num_classes": 5, "loss_decode": LOSS, "in_index": 0, **arguments}
    ours, theirs = FCNHead(**arguments).eval(), MMSegFCNHead(**arguments).eval()
    ours.load_state_dict(theirs.state_dict())
    inputs = [torch.randn(2, 6, 8, 8), torch.randn(2, 4, 4, 4)]
    torch.testing.assert_close(ours(inputs), theirs(inputs), rtol=0, atol=0)


def test_norm_comes_before_the_classifier():
    head = FCNHead(**PROBE).eval()
    nn.init.normal_(head.norm.weight)
    x = torch.randn(2, 8, 3, 3)
    torch.testing.assert_close(head([x]), head.conv_seg(head.norm(x)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_convs": -1}, "num_convs >= 0 and a positive int as dilation, got -1 and 1"),
        ({"dilation": 0}, "got 0 and 0"),
        ({"dilation": 1.0}, "got 0 and 1.0"),
        ({"channels": 4}, "num_convs=0 needs in_channels == channels, got 8 and 4"),
    ],
)
def test_assertions(arguments, message):
    with pytest.raises(AssertionError, match=message):
        FCNHead(**{**PROBE, **arguments})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_fp32_whatever_it_is_handed(dtype):
    head = FCNHead(**PROBE, dropout_ratio=0.0).bfloat16()
    assert {p.dtype for p in head.parameters()} == {torch.float32}
    features = [torch.randn(2, 8, 4, 4).to(dtype).requires_grad_()]
    labels = torch.randint(0, 5, (2, 1, 8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        losses = head.forward_train(features, [], labels, None)
        logits = head(features)
    assert logits.dtype == losses["loss_ce"].dtype == torch.float32
    losses["loss_ce"].backward()
    assert features[0].grad.dtype == dtype
    plain = head([features[0].float()])
    torch.testing.assert_close(logits, plain, rtol=0, atol=0)


def test_no_weight_is_cast_in_a_forward(monkeypatch):
    head = FCNHead(**PROBE)
    monkeypatch.setattr(nn.Module, "_apply", lambda *_: pytest.fail("the module was cast"))
    head([torch.randn(1, 8, 2, 2)])
