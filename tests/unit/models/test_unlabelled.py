"""Against MMSegmentation's own functions, which are kept; that they still fail is held too: if not, ours can go."""

from __future__ import annotations

import pytest
import torch

from ds_seg.models import unlabelled

from mmseg.models.losses import CrossEntropyLoss, LovaszLoss  # isort: skip

SHAPE = (2, 5, 4, 4)


def make_labels(labelled):
    labels_BHW = torch.full((2, 4, 4), 255)
    labels_BHW.view(-1)[:labelled] = torch.arange(labelled) % 5
    return labels_BHW


def make_logits(channels=5):
    return torch.randn(2, channels, 4, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("labelled", [0, 1, 16, 17])
def test_lovasz_is_finite_with_any_number_of_labelled_pixels(labelled, per_image):
    """Rejects a gradient from crops without a label, and an exception from an image without one (16 of 32 pixels)."""
    loss = LovaszLoss(per_image=per_image, reduction="mean" if per_image else "none")
    logits_BKHW = make_logits()
    value = loss(logits_BKHW, make_labels(labelled), ignore_index=255)
    value.backward()
    assert value.shape == () and torch.isfinite(value) and torch.isfinite(logits_BKHW.grad).all()
    assert (value.item() > 0) == (logits_BKHW.grad.abs().sum().item() > 0) == (labelled > 0)


def test_an_image_without_a_label_counts_as_zero():
    labels_BHW = make_labels(16)
    loss = LovaszLoss(per_image=True)
    both, alone = loss(make_logits(), labels_BHW), loss(make_logits()[:1], labels_BHW[:1])
    torch.testing.assert_close(both, alone / 2)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("labelled", [0, 1])
def test_binary_cross_entropy_of_one_channel(reduction, labelled):
    logits_B1HW = make_logits(1)
    loss = CrossEntropyLoss(use_sigmoid=True, reduction=reduction, avg_non_ignore=True)
    value = loss(logits_B1HW, make_labels(labelled), ignore_index=255)
    value.sum().backward()
    assert value.shape == ((2, 4, 4) if reduction == "none" else ())
    assert (value.sum().item() > 0) == (logits_B1HW.grad.abs().sum().item() > 0) == (labelled > 0)


def test_elsewhere_the_functions_are_mmsegmentations():
    probs, labels = make_logits().softmax(1), make_labels(20)
    ours, theirs = (f(probs, labels, 255) for f in (unlabelled.flatten_probs, unlabelled._flatten_probs))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert torch.equal(unlabelled.lovasz_softmax_flat(*ours), unlabelled._lovasz_softmax_flat(*ours))
    binary = make_logits(1), make_labels(2)
    ours, theirs = (
        f(*binary, ignore_index=255) for f in (unlabelled.binary_cross_entropy, unlabelled._binary_cross_entropy)
    )
    assert torch.equal(ours, theirs)


def test_mmsegmentation_still_fails_there():
    """Where this fails, a newer MMSegmentation needs ds_seg.models.unlabelled no more."""
    probs = make_logits().softmax(1)
    assert unlabelled._lovasz_softmax_flat(*unlabelled._flatten_probs(probs, make_labels(0), 255)).shape == (0, 5)
    assert unlabelled._flatten_probs(probs, make_labels(1), 255)[0].shape == (5,)
    with pytest.raises(RuntimeError, match="max"):
        unlabelled._binary_cross_entropy(make_logits(1), make_labels(0), ignore_index=255)
