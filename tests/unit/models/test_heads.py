from __future__ import annotations

import pytest
import torch

from ds_seg import openmmlab
from ds_seg.errors import ConfigError
from ds_seg.models import InternViT, build_heads, validate_head_channels

LOSS = {"type": "CrossEntropyLoss", "avg_non_ignore": True}
FCN = {
    "type": "FCNHead",
    "in_channels": 8,
    "channels": 8,
    "num_convs": 0,
    "num_classes": 5,
    "with_norm": True,
    "loss_decode": LOSS,
}
AUXILIARY = {**FCN, "in_index": 0, "with_norm": False, "loss_decode": {**LOSS, "loss_weight": 0.4}}
LABELS = torch.randint(0, 5, (2, 1, 16, 16), generator=torch.Generator().manual_seed(0))


def make_features(dtype=torch.float32):
    torch.manual_seed(1)
    return [torch.randn(2, 8, 4, 4).to(dtype) for _ in range(2)]


@pytest.mark.parametrize(
    ("auxiliary", "suffixes"), [(None, []), (AUXILIARY, ["_aux"]), ([AUXILIARY] * 2, ["_aux_0", "_aux_1"])]
)
def test_losses_are_named_by_head(auxiliary, suffixes):
    heads = build_heads({"decode_head": FCN, "auxiliary_head": auxiliary, "train_cfg": {}, "test_cfg": {}})
    losses = heads(make_features(), [{}, {}], LABELS)
    assert set(losses) == {name + suffix for name in ("loss_ce", "acc_seg") for suffix in ["", *suffixes]}
    assert all(value.shape == () and value.dtype == torch.float32 for value in losses.values())


def test_losses_are_those_of_the_heads():
    heads = build_heads(
        {"decode_head": {**FCN, "dropout_ratio": 0}, "auxiliary_head": {**AUXILIARY, "dropout_ratio": 0}}
    )
    features = make_features()
    losses = heads.losses(features, [], LABELS)
    own = heads.decode_head.forward_train(features, [], LABELS, None)
    auxiliary = heads.auxiliary_heads[0].forward_train(features, [], LABELS, None)
    torch.testing.assert_close(losses["loss_ce"], own["loss_ce"])
    torch.testing.assert_close(losses["loss_ce_aux"], auxiliary["loss_ce"])
    assert not torch.allclose(losses["loss_ce"], losses["loss_ce_aux"])


def test_fp32_under_autocast_and_with_any_head():
    heads = build_heads(
        {
            "decode_head": {
                "type": "UPerHead",
                "in_channels": [8, 8],
                "in_index": [0, 1],
                "channels": 8,
                "num_classes": 5,
                "pool_scales": (1, 2),
                "norm_cfg": {"type": "SyncBN", "requires_grad": True},
                "loss_decode": LOSS,
            }
        }
    ).bfloat16()
    assert {p.dtype for p in heads.parameters()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        losses, logits = heads.losses(make_features(torch.bfloat16), [], LABELS), heads.logits(make_features())
    assert losses["loss_ce"].dtype == logits.dtype == torch.float32
    torch.testing.assert_close(heads.eval().logits(make_features()), heads.logits(make_features()))


def test_logits_and_properties():
    heads = build_heads({"decode_head": {**FCN, "align_corners": True, "ignore_index": 9}}).eval()
    assert heads.logits(make_features(torch.bfloat16)).shape == (2, 5, 4, 4)
    assert (heads.num_classes, heads.out_channels, heads.align_corners, heads.ignore_index) == (5, 5, True, 9)


def test_weights_are_initialised_and_nothing_is_printed(capfd):
    heads = build_heads({"decode_head": {**FCN, "in_channels": 512, "channels": 512}})
    std = heads.decode_head.conv_seg.weight.std().item()
    assert abs(std - 0.01) < 1e-3  # mmseg's Normal(std=0.01); torch's own start would be 0.026
    assert capfd.readouterr() == ("", "")


def test_a_list_of_losses_is_summed_over_means():
    heads = build_heads({"decode_head": FCN})
    heads.decode_head.forward_train = lambda *_: {"loss_many": [torch.ones(2), torch.full((4,), 3.0)]}
    assert heads.losses(make_features(), [], LABELS)["loss_many"].item() == 4.0


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({}, "model.decode_head must be one dict with a type.*got NoneType"),
        ({"decode_head": [FCN, FCN]}, "got list. Cascades of heads are not supported"),
        ({"decode_head": FCN, "neck": {"type": "FPN"}}, "model.neck is not supported.*with_fpn=True"),
        ({"decode_head": {**FCN, "type": "NoHead"}}, "model.decode_head can't be built: .*NoHead"),
        ({"decode_head": {**FCN, "colour": 1}}, "model.decode_head can't be built: .*colour"),
        (
            {"decode_head": FCN, "auxiliary_head": [{**FCN, "channels": 4}]},
            r"auxiliary_head\[0\] can't be .*got 8 and 4",
        ),
    ],
)
def test_configs_that_cannot_be_built(model, message):
    with pytest.raises(ConfigError, match=message):
        build_heads(model)


@pytest.mark.parametrize(
    "head",
    [
        FCN,
        {**FCN, "in_index": 1},
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
        ({"decode_head": {**FCN, "in_index": 2}}, [r"model.decode_head.in_index names map 2, but .* puts out 2"]),
        (
            {"decode_head": {**FCN, "in_channels": [8, 4], "in_index": [0, 1], "input_transform": "resize_concat"}},
            [r"in_channels is \[8, 4\], but the backbone's map \[0, 1\] has \[8, 8\]"],
        ),
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


@pytest.mark.skipif(openmmlab.has_compiled_ops(), reason="mmcv has its operators here")
def test_a_head_that_needs_a_missing_operator_says_so():
    psa = {"type": "PSAHead", "in_channels": 8, "channels": 8, "num_classes": 5, "loss_decode": LOSS}
    heads = build_heads({"decode_head": {**psa, "mask_size": (4, 4), "norm_cfg": {"type": "BN"}}})
    with pytest.raises(RuntimeError, match=r"operator 'psamask_forward' was called.*no compiled operators.*MMCV_WITH"):
        heads.losses(make_features(), [], LABELS)


def test_backbone_and_head_train_one_step():
    backbone = InternViT(embed_dim=8, num_heads=2, depth=2, patch_size=4, img_size=16, out_indices=[0, 1])
    heads = build_heads({"decode_head": FCN})
    losses = heads(backbone(torch.randn(2, 3, 16, 16)), [], LABELS)
    losses["loss_ce"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in backbone.parameters())
