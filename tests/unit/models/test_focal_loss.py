"""FocalLoss without mmcv's compiled operators: on a GPU, where MMSegmentation wants one, the same as on a CPU."""

import pytest
import torch

import ds_seg.models  # noqa: F401

from mmseg.models.losses import FocalLoss  # isort: skip

OPTIONS = {
    "plain": {},
    "weighted": {"class_weight": [1.0, 2.0, 0.5], "loss_weight": 3.0, "gamma": 1.5},
    "an alpha a class": {"alpha": [0.2, 0.5, 0.9]},
    "of every pixel": {"reduction": "none"},
}


class OnGpu(torch.Tensor):
    """A tensor that MMSegmentation takes for one on a GPU."""

    is_cuda = True


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_focal_loss_on_a_gpu_is_that_of_a_cpu(options, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    generator = torch.Generator().manual_seed(0)
    scores_BKHW = torch.randn(2, 3, 5, 4, generator=generator)
    labels_BHW = torch.randint(3, (2, 5, 4), generator=generator)
    labels_BHW[0, 0] = 255
    loss = FocalLoss(**options)
    wanted = loss(scores_BKHW, labels_BHW, ignore_index=255)
    assert torch.equal(loss(scores_BKHW.as_subclass(OnGpu), labels_BHW, ignore_index=255), wanted)
