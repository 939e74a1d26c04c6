from __future__ import annotations

import pytest
import torch
from torch import nn

from ds_seg import openmmlab
from ds_seg.errors import ConfigError
from ds_seg.models import FCNHead, InternViT, build_heads, probe_heads

from mmcv.ops import sigmoid_focal_loss  # isort: skip
from mmseg.models.builder import HEADS, LOSSES  # isort: skip

CE = {"type": "CrossEntropyLoss"}
FCN = {"type": "FCNHead", "in_channels": 8, "channels": 8, "num_convs": 1, "num_classes": 5, "loss_decode": CE}
FCN |= {"norm_cfg": {"type": "SyncBN"}}
PSP = {**FCN, "type": "PSPHead"}
del PSP["num_convs"]
UPER = {**PSP, "type": "UPerHead", "in_channels": [8] * 4, "in_index": [0, 1, 2, 3]}


@HEADS.register_module()
class SpareHead(FCNHead):
    """A head with a layer that its loss does not depend on."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.spare = nn.Conv2d(8, 8, 1)


@HEADS.register_module()
class FlatHead(FCNHead):
    """A head that predicts one vector an image."""

    def forward_test(self, inputs, img_metas, test_cfg):
        return self.forward(inputs).mean((2, 3))


@HEADS.register_module()
class FullHead(FCNHead):
    """A head that runs out of memory."""

    def forward(self, inputs):
        raise torch.OutOfMemoryError("no memory left")


@LOSSES.register_module()
class ProbedOperatorLoss(nn.Module):
    loss_name = "loss_operator"

    def forward(self, pred, target, **_):
        return sigmoid_focal_loss(pred.flatten(2).mean(2), target.flatten(1)[:, 0] % 5, 2.0, 0.25, None, "mean")


@LOSSES.register_module()
class BackwardLoss(nn.Module):
    """A loss that fails in its backward alone."""

    loss_name = "loss_backward"

    def forward(self, pred, target, **_):
        pred = pred * 1
        pred.register_hook(lambda grad: grad[:, :, :1])
        return pred.mean()


def probe(model, *, with_fpn=False, micro_batch=2, crop_size_px=(16, 24)):
    model = {"decode_head": FCN, **model}
    depth = 4 if with_fpn else 1
    backbone = InternViT(
        embed_dim=8, num_heads=2, depth=depth, patch_size=4, img_size=16, out_indices=range(depth), with_fpn=with_fpn
    )
    heads = build_heads(model)
    return heads, probe_heads(heads, model, backbone, micro_batch=micro_batch, crop_size_px=crop_size_px)


def test_heads_that_train_leave_no_trace():
    """Rejects a moved running statistic, a gradient, a changed mode, and draws from the caller's generator."""
    model = {"decode_head": UPER, "auxiliary_head": [FCN, {**FCN, "dropout_ratio": 0.5}]}
    torch.manual_seed(3)
    wanted = build_heads(model).state_dict()
    torch.manual_seed(3)
    heads = build_heads(model)
    heads.auxiliary_heads[0].eval()
    modes = [module.training for module in heads.modules()]
    generator = torch.get_rng_state()
    options = {"embed_dim": 8, "num_heads": 2, "depth": 4, "patch_size": 4, "img_size": 16}
    backbone = InternViT(**options, out_indices=[0, 1, 2, 3], with_fpn=True)
    torch.set_rng_state(generator)
    assert probe_heads(heads, model, backbone, micro_batch=2, crop_size_px=(16, 16)) == []
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in heads.state_dict().items())
    assert all(parameter.grad is None for parameter in heads.parameters())
    assert [module.training for module in heads.modules()] == modes
    assert torch.equal(torch.get_rng_state(), generator)


def test_no_trace_is_left_by_a_failure_either():
    heads = build_heads({"decode_head": {**FCN, "loss_decode": {**CE, "class_weight": [1.0]}}})
    before = {name: tensor.clone() for name, tensor in heads.state_dict().items()}
    backbone = InternViT(embed_dim=8, num_heads=2, depth=1, patch_size=4, img_size=16, out_indices=[0])
    with pytest.raises(ConfigError):
        probe_heads(heads, {"decode_head": FCN}, backbone, micro_batch=2, crop_size_px=(16, 16))
    assert all(torch.equal(tensor, before[name]) for name, tensor in heads.state_dict().items()) and heads.training


def test_the_maps_have_the_real_shapes():
    """Rejects a trial on a grid or batch of its own, on which a real step's failure would not show."""
    shapes = []
    heads = build_heads({"decode_head": UPER})
    heads.decode_head.forward = lambda inputs: shapes.extend(tuple(x.shape) for x in inputs) or 1 / 0
    backbone = InternViT(
        embed_dim=8, num_heads=2, depth=4, patch_size=4, img_size=16, out_indices=[0, 1, 2, 3], with_fpn=True
    )
    with pytest.raises(ConfigError, match=r"3x8x20x28, 3x8x10x14, 3x8x5x7, 3x8x2x3.* 20x28 px: ZeroDivisionError"):
        probe_heads(heads, {"decode_head": UPER}, backbone, micro_batch=3, crop_size_px=(20, 28))
    assert shapes == [(3, 8, 20, 28), (3, 8, 10, 14), (3, 8, 5, 7), (3, 8, 2, 3)]


def test_parameters_without_gradient_are_named():
    _, unused = probe({"auxiliary_head": [FCN, {**FCN, "type": "SpareHead"}]})
    assert unused == ["auxiliary_heads.1.spare.weight", "auxiliary_heads.1.spare.bias"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"decode_head": {**FCN, "loss_decode": {**CE, "class_weight": [1.0, 2.0]}}},
            r"model.decode_head \(FCNHead\) failed in a trial.*2x8x4x6.*16x24 px: RuntimeError: weight tensor should",
        ),
        ({"decode_head": UPER}, r"model.decode_head \(UPerHead\) failed in a trial .*IndexError"),
        ({"decode_head": {**FCN, "in_channels": 4}}, r"decode_head \(FCNHead\) failed .* RuntimeError: .*channels"),
        (
            {"auxiliary_head": [FCN, {**FCN, "num_classes": 3}]},
            r"model.auxiliary_head\[1\] \(FCNHead\) can't be used: its num_classes is 3, but the labels name 5 classes",
        ),
        (
            {"auxiliary_head": {**FCN, "ignore_index": 9}},
            r"model.auxiliary_head \(FCNHead\) can't be used: its ignore_index is 9, but that of .* is 255",
        ),
        (
            {"decode_head": {**FCN, "loss_decode": {"type": "DiceLoss", "loss_name": "dice"}}},
            r"none of its entries \(dice, acc_seg\) has 'loss' in its name.*Start every loss_name with 'loss_'",
        ),
        ({"decode_head": {**FCN, "loss_decode": {**CE, "use_mask": True}}}, "does not support ignore_index"),
        (
            {"decode_head": {**FCN, "loss_decode": {"type": "FocalLoss"}, "sampler": {"type": "OHEMPixelSampler"}}},
            r"model.decode_head \(FCNHead\) failed in a trial .*IndexError: The shape of the mask",
        ),
        (
            {"decode_head": {**FCN, "loss_decode": {"type": "BackwardLoss"}}},
            "failed in a trial .*RuntimeError: hook .* changed the size",
        ),
        (
            {"decode_head": {**FCN, "type": "FlatHead"}},
            r"its logits have shape \(2, 5\), want \(images, 5, height, width\)",
        ),
    ],
)
def test_what_can_not_train_or_predict_names_its_field(model, message):
    """Rejects a start that would fail in its first step or evaluation only."""
    with pytest.raises(ConfigError, match=message):
        probe(model)


def test_an_assertion_without_a_text_is_quoted():
    sampler = {"type": "OHEMPixelSampler", "thresh": 0.7}
    with pytest.raises(ConfigError, match=r"px: assert weight.dim\(\) == loss.dim\(\)\. Correct"):
        probe({"decode_head": {**FCN, "loss_decode": {"type": "FocalLoss"}, "sampler": sampler}})


def test_a_batch_of_one_that_pooling_can_not_normalise_is_found():
    """PSPHead pools to one value a channel, whose variance is undefined with one crop on one rank."""
    with pytest.raises(ConfigError, match=r"PSPHead.*Expected more than 1 value per channel.*raise data\.samples"):
        probe({"decode_head": PSP}, micro_batch=1)
    assert probe({"decode_head": PSP}, micro_batch=2)[1] == []


def test_a_head_that_pools_more_than_the_crop_has_is_found():
    lraspp = {**UPER, "type": "LRASPPHead", "in_channels": [8] * 3, "in_index": [2, 1, 0], "branch_channels": (4, 4)}
    lraspp["input_transform"] = "multiple_select"
    with pytest.raises(ConfigError, match=r"LRASPPHead.*Output size is too small"):
        probe({"decode_head": lraspp}, with_fpn=True, crop_size_px=(48, 48))
    assert probe({"decode_head": lraspp}, with_fpn=True, crop_size_px=(52, 52))[1] == []


def test_a_boundary_head_has_labels_of_its_own():
    assert probe({"auxiliary_head": {**FCN, "type": "STDCHead", "num_classes": 2}})[1] == []


def test_running_out_of_memory_is_not_called_the_configs_fault():
    with pytest.raises(torch.OutOfMemoryError, match="no memory left"):
        probe({"decode_head": {**FCN, "type": "FullHead"}})


@pytest.mark.skipif(openmmlab.has_compiled_ops(), reason="mmcv has its operators here")
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"decode_head": {**PSP, "type": "PSAHead", "mask_size": (4, 6)}},
            r"model.decode_head \(PSAHead\) can't be used: mmcv operator 'psamask_forward' was called.*MMCV_WITH_OPS=1",
        ),
        (
            {"auxiliary_head": [FCN, {**FCN, "loss_decode": [CE, {"type": "ProbedOperatorLoss"}]}]},
            r"model.auxiliary_head\[1\] \(FCNHead\) can't be used: mmcv operator 'sigmoid_focal_loss_forward' was",
        ),
        (
            {"decode_head": {**FCN, "conv_cfg": {"type": "DCN"}}},
            r"model.decode_head \(FCNHead\) can't be used: mmcv operator 'deform_conv_forward' was called",
        ),
    ],
)
def test_what_needs_a_missing_operator_names_field_operator_and_remedy(model, message):
    with pytest.raises(ConfigError, match=message):
        probe(model)
