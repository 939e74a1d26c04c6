"""A tensor of another dtype than promised stops the run on all ranks; one group cut by rate steps like many groups."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ranks import run_ranks

WORKER = Path(__file__).with_name("guard_worker.py")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What one rank found alone, and then each of two."""
    out = tmp_path_factory.mktemp("guard")
    found = []
    for world_size in (1, 2):
        run_ranks(WORKER, world_size, out, timeout_s=300)
        found += json.loads((out / f"world{world_size}.json").read_text())
    return found


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("cast_parameter", "parameter decode_head.conv_seg.weight is torch.float16, want torch.float32"),
        ("cast_statistic", "buffer decode_head.norm.running_var is torch.float16, want torch.float32"),
        ("cast_moment", "optimizer state exp_avg of decode_head.conv_seg.bias is torch.float16, want torch.float32"),
        ("cast_shard", "shard of backbone.blocks.1.attn.qkv.weight is torch.float16, want torch.bfloat16"),
        ("cast_backbone", "parameter backbone.cls_token is torch.float16, want torch.bfloat16"),
        ("cast_master", "FP32 master weights of the backbone is torch.float16, want torch.float32"),
        ("cast_backbone_moment", "optimizer state exp_avg_sq of the backbone is torch.float16, want torch.float32"),
        ("at_start", "buffer decode_head.norm.running_mean is torch.bfloat16, want torch.float32"),
        ("after_resume", "parameter decode_head.conv_seg.weight is torch.bfloat16, want torch.float32"),
        ("gradient", "gradient of decode_head.conv_seg.weight is torch.bfloat16, want torch.float32"),
    ],
)
def test_a_tensor_of_another_dtype_stops_the_run_on_every_rank(ranks, name, text):
    for run in ranks:
        message = run["check_precision_guard"][name]
        assert message.startswith(f"The precision is not what the run promised: {text}"), message
        assert "Nothing was saved from this state" in message


def test_nothing_is_saved_or_stepped_in_another_dtype(ranks):
    for run in ranks:
        got = run["check_precision_guard"]
        assert got["nothing_saved"] and got["right"] == "no error" and got["stepped"] == []


def test_one_deepspeed_group_cut_by_rate_gives_the_bits_of_a_group_for_each_rate(ranks):
    for run in ranks:
        got = run["check_rate_groups"]
        assert got["same_losses"] and got["same_bits"] and got["same_groups"]
        assert got["groups"] == [1, 6] and got["rates"] == 4
        assert 1 < got["sub_groups"][0] < got["sub_groups"][1]
