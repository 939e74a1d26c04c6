"""Losses taken image by image, against MMSegmentation's own of the whole micro-batch."""

from __future__ import annotations

import pytest
import torch

from ds_seg.models import imagewise_losses
from ds_seg.models.head_building import build_one_head

CE = {"type": "CrossEntropyLoss"}
LOSSES = {
    "mean over all pixels": CE,
    "mean over labelled pixels": {**CE, "avg_non_ignore": True},
    "class weights": {**CE, "class_weight": [0.5, 2.0, 1.0, 0.1], "loss_weight": 0.4},
    "two losses": [{**CE, "loss_name": "loss_a"}, {**CE, "loss_name": "loss_b", "class_weight": [1.0, 0.0, 2.0, 3.0]}],
    "two losses of one name": [CE, {**CE, "loss_weight": 2.0}],
}
TOLERANCE = 1e-6
"""Relative to the largest value; measured 1.3e-7."""


def make_head(**changes):
    head = {"type": "FCNHead", "in_channels": 8, "channels": 8, "num_convs": 0, "num_classes": 4, "loss_decode": CE}
    return build_one_head("model.decode_head", {**head, **changes}, after_another=False)


def make_batch():
    """Logits of three images; one has few labelled pixels and one has none."""
    generator = torch.Generator().manual_seed(0)
    logits_BKhw = 3 * torch.randn(3, 4, 5, 6, generator=generator)
    labels_B1HW = torch.randint(4, (3, 1, 35, 42), generator=generator)
    labels_B1HW[1, :, 3:] = 255
    labels_B1HW[2] = 255
    return logits_BKhw, labels_B1HW


def compute(losses, logits_BKhw, labels_B1HW):
    """Entries, and the gradient of losses that are weighted unlike each other."""
    logits_BKhw = logits_BKhw.clone().requires_grad_()
    entries = losses(logits_BKhw, labels_B1HW)
    weighted = [value * (1 + index) for index, (name, value) in enumerate(entries.items()) if "loss" in name]
    torch.stack([value.sum() for value in weighted]).sum().backward()
    return {name: value.detach() for name, value in entries.items()}, logits_BKhw.grad


def largest_difference(head, logits_BKhw, labels_B1HW):
    ours, our_gradient = compute(head.losses, logits_BKhw, labels_B1HW)
    theirs, their_gradient = compute(lambda *batch: type(head).losses(head, *batch), logits_BKhw, labels_B1HW)
    assert list(ours) == list(theirs) and all(ours[name].shape == theirs[name].shape for name in ours)
    differences = [((ours[name] - theirs[name]).abs() / theirs[name].abs()).max().item() for name in ours]
    return max(*differences, ((our_gradient - their_gradient).abs().max() / their_gradient.abs().max()).item())


@pytest.mark.parametrize("loss_decode", LOSSES.values(), ids=LOSSES.keys())
def test_values_and_gradients_are_mmsegmentations(loss_decode):
    head = make_head(loss_decode=loss_decode)
    assert head.losses.__func__ is imagewise_losses._losses_by_image
    assert largest_difference(head, *make_batch()) < TOLERANCE


@pytest.mark.parametrize("loss_decode", [CE, {**CE, "avg_non_ignore": True}])
def test_equal_shares_where_pixels_count_are_rejected_and_the_reverse(loss_decode, monkeypatch):
    compute_shares = imagewise_losses._compute_shares

    def swap(head, labels_B1HW):
        shares = compute_shares(head, labels_B1HW)
        by_images_B = torch.full((3,), 1 / 3)
        return shares | {"loss": by_images_B if head.loss_decode.avg_non_ignore else shares["acc_seg"]}

    monkeypatch.setattr(imagewise_losses, "_compute_shares", swap)
    assert largest_difference(make_head(loss_decode=loss_decode), *make_batch()) > 0.1


def test_a_batch_without_a_label_has_no_loss_and_no_gradient():
    logits_BKhw, labels_B1HW = make_batch()
    for loss_decode in (CE, {**CE, "avg_non_ignore": True}):
        entries, gradient = compute(make_head(loss_decode=loss_decode).losses, logits_BKhw, labels_B1HW[[2, 2, 2]])
        assert entries["loss_ce"] == 0 and gradient.abs().max() == 0


def test_without_gradients_the_values_are_the_same():
    head, batch = make_head(), make_batch()
    with torch.no_grad():
        entries = head.losses(*batch)
    assert entries == compute(head.losses, *batch)[0] and not entries["loss_ce"].requires_grad


@pytest.mark.parametrize(
    "changes",
    [
        {"loss_decode": {**CE, "use_sigmoid": True}},
        {"loss_decode": [CE, {"type": "DiceLoss"}]},
        {"loss_decode": [{**CE, "avg_non_ignore": True}, {**CE, "loss_name": "loss_b"}]},
        {"sampler": {"type": "OHEMPixelSampler", "thresh": 0.7, "min_kept": 10}},
    ],
    ids=["sigmoid", "Dice", "two ways to average", "pixel sampler"],
)
def test_other_losses_stay_as_they_are(changes):
    head = make_head(**changes)
    assert head.losses.__func__ is type(head).losses
