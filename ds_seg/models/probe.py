"""A trial of every head before anything is loaded: what can't train says so at start, and names its field.

Shape legend: B images, K classes, H and W pixels, h and w a feature map.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_seg.openmmlab  # noqa: F401  (before mmseg)
from ds_seg.config.build_errors import describe_error
from ds_seg.config.head_fields import HeadField, auxiliary_head_fields, decode_head_fields
from ds_seg.errors import ConfigError
from ds_seg.models.cascade import HeadCascade
from ds_seg.models.heads import SegmentationHeads, list_losses

from mmseg.models.decode_heads import STDCHead  # isort: skip

_PYRAMID_SCALES = (4.0, 2.0, 1.0, 0.5)
"""What `with_fpn` makes of the patch grid."""
_NOT_THE_CONFIG = (torch.OutOfMemoryError, torch.AcceleratorError, dist.DistError)
"""RuntimeErrors that tell about the machine."""


def probe_heads(
    heads: SegmentationHeads,
    model_cfg: Mapping[str, Any],
    backbone: nn.Module,
    *,
    micro_batch: int,
    crop_size_px: tuple[int, int],
) -> list[str]:
    """Run each head once on random maps and labels of the run's real size, forward and backward.

    A collective over all ranks, since SyncBatchNorm is one. All ranks draw the same values, so that what fails
    fails alike everywhere. Parameters, buffers, gradients, modes and generators are left as they were.

    Args:
        heads: as built, on the device that they will train on.
        model_cfg: the `model` dict they were built from.
        backbone: tells the number, channels and scales of the maps; is not run.
        micro_batch: B of a training step.
        crop_size_px: H and W of a training crop.

    Returns:
        Names of the trainable parameters that no loss depends on; DistributedDataParallel must know of them.

    Raises:
        ConfigError: a head or loss that fails on such input, needs an operator that is missing, or has no loss;
            named by field.
    """
    decode_fields, auxiliary_fields = decode_head_fields(model_cfg), auxiliary_head_fields(model_cfg)
    parts = [*_list_stages(heads.decode_head), *heads.auxiliary_heads]
    device = next(heads.parameters()).device
    with _left_unchanged(heads, device):
        features = draw_features(backbone, micro_batch, crop_size_px, device)
        labels_B1HW = _draw_labels(heads, micro_batch, crop_size_px, device)
        heads.train()
        for field, part in zip(decode_fields + auxiliary_fields, parts, strict=True):
            with _naming(field, features, crop_size_px):
                _validate_labels_fit(part, heads)
                _train_once(heads, part, features, labels_B1HW)
        unused = [name for name, p in heads.named_parameters() if p.requires_grad and p.grad is None]
        heads.eval()
        with torch.no_grad(), _naming(decode_fields[-1], features, crop_size_px):
            _predict_once(heads, features)
    return unused


def _list_stages(decode_head: nn.Module) -> list[nn.Module]:
    """The decode head; of a cascade what ends with its first head, with its second, and so on."""
    if not isinstance(decode_head, HeadCascade):
        return [decode_head]
    return [decode_head.first(count) for count in range(1, len(decode_head) + 1)]


def draw_features(
    backbone: nn.Module, micro_batch: int, crop_size_px: tuple[int, int], device: torch.device
) -> list[Tensor]:
    """Random FP32 maps of the shapes that a backbone puts out, each a leaf that requires a gradient.

    Args:
        backbone: tells number, channels and scales; is not run.
        micro_batch: B.
        crop_size_px: H and W of the images.
        device: where they are made.
    """
    grid_hw = [side // backbone.patch_size for side in crop_size_px]  # type: ignore[operator]
    channels: Sequence[int] = backbone.out_channels  # type: ignore[assignment]
    scales = _PYRAMID_SCALES if backbone.with_fpn else (1.0,) * len(channels)
    shapes = [
        (micro_batch, width, *(int(side * scale) for side in grid_hw))
        for width, scale in zip(channels, scales, strict=True)
    ]
    return [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]


def _draw_labels(
    heads: SegmentationHeads, micro_batch: int, crop_size_px: tuple[int, int], device: torch.device
) -> Tensor:
    labels_B1HW = torch.randint(heads.num_classes, (micro_batch, 1, *crop_size_px), device=device)
    if heads.ignore_index is not None:
        labels_B1HW[:, :, 0] = heads.ignore_index
    return labels_B1HW


def _validate_labels_fit(part: nn.Module, heads: SegmentationHeads) -> None:
    """A label out of a loss's range ends the process on a GPU, so it is found by comparison."""
    head: Any = part[-1] if isinstance(part, HeadCascade) else part
    if head.ignore_index != heads.ignore_index:
        raise ConfigError(
            f"its ignore_index is {head.ignore_index}, but that of the head that predicts is {heads.ignore_index}. "
            "Make them equal."
        )
    if head.num_classes < heads.num_classes and not isinstance(head, STDCHead):  # which makes labels of its own
        raise ConfigError(
            f"its num_classes is {head.num_classes}, but the labels name {heads.num_classes} classes. Make them equal."
        )


def _train_once(heads: SegmentationHeads, part: nn.Module, features: list[Tensor], labels_B1HW: Tensor) -> None:
    entries = heads.losses_of(part, features, [{}] * len(labels_B1HW), labels_B1HW)
    losses = list_losses(entries)
    if not losses:
        raise ConfigError(
            f"none of its entries ({', '.join(entries)}) has 'loss' in its name, so none would train it. Start every "
            "loss_name with 'loss_'."
        )
    torch.stack(losses).sum().backward()


def _predict_once(heads: SegmentationHeads, features: list[Tensor]) -> None:
    logits_BKhw = heads.logits(features)
    shape = tuple(logits_BKhw.shape)
    if len(shape) != 4 or shape[1] != heads.out_channels:
        raise ConfigError(f"its logits have shape {shape}, want (images, {heads.out_channels}, height, width).")


@contextlib.contextmanager
def _naming(field: HeadField, features: list[Tensor], crop_size_px: tuple[int, int]) -> Iterator[None]:
    name, cfg = field
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{name} ({cfg['type']}) can't be used: {error}") from error
    except _NOT_THE_CONFIG:
        raise
    except Exception as error:  # whatever a head or loss of MMSegmentation may raise over its arguments
        shapes = ", ".join("x".join(map(str, feature.shape)) for feature in features)
        remedy = "Correct the head, its losses, or model.train_cfg and model.test_cfg."
        if "more than 1 value per channel" in str(error):
            remedy = "Its BatchNorm needs more crops at once: raise data.samples_per_gpu (and global_batch)."
        raise ConfigError(
            f"{name} ({cfg['type']}) failed in a trial on random maps of the backbone's shapes ({shapes}) for crops "
            f"of {crop_size_px[0]}x{crop_size_px[1]} px: {describe_error(error)}. {remedy}"
        ) from error


@contextlib.contextmanager
def _left_unchanged(heads: SegmentationHeads, device: torch.device) -> Iterator[None]:
    """Draw from a seed of its own, and put generators, buffers, gradients and modes back."""
    buffers = {name: buffer.clone() for name, buffer in heads.named_buffers()}
    modes = {module: module.training for module in heads.modules()}
    devices = [] if device.type == "cpu" else [device]
    try:
        with torch.random.fork_rng(devices, device_type="cuda" if device.type == "cpu" else device.type):
            torch.manual_seed(0)
            yield
    finally:
        heads.zero_grad(set_to_none=True)
        for name, buffer in heads.named_buffers():
            buffer.copy_(buffers[name])
        for module, training in modes.items():
            module.training = training
