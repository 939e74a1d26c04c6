from __future__ import annotations

import pytest

from ds_seg.errors import ConfigError
from ds_seg.models import validate_head_channels

FCN = {"type": "FCNHead", "in_channels": 8, "channels": 8, "num_convs": 0, "num_classes": 5}
AUXILIARY = {**FCN, "in_index": 0}
UPER = {"type": "UPerHead", "in_channels": [8, 8], "in_index": [0, 1], "channels": 4, "num_classes": 5}
KNET = {"type": "IterativeDecodeHead", "kernel_generate_head": FCN}


@pytest.mark.parametrize(
    "head",
    [
        FCN,
        {**FCN, "in_index": 1},
        UPER,
        KNET,
        [FCN, {**FCN, "type": "OCRHead"}],
        {**FCN, "in_channels": [8, 8], "in_index": [0, 1], "input_transform": "resize_concat", "channels": 16},
        {**FCN, "in_channels": (8, 8), "in_index": (0, -1), "input_transform": "multiple_select"},
    ],
)
def test_fitting_channels_pass(head):
    validate_head_channels({"decode_head": head, "auxiliary_head": AUXILIARY}, [8, 8])


@pytest.mark.parametrize(
    ("model", "messages"),
    [
        (
            {"decode_head": {**FCN, "in_channels": 16, "channels": 16}},
            [
                r"model.decode_head.in_channels is 16, but .* map -1 has 8 channels",
                "decode_head.in_channels=8 and channels",
            ],
        ),
        ({"decode_head": {**FCN, "in_index": "a"}}, [r"model.decode_head.in_index is 'a', but must be the number of"]),
        ({"decode_head": {**FCN, "in_index": 2}}, [r"model.decode_head.in_index names map 2, but .* puts out 2"]),
        (
            {"decode_head": {**FCN, "in_channels": [8, 4], "in_index": [0, 1], "input_transform": "resize_concat"}},
            [r"in_channels is \[8, 4\], but the backbone's map \[0, 1\] has \[8, 8\]"],
        ),
        (
            {"decode_head": {**UPER, "in_channels": [8, 4]}},
            [r"model.decode_head.in_channels is \[8, 4\], but .* map \[0, 1\] has \[8, 8\] channels"],
        ),
        (
            {"decode_head": {**KNET, "kernel_generate_head": {**FCN, "in_channels": 4}}},
            ["model.decode_head.kernel_generate_head.in_channels is 4"],
        ),
        ({"decode_head": [FCN, {**FCN, "in_channels": 4}]}, [r"model.decode_head\[1\].in_channels is 4"]),
        (
            {"decode_head": {**FCN, "in_channels": 4}, "auxiliary_head": [AUXILIARY, {**AUXILIARY, "in_channels": 3}]},
            ["model.decode_head.in_channels is 4", r"model.auxiliary_head\[1\].in_channels is 3"],
        ),
    ],
)
def test_channels_that_do_not_fit_are_named(model, messages):
    for message in messages:
        with pytest.raises(ConfigError, match=message):
            validate_head_channels(model, [8, 8])
