"""Decode heads in a row, as MMSegmentation's CascadeEncoderDecoder has them.

Shape legend: B images, K classes (output channels), H and W pixels, h and w the feature map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

Metas = Sequence[Mapping[str, Any]]


class HeadCascade(nn.ModuleList):
    """Heads of which each but the first takes in what the one before puts out; the last one predicts.

    It has the calls and properties of one MMSegmentation decode head. In training a head's output is computed
    a second time for the next head, with gradient, as MMSegmentation does.

    Source: mmseg/models/segmentors/cascade_encoder_decoder.py. What differs: the entries of the head that
    predicts keep their names, and those of head i before it get the suffix `_stage_i`.

    Args:
        heads: in order.
        test_cfg: handed to every head for logits, in training too.
    """

    def __init__(self, heads: Sequence[nn.Module], test_cfg: Mapping[str, Any] | None) -> None:
        super().__init__(heads)
        self.test_cfg = test_cfg

    @property
    def num_classes(self) -> int:
        """Classes that the labels name."""
        return self[-1].num_classes

    @property
    def out_channels(self) -> int:
        """K of the head that predicts."""
        return self[-1].out_channels

    @property
    def align_corners(self) -> bool:
        """How the logits are to be resized."""
        return self[-1].align_corners

    @property
    def ignore_index(self) -> int:
        """The label that no loss counts."""
        return self[-1].ignore_index

    @property
    def threshold(self) -> float | None:
        """The probability from which a one-channel head says 1."""
        return self[-1].threshold

    def first(self, count: int) -> HeadCascade:
        """A cascade of the first `count` heads; the modules are shared."""
        return HeadCascade(list(self)[:count], self.test_cfg)

    def forward_train(
        self, inputs: Sequence[Tensor], img_metas: Metas, gt_semantic_seg: Tensor, train_cfg: Mapping[str, Any] | None
    ) -> dict[str, Tensor]:
        """Compute every head's losses and accuracies.

        Args:
            inputs: the backbone's maps, each (B, channels, h, w).
            img_metas: one an image.
            gt_semantic_seg: (B, 1, H, W) int64 labels.
            train_cfg: handed to every head.

        Returns:
            The entries of all heads by name.
        """
        named: dict[str, Tensor] = {}
        before: tuple[Tensor, ...] = ()
        for index, head in enumerate(self):
            entries = head.forward_train(inputs, *before, img_metas, gt_semantic_seg, train_cfg)
            if index < len(self) - 1:
                entries = {f"{name}_stage_{index}": value for name, value in entries.items()}
                before = (head.forward_test(inputs, *before, img_metas, self.test_cfg),)
            named.update(entries)
        return named

    def forward_test(self, inputs: Sequence[Tensor], img_metas: Metas, test_cfg: Mapping[str, Any] | None) -> Tensor:
        """Compute the last head's prediction.

        Args:
            inputs: the backbone's maps, each (B, channels, h, w).
            img_metas: one an image.
            test_cfg: handed to every head.

        Returns:
            (B, K, h, w) logits at the last head's own resolution.
        """
        before: tuple[Tensor, ...] = ()
        for head in self:
            before = (head.forward_test(inputs, *before, img_metas, test_cfg),)
        return before[0]
