from __future__ import annotations

import torch
from torch import nn

from ds_seg.models import build_heads

HEAD = {"in_channels": 8, "channels": 8, "num_classes": 5, "dropout_ratio": 0.0, "norm_cfg": {"type": "SyncBN"}}
FCN = {**HEAD, "type": "FCNHead", "num_convs": 1, "align_corners": True, "ignore_index": 9}
OCR = {**HEAD, "type": "OCRHead", "ocr_channels": 4, "num_classes": 5}
AUXILIARY = {**FCN, "num_convs": 0}
LABELS_B1HW = torch.randint(0, 5, (2, 1, 16, 16), generator=torch.Generator().manual_seed(0))


def make_features():
    return [torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(1))]


def build_cascade(**more):
    torch.manual_seed(2)
    return build_heads({"decode_head": [FCN, OCR], **more})


def test_a_cascade_does_what_mmsegmentation_does():
    """Rejects a second head that does not see the first one's output, and one through which no gradient comes back."""
    from mmseg.models.segmentors import CascadeEncoderDecoder

    heads = build_cascade()
    theirs = CascadeEncoderDecoder.__new__(CascadeEncoderDecoder)
    nn.Module.__init__(theirs)
    theirs.decode_head, theirs.num_stages, theirs.train_cfg, theirs.test_cfg = heads.decode_head, 2, {}, {}
    wanted = theirs._decode_head_forward_train(make_features(), [], LABELS_B1HW)
    got = heads.losses(make_features(), [], LABELS_B1HW)
    names = {"loss_ce_stage_0": "decode_0.loss_ce", "loss_ce": "decode_1.loss_ce"}
    names |= {"acc_seg_stage_0": "decode_0.acc_seg", "acc_seg": "decode_1.acc_seg"}
    assert set(got) == set(names) and set(wanted) == set(names.values())
    for name, value in got.items():
        torch.testing.assert_close(value, wanted[names[name]].mean())
    got["loss_ce"].backward()
    assert heads.decode_head[0].conv_seg.weight.grad.abs().sum() > 0


def test_the_last_head_predicts_and_names_keep_apart():
    heads = build_cascade(auxiliary_head=AUXILIARY).eval()
    cascade, features = heads.decode_head, make_features()
    wanted = cascade[1].forward_test(features, cascade[0].forward_test(features, [], {}), [], {})
    torch.testing.assert_close(heads.logits(features), wanted)
    entries = {name + suffix for name in ("loss_ce", "acc_seg") for suffix in ("", "_stage_0", "_aux")}
    assert set(heads.losses(features, [], LABELS_B1HW)) == entries
    assert (heads.num_classes, heads.out_channels, heads.align_corners) == (5, 5, False)
    assert (heads.ignore_index, heads.threshold) == (255, 0.3)


def test_parameters_have_the_names_of_mmsegmentation():
    names = build_cascade().state_dict()
    assert "decode_head.0.conv_seg.weight" in names and "decode_head.1.conv_seg.weight" in names


def test_the_first_heads_are_a_cascade_of_the_same_modules():
    cascade = build_cascade().decode_head
    first = cascade.first(1)
    assert len(first) == 1 and first[0] is cascade[0] and first.test_cfg is cascade.test_cfg
