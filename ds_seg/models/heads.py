"""The decode head and its auxiliary heads as one FP32 module, built from an MMSegmentation model config.

Shape legend: B images, K classes (output channels), H and W pixels, h and w the feature map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import ds_seg.openmmlab  # noqa: F401  (before mmcv)
from ds_seg.config.head_fields import auxiliary_head_fields, decode_head_fields
from ds_seg.errors import ConfigError
from ds_seg.models.cascade import HeadCascade, Metas
from ds_seg.models.float32 import Float32Module, without_autocast
from ds_seg.models.head_building import build_one_head

from mmcv.utils import ConfigDict  # isort: skip
from mmseg.ops import resize  # isort: skip

_ONE_CHANNEL_THRESHOLD = 0.3
"""MMSegmentation's own default."""


class SegmentationHeads(Float32Module):
    """Everything after the backbone: FP32 parameters, FP32 arithmetic, MMSegmentation's own losses.

    Args:
        decode_head: the head whose logits are the prediction, or the cascade that ends with it.
        auxiliary_heads: heads that only add losses in training.
        train_cfg: handed to every head in training.
        test_cfg: handed to the decode head for logits.
    """

    def __init__(
        self,
        decode_head: nn.Module,
        auxiliary_heads: Sequence[nn.Module] = (),
        train_cfg: Mapping[str, Any] | None = None,
        test_cfg: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.decode_head = decode_head
        self.auxiliary_heads = nn.ModuleList(auxiliary_heads)
        self.train_cfg, self.test_cfg = train_cfg, test_cfg
        self.make_float32()

    @property
    def num_classes(self) -> int:
        """Classes that the labels name."""
        return self.decode_head.num_classes  # type: ignore[return-value]

    @property
    def out_channels(self) -> int:
        """K, the channels of the logits: 1 for a binary head with a threshold, else `num_classes`."""
        return self.decode_head.out_channels  # type: ignore[return-value]

    @property
    def align_corners(self) -> bool:
        """How the head's logits are to be resized."""
        return self.decode_head.align_corners  # type: ignore[return-value]

    @property
    def ignore_index(self) -> int:
        """The label that no loss counts."""
        return self.decode_head.ignore_index  # type: ignore[return-value]

    @property
    def threshold(self) -> float:
        """The probability from which a one-channel head says 1."""
        return getattr(self.decode_head, "threshold", None) or _ONE_CHANNEL_THRESHOLD

    def forward(self, features: Sequence[Tensor], metas: Metas, labels_B1HW: Tensor) -> dict[str, Tensor]:
        """The same as `losses`: the call that DistributedDataParallel wraps."""
        return self.losses(features, metas, labels_B1HW)

    def losses(self, features: Sequence[Tensor], metas: Metas, labels_B1HW: Tensor) -> dict[str, Tensor]:
        """Compute every head's losses and accuracies.

        Args:
            features: the backbone's maps, each (B, channels, h, w) of any float dtype.
            metas: MMSegmentation's image metas, one an image.
            labels_B1HW: int64 labels.

        Returns:
            FP32 scalars. The decode head's entries keep their names (`loss_ce`, `acc_seg`); an auxiliary
            head's get the suffix `_aux`, or `_aux_0`, `_aux_1` and so on where there are several, and those of
            earlier heads of a cascade `_stage_0` and so on.
        """
        several = len(self.auxiliary_heads) > 1
        suffixes = [f"_aux_{i}" if several else "_aux" for i in range(len(self.auxiliary_heads))]
        named: dict[str, Tensor] = {}
        features = [feature.float() for feature in features]
        for suffix, head in zip(["", *suffixes], [self.decode_head, *self.auxiliary_heads], strict=True):
            entries = self.losses_of(head, features, metas, labels_B1HW)
            named.update({name + suffix: value for name, value in entries.items()})
        return named

    def losses_of(
        self, head: nn.Module, features: Sequence[Tensor], metas: Metas, labels_B1HW: Tensor
    ) -> dict[str, Tensor]:
        """One head's part of `losses`, as FP32 scalars under the head's own names."""
        with without_autocast(features[0].device):
            features = [feature.float() for feature in features]
            entries = head.forward_train(features, metas, labels_B1HW, self.train_cfg)  # type: ignore[operator]
            return {name: _compute_scalar(value) for name, value in entries.items()}

    def logits(self, features: Sequence[Tensor]) -> Tensor:
        """Compute the decode head's prediction.

        Args:
            features: the backbone's maps, each (B, channels, h, w) of any float dtype.

        Returns:
            (B, K, h, w) FP32 logits at the head's own resolution.
        """
        with without_autocast(features[0].device):
            features = [feature.float() for feature in features]
            # no image metas: no head of MMSegmentation looks at them
            return self.decode_head.forward_test(features, (), self.test_cfg)  # type: ignore[operator]

    def predict(self, features: Sequence[Tensor], size_HW: Sequence[int]) -> Tensor:
        """Compute the decode head's prediction at the resolution of the images.

        Args:
            features: the backbone's maps, each (B, channels, h, w) of any float dtype.
            size_HW: height and width of the images, pixels.

        Returns:
            (B, K, H, W) FP32 logits.
        """
        logits_BKhw = self.logits(features)
        return resize(logits_BKhw, size=tuple(size_HW), mode="bilinear", align_corners=self.align_corners)


def build_heads(model_cfg: Mapping[str, Any], *, initialise: bool = True) -> SegmentationHeads:
    """Build and initialise the heads of an MMSegmentation model config.

    Args:
        model_cfg: the `model` dict; read are decode_head (a dict, or the list of a cascade), auxiliary_head
            (a dict, a list, or absent), train_cfg and test_cfg.
        initialise: draw initial values; False where only shapes are wanted, on the meta device.

    Raises:
        ConfigError: no decode head, or a head that can't be built or can't stand where it does, named by field.
    """
    decode_fields = decode_head_fields(model_cfg)
    if not decode_fields:
        raise ConfigError(
            "model.decode_head is missing: give a dict with a type, such as dict(type='FCNHead', ...), or the list of "
            "a cascade."
        )
    train_cfg, test_cfg = (ConfigDict(model_cfg.get(name) or {}) for name in ("train_cfg", "test_cfg"))
    decode_heads = [
        build_one_head(*field, after_another=index > 0, initialise=initialise)
        for index, field in enumerate(decode_fields)
    ]
    auxiliary_heads = [
        build_one_head(*field, after_another=False, initialise=initialise) for field in auxiliary_head_fields(model_cfg)
    ]
    decode_head = decode_heads[0] if len(decode_heads) == 1 else HeadCascade(decode_heads, test_cfg)
    return SegmentationHeads(decode_head, auxiliary_heads, train_cfg, test_cfg)


def list_losses(entries: Mapping[str, Tensor]) -> list[Tensor]:
    """The entries that are trained on: those whose name contains `loss`, as MMSeg's segmentors pick them."""
    return [value for name, value in entries.items() if "loss" in name]


def _compute_scalar(value: Tensor | Sequence[Tensor]) -> Tensor:
    if isinstance(value, Tensor):
        return value.float().mean()
    return torch.stack([part.float().mean() for part in value]).sum()
