"""Weight files into shards on two gloo processes, started once; see weights_worker.py for what is measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ranks import run_ranks

WORKER = Path(__file__).with_name("weights_worker.py")
MIB = 2**20
MARGIN_BYTES = (
    8 * MIB
)  # gloo's buffers, library code that runs for the first time; what must not fit in are 41 MiB of weights


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two ranks measured, in rank order."""
    out = tmp_path_factory.mktemp("weights")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
            patch.setenv(name, "65536")  # freed memory goes back at once: resident is what is held
        run_ranks(WORKER, 2, out, timeout_s=300)
    return json.loads((out / "results.json").read_text())


def held_beyond_partition(ranks, method):
    """Bytes of its own memory and of mapped files that each rank added, and what is to bound them."""
    bound = ranks[0]["check_memory"]["bound"]
    added = [rank["check_memory"]["rows"][method]["added_bytes"] for rank in ranks]
    return added, max(bound["largest_file_bytes"], bound["block_bytes"]) + MARGIN_BYTES


def test_no_rank_holds_more_than_one_file_or_block_beside_its_partition(ranks):
    # measured with files of 5.6 MiB: own memory 2.9 MiB on both ranks; mapped files 7.5 and 2.5; together 9.5 and 5.5
    (first, second), bound = held_beyond_partition(ranks, "streamed")
    for rank in (first, second):
        assert rank["anonymous"] < bound
        assert rank["file"] < bound
        assert rank["total"] < bound
    assert second["file"] < MARGIN_BYTES  # only rank 0 reads
    size = ranks[0]["check_memory"]["bound"]
    assert size["files"] >= 5
    assert size["checkpoint_bytes"] > 2 * bound
    for rank in ranks:
        row = rank["check_memory"]["rows"]["streamed"]
        assert row["equal"]
        assert row["partition_bytes"] == pytest.approx(size["checkpoint_bytes"] / 2, rel=0.01)


def test_reading_everything_first_is_rejected_by_that_bound(ranks):
    (first, _), bound = held_beyond_partition(ranks, "whole")
    assert first["anonymous"] > bound
    assert first["total"] > bound


def test_projections_torn_between_files_arrive_exactly(ranks):
    for rank in ranks:
        got = rank["check_projections_torn_between_files"]
        assert got == {"far": 0, "dialect": "transformers InternVLVisionModel (-hf)", "tensors": 30}


def test_a_patch_embedding_is_resized_into_shards_as_into_a_plain_model(ranks):
    for rank in ranks:
        assert rank["check_patches_resized"] == {"far": 0, "sides": [4, 2], "same": True}


def test_backbone_and_heads_are_read_by_rank_0_alone(ranks):
    for rank, logged in zip(ranks, (2, 0), strict=True):
        got = rank["check_segmentor"]
        assert got["far"] == 0
        assert got["heads_equal"]
        assert got["logged"] == logged


def test_a_head_that_does_not_fit_raises_the_same_on_every_rank(ranks):
    messages = {rank["check_segmentor"]["message"] for rank in ranks}
    assert len(messages) == 1
    assert "decode_head.conv_seg.weight is [5, 32, 1, 1] in the file and [3, 32, 1, 1]" in messages.pop()


def test_released_files_evaluate_predict_and_start(ranks):
    for rank in ranks:
        got = rank["check_commands"]
        wanted = got["scores"]["engines"]
        assert len([name for name, value in wanted.items() if "/IoU/" in name and value]) > 1
        for name in ("whole", "head"):
            found = got["scores"][name]
            assert {key: found[key] for key in wanted} == wanted
            assert found["checkpoint"].endswith(f"{name}.pth")
        assert got["predicted"] == 4
        assert got["start_has_the_head"]
        (warning,) = got["warnings"]
        assert "pretrain_size is 112 px, but the weights have positions for 56 px" in warning


def test_fp32_masters_start_from_all_the_bits_of_a_file(ranks):
    # bf16 alone is 2^-8 off, of values up to 1.5
    for rank in ranks:
        got = rank["check_masters"]
        assert len(got) == 8
        assert set(got.values()) == {0.0}


def test_what_is_frozen_is_read_once(ranks):
    for rank in ranks:
        assert rank["check_frozen_are_read_once"] == [["pos_embed"], ["pos_embed"]]
