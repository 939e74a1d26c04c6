"""Sizes of ZeRO-3 that are "auto" follow from backbone and memory; numbers that a user wrote stay."""

import json

import pytest

from ds_seg.config import RunOptions, build_run_config
from ds_seg.config.zero_sizes import ZERO_SIZES, compute_zero_sizes, count_backbone
from ds_seg.errors import ConfigError
from ds_seg.planning.communication import count_live_parameters
from ds_seg.planning.model_size import measure_model

SIX_B = {"embed_dim": 3200, "depth": 48, "mlp_ratio": 4}
DINOV2S = {"embed_dim": 384, "depth": 12, "mlp_ratio": 4}


def write(tmp_path, **zero):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"bf16": {"enabled": True}, "zero_optimization": {"stage": 3, **zero}}))
    return RunOptions("internvit6b_224_full_linear_ade20k", deepspeed_config=str(path))


def test_sizes_of_the_shipped_json_are_numbers():
    run = build_run_config(RunOptions("internvit6b_224_full_linear_ade20k"), 8)
    assert set(run.auto_sizes) == set(ZERO_SIZES)
    assert all(isinstance(run.deepspeed["zero_optimization"][name], int) for name in ZERO_SIZES)


def test_with_memory_to_spare_nothing_is_gathered_twice():
    parameters = 5_906_121_600
    sizes = compute_zero_sizes(SIX_B, 100e9, 2)
    assert sizes["stage3_max_live_parameters"] >= parameters and count_backbone(SIX_B) >= parameters
    assert sizes["stage3_max_reuse_distance"] >= 2 * parameters
    pyramid = count_backbone({**SIX_B, "with_fpn": True}) - count_backbone(SIX_B)
    assert pyramid == pytest.approx(1.05 * 3 * (2 * 2) * 3200**2)  # three transposed convolutions


def test_with_none_to_spare_a_few_blocks_are_whole():
    sizes = compute_zero_sizes(SIX_B, -5e9, 2)
    assert sizes["stage3_max_live_parameters"] == 3 * 122_880_000 and sizes["stage3_max_reuse_distance"] == 0


def test_what_there_is_to_spare_is_used():
    tight, roomy = (compute_zero_sizes(SIX_B, live, 2) for live in (2e9, 6e9))
    kept = (roomy["stage3_max_reuse_distance"] - tight["stage3_max_reuse_distance"]) / 2
    assert kept == 2e9 and roomy["stage3_max_live_parameters"] == 3 * 10**9 - 129_024_000  # a block on its way


@pytest.mark.parametrize("config", ["internvit6b_224_full_linear_ade20k", "camvid_dinov2s_full", "demo"])
def test_what_is_whole_takes_no_more_than_there_is_to_spare(config):
    run = build_run_config(RunOptions(config), 1)
    size = measure_model(run.model)
    for share in (0.7, 0.8, 0.9):
        live_bytes = share * 2 * size.backbone
        zero = compute_zero_sizes(run.model.backbone, live_bytes, 2)
        assert 0.95 * live_bytes < 2 * count_live_parameters(size, zero, 8) <= live_bytes


def test_nothing_of_a_frozen_trunk_is_kept():
    least = compute_zero_sizes(SIX_B, 0, 2)
    assert compute_zero_sizes({**SIX_B, "freeze_vit": True}, 100e9, 2) == least
    trained = {**SIX_B, "freeze_vit": True, "unfreeze_pos_embed": True}
    assert compute_zero_sizes(trained, 100e9, 2) == compute_zero_sizes(SIX_B, 100e9, 2)


def test_buckets_follow_the_blocks():
    assert compute_zero_sizes(SIX_B, 0, 2)["reduce_bucket_size"] == 200_000_000
    small = compute_zero_sizes(DINOV2S, 0, 2)
    assert small["reduce_bucket_size"] == pytest.approx(5e6, rel=0.1)  # measured to be good on CPUs
    assert small["sub_group_size"] == 12 * 384**2 and compute_zero_sizes(SIX_B, 0, 2)["sub_group_size"] == 100_000_000
    assert small["stage3_prefetch_bucket_size"] == 12 * 384**2 and small["stage3_param_persistence_threshold"] == 0


def test_numbers_that_a_user_wrote_stay(tmp_path):
    run = build_run_config(write(tmp_path, reduce_bucket_size=123, stage3_max_live_parameters="auto"), 8)
    zero = run.deepspeed["zero_optimization"]
    assert run.auto_sizes == ("stage3_max_live_parameters",)
    assert zero["reduce_bucket_size"] == 123 and zero["stage3_max_live_parameters"] == 10**9 - 129_024_000
    assert "stage3_prefetch_bucket_size" not in zero


def test_auto_where_nothing_settles_it_is_a_fault(tmp_path):
    with pytest.raises(
        ConfigError, match=r"zero_optimization\.pipeline_depth: got 'auto', which is known for reduce_b"
    ):
        build_run_config(write(tmp_path, pipeline_depth="auto"), 8)
