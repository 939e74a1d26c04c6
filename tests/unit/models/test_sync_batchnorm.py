from __future__ import annotations

import pytest
import torch
from torch import nn

from ds_seg.models import SyncBatchNorm

from mmcv.cnn import build_norm_layer  # isort: skip


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False])
def test_a_world_of_one_is_batchnorm(momentum, training):
    ours, theirs = (kind(3, momentum=momentum).train(training) for kind in (SyncBatchNorm, nn.BatchNorm2d))
    for _ in range(2):
        x = torch.randn(2, 3, 4, 5) * 2 + 1
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)
    for got, wanted in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_mmcv_builds_it_as_syncbn():
    name, layer = build_norm_layer({"type": "SyncBN", "requires_grad": False, "eps": 1e-3}, 7, postfix=1)
    assert name == "bn1"
    assert type(layer) is SyncBatchNorm
    assert layer.eps == 1e-3
    assert not layer.weight.requires_grad


def test_checkpoints_of_torchs_own_load():
    ours = SyncBatchNorm(3)
    ours.load_state_dict(nn.SyncBatchNorm(3).state_dict())
    assert not isinstance(ours, nn.SyncBatchNorm)  # DistributedDataParallel refuses that class on CPU


def test_other_shapes_are_refused_as_by_torch():
    with pytest.raises(ValueError, match="at least 2D input"):
        SyncBatchNorm(3)(torch.zeros(3))


def test_on_other_devices_it_is_torchs_code(monkeypatch):
    seen = []
    monkeypatch.setattr(nn.SyncBatchNorm, "forward", lambda self, x: seen.append(x) or x)
    monkeypatch.setattr(SyncBatchNorm, "_must_reduce", lambda self: True)
    SyncBatchNorm(3).to("meta")(torch.zeros(2, 3, device="meta"))
    assert len(seen) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_on_a_gpu_it_equals_batchnorm():
    ours, theirs = SyncBatchNorm(3).cuda(), nn.BatchNorm2d(3).cuda()
    x = torch.randn(2, 3, 4, 5, device="cuda")
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
