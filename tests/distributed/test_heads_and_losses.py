"""Every decode head and loss of MMSegmentation 0.30 that needs no compiled operator, on two gloo ranks.

Each head trains two steps under both engines (ZeRO-3 InternViT in bf16, FP32 heads under DistributedDataParallel) and
predicts; each loss trains three, the second with nothing but ignored pixels on rank 1.
Measured: the logged entries differ from the mean of what the four micro-batches (two on each rank) give by hand by
5e-8 of their value at most; leaving a rank or a micro-batch out changes every loss by at least 3.7e-4 of it.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ds_seg import openmmlab
from heads_cases import CASES, CLASSES, LOSSES
from ranks import run_ranks

TIMEOUT_S = 300
LOSS_TOLERANCE = 1e-6
NEVER_MOVED = {
    "EMAHead": {"decode_head.ema_mid_conv.conv.weight", "decode_head.ema_mid_conv.conv.bias"},  # frozen by MMSeg
    "STDCHead": {"auxiliary_heads.0.fusion_kernel"},  # frozen by MMSeg
    "HeadWithSpareLayer": {"decode_head.spare.weight", "decode_head.spare.bias"},
}
ENTRIES = {
    "DAHead": {f"{part}.{name}" for part in ("pam_cam", "pam", "cam") for name in ("loss_ce", "acc_seg")},
    "EncHead": {"loss_ce", "loss_se", "acc_seg"},
    "IterativeDecodeHead": {f"{name}.s{stage}" for stage in range(3) for name in ("loss_ce", "acc_seg")},
    "OCRHead": {"loss_ce", "acc_seg", "loss_ce_stage_0", "acc_seg_stage_0"},
    "PointHead": {"pointloss_ce", "acc_point", "loss_ce_stage_0", "acc_seg_stage_0"},
    "STDCHead": {"loss_ce", "acc_seg", "loss_ce_aux", "acc_seg_aux"},
    "UPerHead": {"loss_ce", "acc_seg", "loss_ce_aux", "acc_seg_aux"},
}
REFUSED = {"PSAHead", "DPTHead"}
"""The first needs an operator, the second class tokens."""

PARTS_OF_KNET = {"KernelUpdateHead", "KernelUpdator"}
"""Inside IterativeDecodeHead."""


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """What each of the two ranks measured, in rank order."""
    out = tmp_path_factory.mktemp("heads")
    run_ranks(Path(__file__).with_name("heads_worker.py"), 2, out, timeout_s=TIMEOUT_S)
    return json.loads((out / "heads.json").read_text())


def test_every_head_of_mmsegmentation_is_here():
    """Rejects a head that MMSegmentation has and nobody tried."""
    from mmseg.models import decode_heads

    assert set(decode_heads.__all__) - REFUSED - PARTS_OF_KNET <= set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_a_head_trains_under_both_engines(reports, name):
    """Rejects a parameter out of the optimizer's or DDP's reach, a bf16 tensor, replicas that part, lost entries."""
    for report in (rank["heads"][name] for rank in reports):
        assert set(report["entries"]) == ENTRIES.get(name, {"loss_ce", "acc_seg"}) | {"loss"}
        assert report["finite"] and report["skipped"] == [False, False] and report["grad_norm"] > 0
        assert set(report["unmoved"]) == NEVER_MOVED.get(name, set())
        assert report["dtypes"] == ["torch.float32"]
        assert report["identical"]


@pytest.mark.parametrize("name", CASES)
def test_a_trained_head_predicts(reports, name):
    """Rejects logits of another dtype, class count or resolution than the image's, and ones that are not finite."""
    side_px = CASES[name].get("side_px", 32)
    for report in (rank["heads"][name] for rank in reports):
        assert report["logits"] == [[2, CLASSES, side_px, side_px], "torch.float32", True]
        assert report["own_logits"] == [4, CLASSES, "torch.float32"]


def test_a_layer_without_gradient_is_told_to_ddp_and_to_the_user(reports):
    """Rejects DDP's own error in the second step, and its search for such layers where there is none."""
    for rank in reports:
        assert [name for name, report in rank["heads"].items() if report["find_unused"]] == ["HeadWithSpareLayer"]
        (line,) = rank["heads"]["HeadWithSpareLayer"]["log"]
        assert "2 head parameters" in line and line.endswith("decode_head.spare.weight, decode_head.spare.bias")


def relative_difference(got, wanted):
    return abs(got - wanted) / abs(wanted)


@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_entry_is_logged_as_the_mean_of_what_the_ranks_compute(reports, name):
    """Rejects a value of one rank or one micro-batch, a sum, and a weighted mean."""
    report = reports[0]["losses"][name]
    assert reports[1]["losses"][name]["losses"] == report["losses"]
    micro_batches = [entries for rank in report["by_hand"] for entries in rank]
    assert len(micro_batches) == 4 and set(report["losses"]) == {"loss", "acc_seg", *micro_batches[0]}
    for entry in micro_batches[0]:
        values = [entries[entry] for entries in micro_batches]
        logged, mean = report["losses"][entry], sum(values) / 4
        assert relative_difference(logged, mean) < LOSS_TOLERANCE
        wrong = [sum(values), sum(values[:2]) / 2, sum(values[2:]) / 2, sum(values[::2]) / 2, sum(values[1::2]) / 2]
        assert min(relative_difference(value, mean) for value in wrong) > 100 * LOSS_TOLERANCE


@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_trains(reports, name):
    """Rejects a loss that leaves the head where it is, and replicas that part."""
    for report in (rank["losses"][name] for rank in reports):
        assert report["moved"] and report["identical"] and not report["skipped"]


def test_a_list_of_losses_is_summed_by_name_and_only_losses_train(reports):
    losses = reports[0]["losses"]["list"]["losses"]
    assert set(losses) == {"loss", "acc_seg", "loss_ce", "loss_dice", "loss_first", "lovasz_only_logged"}
    total = losses["loss_ce"] + losses["loss_dice"] + losses["loss_first"]
    assert relative_difference(losses["loss"], total) < LOSS_TOLERANCE


def test_samplers_choose_pixels(reports):
    """Rejects a sampler that keeps all pixels, with which the loss would be that without one."""
    losses = {name: reports[0]["losses"][name]["losses"]["loss"] for name in ("ce", "ohem_threshold", "ohem_largest")}
    assert len({round(loss, 3) for loss in losses.values()}) == 3


@pytest.mark.parametrize("name", LOSSES)
def test_a_crop_without_a_label_skips_nothing(reports, name):
    """Rejects NaN and exceptions where one rank's pixels are all ignored; the run goes on."""
    for report in (rank["losses"][name] for rank in reports):
        assert not report["all_ignored"]["skipped"] and report["all_ignored"]["norm"] > 0
        assert report["all_ignored"]["loss"] > 0 and not report["after"]["skipped"]


NEEDS_OPERATORS = pytest.mark.skipif(openmmlab.has_compiled_ops(), reason="mmcv has its operators here")


@NEEDS_OPERATORS
@pytest.mark.parametrize(
    ("case", "field", "operator"),
    [
        ("head_operator", "model.decode_head (PSAHead)", "psamask_forward"),
        ("loss_operator", "model.auxiliary_head[1] (FCNHead)", "sigmoid_focal_loss_forward"),
        ("layer_operator", "model.decode_head (FCNHead)", "modulated_deform_conv_forward"),
    ],
)
def test_what_needs_an_operator_says_so_before_weights_are_read(reports, case, field, operator):
    """Rejects the message of the absent weight file, which comes next, and another text on another rank."""
    first, second = (rank["wrong"][case] for rank in reports)
    assert first == second and first["exit_code"] == 2
    assert first["message"].startswith(f"{field} can't be used: mmcv operator '{operator}' was called")
    assert first["message"].endswith(openmmlab.BUILD_OPS_COMMAND)


@pytest.mark.parametrize(
    ("case", "field", "reason"),
    [
        ("class_weight", "model.decode_head (FCNHead)", "weight tensor should be defined either for all or no classes"),
        ("second_stage", "model.decode_head[1] (PointHead)", "no attribute 'num_points'"),
        ("test_cfg", "model.decode_head[1] (PointHead)", "no attribute 'subdivision_steps'"),
    ],
)
def test_arguments_that_fail_in_a_step_are_found_at_start(reports, case, field, reason):
    first, second = (rank["wrong"][case] for rank in reports)
    assert first == second and first["exit_code"] == 2
    assert first["message"].startswith(f"{field} failed in a trial") and reason in first["message"]


def test_engines_that_only_predict_are_not_tried(reports):
    assert all(rank["evaluation"] for rank in reports)
