from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ds_seg.errors import ConfigError
from ds_seg.models import FCNHead, InternViT, SyncBatchNorm, build_heads
from ds_seg.openmmlab import MissingOperatorError

from mmseg.models.builder import HEADS  # isort: skip

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
OCR = {**FCN, "type": "OCRHead", "ocr_channels": 4, "norm_cfg": {"type": "BN"}}
del OCR["num_convs"], OCR["with_norm"]
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
        ({}, "model.decode_head is missing: give a dict with a type"),
        ({"decode_head": "FCNHead"}, "model.decode_head can't be built: .*cfg must be a dict"),
        ({"decode_head": [FCN, FCN]}, r"model.decode_head\[1\] is FCNHead, which can't follow another.*Cascade"),
        ({"decode_head": OCR}, "model.decode_head is OCRHead, which can't stand first or alone.*CascadeEncoderDecoder"),
        ({"decode_head": FCN, "auxiliary_head": OCR}, "model.auxiliary_head is OCRHead, which can't stand"),
        ({"decode_head": {**FCN, "type": "DPTHead"}}, "model.decode_head.type is DPTHead.*class token.*Choose another"),
        ({"decode_head": {**FCN, "in_index": [1]}}, "decode_head can't be built: FCNHead: assert isinstance.in_index"),
        (
            {"decode_head": {**FCN, "type": "FCNHed"}},
            r"model.decode_head can't be built: model\.decode_head\.type: got 'FCNHed', .* Did you mean 'FCNHead'\?",
        ),
        (
            {"decode_head": {**FCN, "loss_decode": [{"loss_weight": 2}]}},
            r"decode_head can't be built: model\.decode_head\.loss_decode\[0\]: got .*, which has no `type`",
        ),
        (
            {"decode_head": {**FCN, "loss_decode": {"type": "CrossEntropyLoss", "class_weight": "absent.npy"}}},
            r"model.decode_head can't be built: FileNotFoundError: .*absent\.npy",
        ),
        (
            {"decode_head": {**FCN, "in_chanels": 1}},
            r"model.decode_head can't be built: model\.decode_head\.in_chanels: unknown key\. .* 'in_channels'\?",
        ),
        (
            {"decode_head": FCN, "auxiliary_head": [{**FCN, "channels": 4}]},
            r"auxiliary_head\[0\] can't be .*got 8 and 4",
        ),
    ],
)
def test_configs_that_cannot_be_built(model, message):
    with pytest.raises(ConfigError, match=message):
        build_heads(model)


@HEADS.register_module()
class EagerHead(FCNHead):
    """A head that calls an operator when it is built."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        raise MissingOperatorError("mmcv operator 'eager' was called")


def test_an_operator_that_is_missing_while_building_names_the_field():
    with pytest.raises(ConfigError, match=r"^model.auxiliary_head\[0\]: .*operator 'eager' was called"):
        build_heads({"decode_head": FCN, "auxiliary_head": [{**FCN, "type": "EagerHead"}]})


def test_batchnorm_of_any_name_becomes_syncbatchnorm_with_its_own_tensors():
    """Rejects statistics of one rank alone, and a norm that forgets how it was initialised."""
    heads = build_heads({"decode_head": [{**FCN, "num_convs": 1, "norm_cfg": {"type": "BN", "eps": 1e-3}}, OCR]})
    norms = [module for module in heads.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) > 5 and all(type(norm) is SyncBatchNorm for norm in norms)
    first = heads.decode_head[0].convs[0]
    assert first.norm is first.bn and first.norm.eps == 1e-3
    assert set(dict(first.bn.named_parameters())) == {"weight", "bias"} and (first.bn.weight == 1).all()
    assert set(dict(first.bn.named_buffers())) == {"running_mean", "running_var", "num_batches_tracked"}


def test_a_config_is_not_changed_by_building():
    """K-Net's head takes keys out of nested dicts, so that a second build would differ from the first."""
    update = {"type": "KernelUpdateHead", "num_classes": 5, "num_heads": 2, "in_channels": 8, "out_channels": 8}
    shape = {"in_channels": 8, "feat_channels": 8, "out_channels": 8}
    update |= {"feat_transform_cfg": {"kernel_size": 1, "act_cfg": None}}
    update |= {"kernel_updator_cfg": {"type": "KernelUpdator", **shape}}
    knet = {"type": "IterativeDecodeHead", "num_stages": 1, "kernel_generate_head": FCN}
    model = {"decode_head": {**knet, "kernel_update_head": [update]}}
    before = copy.deepcopy(model)
    heads = build_heads(model)
    assert model == before
    assert heads.eval().logits(make_features()).shape == (2, 5, 4, 4)
    assert (heads.num_classes, heads.threshold) == (5, 0.3)


def test_the_threshold_is_that_of_the_head_that_predicts():
    one_channel = {**FCN, "num_classes": 2, "out_channels": 1}
    assert build_heads({"decode_head": {**one_channel, "threshold": 0.4}}).threshold == 0.4
    assert build_heads({"decode_head": one_channel}).threshold == 0.3


def test_backbone_and_head_train_one_step():
    backbone = InternViT(embed_dim=8, num_heads=2, depth=2, patch_size=4, img_size=16, out_indices=[0, 1])
    heads = build_heads({"decode_head": FCN})
    losses = heads(backbone(torch.randn(2, 3, 16, 16)), [], LABELS)
    losses["loss_ce"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in backbone.parameters())
