"""The fully convolutional decode head, FP32 by construction; the linear probe is its case without convolutions.

Shape legend: B images, C channels, K classes, h and w the feature map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import ds_seg.openmmlab  # noqa: F401  (before mmcv)
from ds_seg.models.float32 import Float32Module, without_autocast
from ds_seg.models.sync_batchnorm import SyncBatchNorm

from mmcv.cnn import ConvModule  # isort: skip
from mmseg.models.builder import HEADS  # isort: skip
from mmseg.models.decode_heads.decode_head import BaseDecodeHead  # isort: skip


@HEADS.register_module(force=True)
class FCNHead(Float32Module, BaseDecodeHead):
    """MMSegmentation's FCNHead with an optional norm before the classifier, computed in FP32.

    Source: OpenGVLab/InternVL segmentation/mmseg_custom/models/decode_heads/fcn_head.py. What differs: no
    convolution is built and thrown away, `num_convs=0` has no `conv_cat` either, and the weights are FP32
    from the start instead of being cast at every forward.

    Args:
        num_convs: convolutions before the classifier. 0 is the linear probe: norm, dropout, classifier.
        kernel_size: side of their kernels in pixels of the feature map.
        concat_input: convolve input and output together before the classifier; needs num_convs > 0 to matter.
        dilation: of those convolutions.
        with_norm: SyncBatchNorm before the classifier.
        **kwargs: BaseDecodeHead's: in_channels, channels, num_classes, norm_cfg, loss_decode and so on.

    Raises:
        AssertionError: num_convs < 0, a dilation that is not a positive int, or num_convs = 0 with
            in_channels other than channels.
    """

    def __init__(
        self,
        num_convs: int = 2,
        kernel_size: int = 3,
        concat_input: bool = True,
        dilation: int = 1,
        with_norm: bool = False,
        **kwargs: Any,
    ) -> None:
        assert num_convs >= 0 and dilation > 0 and isinstance(dilation, int), (
            f"FCNHead needs num_convs >= 0 and a positive int as dilation, got {num_convs} and {dilation!r}"
        )
        super().__init__(**kwargs)
        assert num_convs > 0 or self.in_channels == self.channels, (
            f"FCNHead with num_convs=0 needs in_channels == channels, got {self.in_channels} and {self.channels}"
        )
        self.num_convs = num_convs
        self.kernel_size = kernel_size
        self.concat_input = concat_input and num_convs > 0
        self.convs = nn.Sequential(
            *(self._build_conv(self.in_channels if i == 0 else self.channels, dilation) for i in range(num_convs))
        )
        if self.concat_input:
            self.conv_cat = self._build_conv(self.in_channels + self.channels, dilation=1)
        self.norm = SyncBatchNorm(self.channels) if with_norm else nn.Identity()
        self.make_float32()

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Classify every position of the feature map.

        Args:
            inputs: the backbone's maps, each (B, C, h, w) of any float dtype; also under autocast.

        Returns:
            (B, K, h, w) FP32 logits.
        """
        with without_autocast(inputs[0].device):
            return self.cls_seg(self._forward_feature(inputs))

    def losses(self, seg_logit: Tensor, seg_label: Tensor) -> dict[str, Tensor]:
        """Compute every configured loss in FP32.

        Args:
            seg_logit: (B, K, h, w) logits, resized to the labels.
            seg_label: (B, 1, H, W) int64 labels.

        Returns:
            The losses by name, and `acc_seg` in percent.
        """
        with without_autocast(seg_logit.device):
            return super().losses(seg_logit.float(), seg_label)

    def _forward_feature(self, inputs: Sequence[Tensor]) -> Tensor:
        """What the classifier sees; K-Net's head also calls it by this name."""
        with without_autocast(inputs[0].device):
            x_BChw = self._transform_inputs([feature.float() for feature in inputs])
            y_BChw = self.convs(x_BChw)
            if self.concat_input:
                y_BChw = self.conv_cat(torch.cat([x_BChw, y_BChw], dim=1))
            return self.norm(y_BChw)

    def _build_conv(self, in_channels: int, dilation: int) -> ConvModule:
        return ConvModule(
            in_channels,
            self.channels,
            kernel_size=self.kernel_size,
            padding=(self.kernel_size // 2) * dilation,
            dilation=dilation,
            conv_cfg=self.conv_cfg,
            norm_cfg=self.norm_cfg,
            act_cfg=self.act_cfg,
        )
