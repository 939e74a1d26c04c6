"""The decode head and its auxiliary heads as one FP32 module, built from an MMSegmentation model config.

Shape legend: B images, K classes (output channels), H and W pixels, h and w the feature map.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import ds_seg.openmmlab  # noqa: F401  (before mmseg)
from ds_seg.errors import ConfigError
from ds_seg.models.float32 import Float32Module, without_autocast

from mmseg.models.builder import build_head  # isort: skip

Metas = Sequence[Mapping[str, Any]]


class SegmentationHeads(Float32Module):
    """Everything after the backbone: FP32 parameters, FP32 arithmetic, MMSegmentation's own losses.

    Args:
        decode_head: the head whose logits are the prediction.
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
            head's get the suffix `_aux`, or `_aux_0`, `_aux_1` and so on where there are several.
        """
        several = len(self.auxiliary_heads) > 1
        suffixes = [f"_aux_{i}" if several else "_aux" for i in range(len(self.auxiliary_heads))]
        named: dict[str, Tensor] = {}
        with without_autocast(features[0].device):
            features = [feature.float() for feature in features]
            for suffix, head in zip(["", *suffixes], [self.decode_head, *self.auxiliary_heads], strict=True):
                entries = head.forward_train(features, metas, labels_B1HW, self.train_cfg)  # type: ignore[operator]
                named.update({name + suffix: _compute_scalar(value) for name, value in entries.items()})
        return named

    def logits(self, features: Sequence[Tensor], metas: Metas = ()) -> Tensor:
        """Compute the decode head's prediction.

        Args:
            features: the backbone's maps, each (B, channels, h, w) of any float dtype.
            metas: MMSegmentation's image metas, for heads that ask for them.

        Returns:
            (B, K, h, w) FP32 logits at the head's own resolution.
        """
        with without_autocast(features[0].device):
            features = [feature.float() for feature in features]
            return self.decode_head.forward_test(features, metas, self.test_cfg)  # type: ignore[operator]


def build_heads(model_cfg: Mapping[str, Any]) -> SegmentationHeads:
    """Build and initialise the heads of an MMSegmentation model config.

    Args:
        model_cfg: the `model` dict; read are decode_head, auxiliary_head (a dict, a list, or absent),
            train_cfg and test_cfg.

    Raises:
        ConfigError: no or several decode heads, a neck, or a head that can't be built, named by field.
    """
    fields = _list_head_configs(model_cfg)
    heads = [_build_one_head(field, cfg) for field, cfg in fields]
    return SegmentationHeads(heads[0], heads[1:], model_cfg.get("train_cfg"), model_cfg.get("test_cfg"))


def validate_head_channels(model_cfg: Mapping[str, Any], backbone_out_channels: Sequence[int]) -> None:
    """Check what every head takes in against what the backbone puts out.

    Args:
        model_cfg: the `model` dict, as for `build_heads`.
        backbone_out_channels: channels of every map of the backbone, in order.

    Raises:
        ConfigError: every mismatch, each with its field, what it says and what fits.
    """
    faults = []
    for field, cfg in _list_head_configs(model_cfg):
        indices = cfg.get("in_index", -1)
        indices = [indices] if isinstance(indices, int) else list(indices)
        count = len(backbone_out_channels)
        outside = [i for i in indices if not -count <= i < count]
        if outside:
            faults.append(
                f"{field}.in_index names map {outside[0]}, but the backbone puts out {count} "
                "(one for each of model.backbone.out_indices)"
            )
            continue
        per_map = [backbone_out_channels[i] for i in indices]
        wanted = per_map if cfg.get("input_transform") else per_map[0]
        got = cfg.get("in_channels")
        if (list(got) if isinstance(got, (list, tuple)) else got) != wanted:
            also = " and channels to the same" if cfg.get("num_convs") == 0 else ""
            faults.append(
                f"{field}.in_channels is {got}, but the backbone's map {cfg.get('in_index', -1)} has {wanted} "
                f"channels. Set {field}.in_channels={wanted}{also}"
            )
    if faults:
        raise ConfigError("The heads don't fit the backbone: " + "; ".join(faults) + ".")


def _list_head_configs(model_cfg: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    decode_head = model_cfg.get("decode_head")
    if not isinstance(decode_head, Mapping):
        raise ConfigError(
            f"model.decode_head must be one dict with a type, such as dict(type='FCNHead', ...), got "
            f"{type(decode_head).__name__}. Cascades of heads are not supported: keep the one that predicts."
        )
    if model_cfg.get("neck") is not None:
        raise ConfigError(
            "model.neck is not supported: remove it, and set model.backbone.with_fpn=True with four out_indices if "
            "the head wants maps of several scales."
        )
    auxiliary = model_cfg.get("auxiliary_head") or []
    if isinstance(auxiliary, Mapping):
        return [("model.decode_head", decode_head), ("model.auxiliary_head", auxiliary)]
    fields = [(f"model.auxiliary_head[{i}]", cfg) for i, cfg in enumerate(auxiliary)]
    return [("model.decode_head", decode_head), *fields]


def _build_one_head(field: str, cfg: Mapping[str, Any]) -> nn.Module:
    try:
        head = build_head(cfg)
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{field} can't be built: {error}. Correct it in the model config.") from error
    # mmcv prints every initialised parameter through its logger unless that writes to a file
    logger = logging.getLogger("mmcv")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        head.init_weights()
    finally:
        logger.setLevel(level)
    return head


def _compute_scalar(value: Tensor | Sequence[Tensor]) -> Tensor:
    if isinstance(value, Tensor):
        return value.float().mean()
    return torch.stack([part.float().mean() for part in value]).sum()
