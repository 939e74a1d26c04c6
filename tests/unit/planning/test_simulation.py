"""What a step allocates and computes, counted on our own modules, against numbers that were published or measured."""

import pytest
import torch

from ds_seg.config import RunOptions, build_run_config
from ds_seg.models import SyncBatchNorm
from ds_seg.planning.flops import compute_forward_flops
from ds_seg.planning.model_size import measure_model
from ds_seg.planning.simulation import StepSetting, simulate_backbone, simulate_heads
from ds_seg.planning.step_costs import simulate_costs

GB = 1e9


@pytest.fixture(scope="module")
def linear_run():
    return build_run_config(RunOptions("internvit6b_224_full_linear_ade20k"), 1)


def setting(policy, images=1, crop=504, fused_norms=True):
    return StepSetting(images, (crop, crop), policy, torch.bfloat16, fused_norms)


@pytest.fixture(scope="module")
def traces(linear_run):
    return {p: simulate_backbone(linear_run.model, setting(p)) for p in ("none", "selective", "block")}


def test_parameters_are_counted_on_the_real_modules(linear_run):
    size = measure_model(linear_run.model)
    positions = (504 // 14) ** 2 - (224 // 14) ** 2
    assert size.backbone - positions * 3200 == 5_902_793_600 and size.trainable == size.backbone
    assert size.head == 486_550 and size.block == 122_918_400 and size.depth == 48


def test_kept_activations_of_an_image(traces):
    kept = {policy: trace.of(1).kept.total() / GB for policy, trace in traces.items()}
    assert kept["none"] == pytest.approx(8.2, rel=0.05)
    assert kept["selective"] == pytest.approx(4.4, rel=0.02)  # about 5 where more is kept
    assert kept["block"] == pytest.approx(0.4, rel=0.03)
    for images in (2, 8):
        assert traces["block"].of(images).kept.total() / GB == pytest.approx(images * kept["block"], rel=1e-3)


def test_the_block_being_recomputed_is_counted_once(traces):
    live_block = traces["block"].of(1).peak["backward of a block"] / GB
    assert 0.17 < live_block < 0.40  # its activations, and the gradients of one of its weights


def test_two_simulated_depths_give_the_third():
    run = build_run_config(RunOptions("demo"), 1)
    extrapolated = simulate_backbone(run.model, setting("none", crop=112)).of(3)
    model = {**run.model, "backbone": {**run.model.backbone, "depth": 1, "out_indices": [0]}}
    one = simulate_backbone(model, setting("none", crop=112)).of(3)
    per_block = (extrapolated.kept.total() - one.kept.total()) / 5
    two = {**run.model, "backbone": {**run.model.backbone, "depth": 2, "out_indices": [1]}}
    assert simulate_backbone(two, setting("none", crop=112)).of(3).kept.total() == pytest.approx(
        one.kept.total() + per_block, rel=1e-6
    )


def test_flops_by_counter_and_by_formula(linear_run, traces):
    formula = compute_forward_flops(linear_run.model.backbone, (504, 504))
    assert formula / 1e12 == pytest.approx(16.34, abs=0.005) and 3 * formula / 1e12 == pytest.approx(49.0, abs=0.05)
    flops = traces["none"].of(1).flops
    assert flops["forward"] == pytest.approx(formula, rel=1e-4)
    assert flops["all"] == pytest.approx(3 * formula, rel=0.015)  # attention's backward computes its scores again
    assert traces["selective"].of(1).flops["all"] == flops["all"]
    assert traces["block"].of(1).flops["all"] / 1e12 == pytest.approx(65.4, rel=0.01)


def test_images_may_have_one_channel(linear_run, traces):
    backbone = {**linear_run.model.backbone, "in_chans": 1}
    flops = simulate_backbone({**linear_run.model, "backbone": backbone}, setting("none")).of(1).flops
    assert flops["forward"] == pytest.approx(compute_forward_flops(backbone, (504, 504)), rel=1e-4)
    assert traces["none"].of(1).flops["forward"] - flops["forward"] == 2 * 36**2 * 2 * 14**2 * 3200


def test_full_size_logits_and_loss(linear_run):
    trace = simulate_heads(linear_run.model, setting("none"))
    assert trace.peak["logits and loss"] / GB == pytest.approx(0.5, rel=0.1)


def test_a_frozen_backbone_keeps_nothing():
    run = build_run_config(RunOptions("internvit6b_224_linear_ade20k"), 1)
    trace = simulate_backbone(run.model, setting("none")).of(1)
    assert trace.kept.total() < 0.01 * GB and trace.flops["all"] == trace.flops["forward"]


def test_a_head_that_normalises_over_one_position_needs_two_images():
    run = build_run_config(RunOptions("internvit300m_448_full_upernet_ade20k"), 1)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        simulate_heads(run.model, setting("none"))


def test_it_never_waits_for_other_ranks(monkeypatch, linear_run):
    def communicate(_norm):
        raise AssertionError("a collective that only one rank would issue")

    monkeypatch.setattr(SyncBatchNorm, "_must_reduce", communicate)
    assert simulate_heads(linear_run.model, setting("none")).peak.total() > 0


@pytest.mark.parametrize(
    ("policy", "measured_mib"), [("none", 328.9), ("selective", 202.6), ("block", 21.8)]
)  # docs/results.md, on the CPU, 2 crops of 448
def test_dinov2s_keeps_what_was_measured(policy, measured_mib):
    run = build_run_config(RunOptions("camvid_dinov2s_full"), 1)
    kept = simulate_backbone(run.model, setting(policy, crop=448, fused_norms=False)).of(2).kept.total()
    assert kept / 2**20 == pytest.approx(measured_mib, rel=0.1)


def test_the_cost_of_any_micro_batch_is_that_of_a_simulated_one():
    run = build_run_config(RunOptions("demo"), 1)
    cost = simulate_costs(run, ["none"]).of("none", 3)
    backbone, heads = (
        simulate(run.model, setting("none", 3, crop=112)) for simulate in (simulate_backbone, simulate_heads)
    )
    assert cost.head_flops == heads.flops["all"] and cost.forward_flops == backbone.of(3).flops["forward"]
    assert cost.peak.total() == pytest.approx((backbone.of(3).kept + heads.peak).total(), rel=1e-3)  # 4.5e-4 measured


def test_traces_are_shared_by_runs_of_one_backbone_alone():
    known, flops = {}, []
    for changes in ({}, {"model.backbone.pretrained": "other.pth"}, {"model.backbone.mlp_ratio": 2}):
        run = build_run_config(RunOptions("demo", cfg_options=changes), 1)
        flops.append(simulate_costs(run, ["none"], known=known).of("none", 1).forward_flops)
    assert flops[0] == flops[1] > flops[2] and len(known) == 2
