"""What a step allocates, computes and moves, counted on our own modules, against published or measured numbers."""

import pytest
import torch

from ds_seg.config import RunOptions, build_run_config
from ds_seg.models import SyncBatchNorm
from ds_seg.planning import simulation
from ds_seg.planning.flops import compute_forward_flops
from ds_seg.planning.model_size import measure_model
from ds_seg.planning.simulation import StepSetting, simulate_backbone, simulate_heads
from ds_seg.planning.step_costs import StepCosts
from heads_cases import CASES, make_run

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


def test_kept_activations_of_an_image(linear_run, traces):
    kept = {policy: trace.kept.total() / GB for policy, trace in traces.items()}
    assert kept["none"] == pytest.approx(8.2, rel=0.05)
    assert kept["selective"] == pytest.approx(4.4, rel=0.02)  # about 5 where more is kept
    assert kept["block"] == pytest.approx(0.4, rel=0.03)
    for images in (2, 8):
        trace = simulate_backbone(linear_run.model, setting("block", images))
        assert trace.kept.total() / GB == pytest.approx(images * kept["block"], rel=1e-3)


def test_the_block_being_recomputed_is_counted_once(traces):
    live_block = traces["block"].peak["backward of a block"] / GB
    assert 0.17 < live_block < 0.40  # its activations, and the gradients of one of its weights


@pytest.mark.parametrize("policy", ["none", "selective", "block"])
def test_a_few_simulated_blocks_give_all(policy):
    run = build_run_config(RunOptions("camvid_dinov2s_full"), 1)
    for images in (1, 8):
        extrapolated = simulate_backbone(run.model, setting(policy, images, crop=224))
        whole = simulation._simulate_depth(run.model, 12, setting(policy, images, crop=224))
        assert extrapolated.kept.total() == pytest.approx(whole.kept.total(), rel=1e-6)
        assert extrapolated.peak.total() == pytest.approx(whole.peak.total(), rel=0.01)
        assert extrapolated.flops == whole.flops
        assert extrapolated.moved["bytes"] == pytest.approx(whole.moved["bytes"], rel=1e-3)


def test_micro_batches_cost_what_a_simulation_of_them_says_also_beyond_the_largest_simulated_one():
    """A cascade's second image costs less than its third: where the peak is changes with their number."""
    case = {**CASES["OCRHead"], "side_px": 64}
    costs = StepCosts(make_run(case), ("block",))
    for images in (3, 18):
        its_setting = setting("block", images, crop=64)
        heads, backbone = (simulate(costs.run.model, its_setting) for simulate in (simulate_heads, simulate_backbone))
        direct = max(backbone.peak.total(), backbone.kept.total() + heads.peak.total())
        assert costs.of("block", images).peak.total() == pytest.approx(direct + images * 64**2 * (3 * 2 + 8), rel=1e-3)


def test_flops_by_counter_and_by_formula(linear_run, traces):
    formula = compute_forward_flops(linear_run.model.backbone, (504, 504))
    assert formula / 1e12 == pytest.approx(16.34, abs=0.005) and 3 * formula / 1e12 == pytest.approx(49.0, abs=0.05)
    flops = traces["none"].flops
    assert flops["forward"] == pytest.approx(formula, rel=1e-4)
    assert flops["all"] == pytest.approx(3 * formula, rel=0.015)  # attention's backward computes its scores again
    assert traces["selective"].flops["all"] == flops["all"]
    assert traces["block"].flops["all"] / 1e12 == pytest.approx(65.4, rel=0.01)


@pytest.mark.parametrize(("policy", "products"), [("none", 2 + 5), ("selective", 2 + 5), ("block", 2 + 5 + 2)])
def test_attention_is_counted_apart_from_what_else_is_computed(traces, policy, products):
    assert traces[policy].flops["attention"] == products * 2 * 1297**2 * 3200 * 48


def test_what_kernels_beside_products_and_attention_move(traces):
    """Counted by hand for a block of the 6B model, in tensors of its width read or written."""
    forward = 4 * 2 + 2 * 2 + 2 * 2 + 2 * 3 + 8  # norms, LayerScale, drop path, residual, GELU
    # norms, GELU, LayerScale and its gradient, drop path, residual, biases, query, key and value into one
    backward = 4 * 3 + 12 + 2 * (2 + 3 + 1) + 2 * 2 + 2 * 3 + 6 + 6
    moved = {policy: trace.moved["bytes"] / 48 / (1297 * 3200 * 2) for policy, trace in traces.items()}
    assert moved["none"] == pytest.approx(forward + backward, rel=0.01)
    assert moved["none"] < moved["selective"] <= moved["block"] < moved["none"] + forward


def test_a_compiled_backbone_moves_less(linear_run):
    compiled = build_run_config(RunOptions("internvit6b_224_full_linear_ade20k", compile=True), 1)
    moved = [StepCosts(run, ["none"]).of("none", 1).moved_bytes for run in (linear_run, compiled)]
    head = simulate_heads(linear_run.model, setting("none")).moved["bytes"]
    assert moved[1] - head == pytest.approx(2 / 3 * (moved[0] - head)) and head > 0


def test_images_may_have_one_channel(linear_run, traces):
    backbone = {**linear_run.model.backbone, "in_chans": 1}
    flops = simulate_backbone({**linear_run.model, "backbone": backbone}, setting("none")).flops
    assert flops["forward"] == pytest.approx(compute_forward_flops(backbone, (504, 504)), rel=1e-4)
    assert traces["none"].flops["forward"] - flops["forward"] == 2 * 36**2 * 2 * 14**2 * 3200


def test_full_size_logits_and_loss(linear_run):
    trace = simulate_heads(linear_run.model, setting("none"))
    assert trace.peak["logits and loss"] / GB == pytest.approx(0.5, rel=0.1)


def test_a_frozen_backbone_keeps_nothing():
    run = build_run_config(RunOptions("internvit6b_224_linear_ade20k"), 1)
    trace = simulate_backbone(run.model, setting("none"))
    assert trace.kept.total() < 0.01 * GB and trace.flops["all"] == trace.flops["forward"]
    hidden_bytes = 1297 * 4 * 3200 * 2
    assert trace.peak.total() > 2 * hidden_bytes, "its blocks take memory while they run: before GELU and after"


@pytest.mark.parametrize(("compiled", "kept_mib"), [(False, 73.2), (True, 46.1)])
def test_deepspeeds_linear_keeps_the_inputs_of_frozen_weights(compiled, kept_mib):
    """Measured on two processes, 2 crops of 224: 72.7 MiB of tensors that the blocks made are there at the loss."""
    frozen = {"model.backbone.freeze_vit": True, "model.backbone.unfreeze_pos_embed": True}
    options = {**frozen, "data.train.pipeline.3.crop_size": (224, 224), "data.train.pipeline.7.size": (224, 224)}
    run = build_run_config(RunOptions("camvid_dinov2s_full", cfg_options=options, compile=compiled), 1)
    linear = torch.nn.functional.linear
    peak = StepCosts(run, ["none"], fused_norms=False).of("none", 2).peak
    assert peak["activations"] / 2**20 == pytest.approx(kept_mib, rel=0.01)
    assert torch.nn.functional.linear is linear


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
    kept = simulate_backbone(run.model, setting(policy, 2, crop=448, fused_norms=False)).kept.total()
    assert kept / 2**20 == pytest.approx(measured_mib, rel=0.1)


def test_traces_are_shared_by_runs_of_one_backbone_alone():
    known, flops = {}, []
    for changes in ({}, {"model.backbone.pretrained": "other.pth"}, {"model.backbone.mlp_ratio": 2}):
        run = build_run_config(RunOptions("demo", cfg_options=changes), 1)
        flops.append(StepCosts(run, ["none"], known=known).of("none", 1).forward_flops)
    assert flops[0] == flops[1] > flops[2] and len(known) == 2
