"""Softmax cross-entropy one image at a time: MMSegmentation's values and gradients in the memory of one image.

MMSegmentation resizes the logits of a whole micro-batch to the crop, and its loss and their gradients are FP32 tensors
of that size: with 150 classes and crops of 504 px, 152 MB each an image. Here every image's gradient is computed
together with its loss and brought back to the head's own resolution, so that only one image is large at a time.

Shape legend: B images, K classes, H and W pixels, h and w the feature map.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import ds_seg.openmmlab  # noqa: F401  (before mmseg)
from ds_seg.models.fcn_head import FCNHead

from mmseg.models.decode_heads.decode_head import BaseDecodeHead  # isort: skip
from mmseg.models.losses import CrossEntropyLoss  # isort: skip

_RESIZE_AND_SUM = (BaseDecodeHead.losses, FCNHead.losses)
"""What every head but a few has as its `losses`."""


def compute_losses_by_image(head: nn.Module) -> None:
    """Let a head of MMSegmentation take its losses image by image, where a mean over images is what it computes.

    That is so where the losses are plain means of softmax cross-entropy over pixels. Any other head keeps its own way:
    one with a pixel sampler, with Dice or Lovasz, or with losses of its own making.

    Args:
        head: a decode or auxiliary head; its `losses` is replaced.
    """
    if getattr(type(head), "losses", None) not in _RESIZE_AND_SUM or head.sampler is not None:
        return
    losses = _list_losses(head)
    if all(_is_mean_over_pixels(loss) for loss in losses) and len({loss.avg_non_ignore for loss in losses}) == 1:
        head.losses = MethodType(_losses_by_image, head)  # hides that of its class


def _list_losses(head: Any) -> list[Any]:
    return list(head.loss_decode) if isinstance(head.loss_decode, nn.ModuleList) else [head.loss_decode]


def _is_mean_over_pixels(loss: Any) -> bool:
    return isinstance(loss, CrossEntropyLoss) and not (loss.use_sigmoid or loss.use_mask) and loss.reduction == "mean"


def _losses_by_image(head: Any, seg_logit: Tensor, seg_label: Tensor) -> dict[str, Tensor]:
    """MMSegmentation's `losses`: its names, and its values up to the rounding of a sum in another order."""
    if len(seg_logit) == 1:
        return type(head).losses(head, seg_logit, seg_label)
    names: list[str] = []
    values = _MeanOverImages.apply(seg_logit, seg_label, head, names)
    return dict(zip(names, values, strict=True))


class _MeanOverImages(torch.autograd.Function):
    """The entries of a micro-batch as means over its images; the gradient of each is taken with its value."""

    @staticmethod
    def forward(ctx: Any, logits_BKhw: Tensor, labels_B1HW: Tensor, head: Any, names: list[str]) -> tuple[Tensor, ...]:
        differentiable = ctx.needs_input_grad[0]
        shares = _compute_shares(head, labels_B1HW)
        values: dict[str, Tensor] = {}
        gradients_BKhw: dict[str, Tensor] = {}
        for index in range(len(logits_BKhw)):
            image = slice(index, index + 1)
            logits_1Khw = logits_BKhw[image].detach().requires_grad_(differentiable)
            with torch.set_grad_enabled(differentiable):
                entries = type(head).losses(head, logits_1Khw, labels_B1HW[image])
            for name, value in entries.items():
                share = shares["acc_seg" if name == "acc_seg" else "loss"][index]
                values[name] = values.get(name, 0) + value.detach() * share
                if value.requires_grad:
                    (gradient_1Khw,) = torch.autograd.grad(value, logits_1Khw, retain_graph=len(entries) > 2)
                    gradients_BKhw.setdefault(name, torch.empty_like(logits_BKhw))[image] = gradient_1Khw * share
        names.extend(values)
        ctx.positions = [names.index(name) for name in gradients_BKhw]
        ctx.mark_non_differentiable(*(value for name, value in values.items() if name not in gradients_BKhw))
        ctx.save_for_backward(*gradients_BKhw.values())
        return tuple(values.values())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *factors: Tensor) -> tuple[Tensor | None, None, None, None]:
        parts = [factors[position] * part for position, part in zip(ctx.positions, ctx.saved_tensors, strict=True)]
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0], None, None, None


def _compute_shares(head: Any, labels_B1HW: Tensor) -> dict[str, Tensor]:
    """What an image counts in the mean: a pixel's weight is the same in all, or an image's is."""
    labelled_B = (labels_B1HW != head.ignore_index).flatten(1).sum(1).double()
    by_pixels_B = (labelled_B / labelled_B.sum().clamp(min=1)).float()
    by_images_B = torch.full_like(by_pixels_B, 1 / len(labels_B1HW))
    return {"acc_seg": by_pixels_B, "loss": by_pixels_B if _list_losses(head)[0].avg_non_ignore else by_images_B}
