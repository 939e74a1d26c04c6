"""`acc_seg` as MMSegmentation computes it, bit for bit, and without a question that a GPU would have to answer."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ds_seg.openmmlab  # noqa: F401
from ds_seg.models.pixel_accuracy import accuracy

from mmseg.models.decode_heads import decode_head  # isort: skip
from mmseg.models.losses import accuracy as theirs  # isort: skip


@pytest.mark.parametrize("ignored", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(1, 150, 63, 65), (3, 2, 40, 40), (2, 7, 1, 1)])
def test_the_bits_of_mmsegmentation(shape, ignored):
    generator = torch.Generator().manual_seed(0)
    scores_BKHW = torch.randn(shape, generator=generator)
    labels_BHW = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)
    labels_BHW[torch.rand(labels_BHW.shape, generator=generator) < ignored] = 255
    ours, wanted = (f(scores_BKHW, labels_BHW, ignore_index=255) for f in (accuracy, theirs))
    assert ours.shape == wanted.shape == (1,) and ours.dtype == wanted.dtype and torch.equal(ours, wanted)


def test_what_is_not_asked_of_heads_is_mmsegmentations_own():
    scores_BKHW, labels_BHW = torch.randn(2, 5, 4, 4), torch.randint(5, (2, 4, 4))
    for options in ({"topk": (1, 3)}, {"topk": 2}, {}):
        ours, wanted = accuracy(scores_BKHW, labels_BHW, **options), theirs(scores_BKHW, labels_BHW, **options)
        assert torch.equal(torch.stack([*ours]), torch.stack([*wanted]))


class Questions(TorchDispatchMode):
    """Counts operators whose result the host has to know."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masked = func is torch.ops.aten.index.Tensor and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        self.count += masked or func in (torch.ops.aten.nonzero.default, torch.ops.aten._local_scalar_dense.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("function", "questions"), [("ours", 0), ("theirs", 2)])
def test_the_host_need_not_wait(function, questions):
    with Questions() as asked:
        used = decode_head.accuracy if function == "ours" else theirs
        used(torch.randn(1, 5, 4, 4), torch.randint(5, (1, 4, 4)), ignore_index=255)
    assert asked.count == questions
