"""Checkpoints of two gloo ranks: written while training waits or goes on, refused by a disk, damaged."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ranks import run_ranks

WORKER = Path(__file__).with_name("save_worker.py")
TIMEOUT_S = 400


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two ranks measured, in rank order."""
    out = tmp_path_factory.mktemp("save")
    run_ranks(WORKER, 2, out, timeout_s=TIMEOUT_S)
    return json.loads((out / "world2.json").read_text())


@pytest.mark.parametrize(("kind", "count"), [("averaged", 10), ("frozen", 5), ("part", 8)])
def test_the_background_writes_the_bits_of_the_moment_of_the_save(ranks, kind, count):
    for rank in ranks:
        assert rank["check_same_bits"][kind] == {
            "files": True,
            "count": count,
            "moved": True,
            "early": [".step_000001.tmp"],
            "names": ["best", "latest", "step_000001"],
            "second": ["best", "latest", "step_000001", "step_000002"],
            "resumed": True,
        }


def test_a_checkpoint_gets_its_name_when_all_ranks_have_written(ranks):
    for rank in ranks:
        got = rank["check_polls"]
        assert got["waiting"] == [".step_000001.tmp"]
        assert got["committed"] == ["latest", "step_000001"]


def test_two_saves_do_not_overlap(ranks):
    for rank in ranks:
        got = rank["check_polls"]
        assert got["second"] == ["latest", "step_000001", "step_000002"]
        assert got["all"] == ["latest", "step_000001", "step_000002", "step_000003"]
        assert len(got["lines"]) == 3 and "in the background; training waited 0." in got["lines"][0]


def test_a_score_is_put_into_a_checkpoint_that_is_there(ranks):
    for rank in ranks:
        assert rank["check_amendment"] == {
            "amended": True,
            "names": ["best", "latest", "step_000001"],
            "state": True,
            "weights": True,
            "gone": False,
            "left": ["best", "latest"],
        }


def test_without_memory_for_copies_training_waits_for_the_disk(ranks):
    for rank in ranks:
        got = rank["check_little_memory"]
        assert got["names"] == [["latest", "step_000001"], ["latest", "step_000001", "step_000002"]]
        lack, *saved = got["lines"]
        assert "has 9.31e-07 GiB of memory free, and they take 0.0" in lack and "Training waits" in lack
        assert len(saved) == 2 and not any("background" in line for line in saved)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_disk_that_refuses_one_rank_stops_all_with_the_cause(ranks, kind):
    assert ranks[0]["check_full_disk"]["async_started"] == "no error"
    for rank in ranks:
        got = rank["check_full_disk"]
        assert "step_000002 could not be written: OSError: [Errno 27] File too large" in got[kind]
        assert got[kind] == ranks[0]["check_full_disk"][kind]
        assert got[f"{kind}_names"] == ["latest", "step_000001"]


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_too_little_room_is_said_by_all_ranks_before_anything_is_written(ranks, kind):
    for rank in ranks:
        got = rank["check_full_disk"]
        assert "step_000003 needs " in got[f"{kind}_room"] and "MiB, and 0.000954 MiB are free" in got[f"{kind}_room"]
        assert got[f"{kind}_room_names"] == ["latest", "step_000001"]
        assert got[f"{kind}_after"] == ["latest", "step_000001", "step_000004"]


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_without_a_work_dir_that_all_ranks_share_no_save_succeeds(ranks, kind):
    for rank in ranks:
        got = rank["check_own_disks"]
        assert re.search(r"rank 0 does not see \d of its \d+ files .*; the first, backbone/\S+_rank_1_", got[kind])
        assert "choose a --work-dir on a file system that all nodes share" in got[kind]
    assert ranks[0]["check_own_disks"][f"{kind}_names"] == []


def test_all_ranks_fall_back_to_the_newest_whole_checkpoint(ranks):
    fault = "step_000002 is damaged: backbone/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt has another checksum"
    for rank in ranks:
        got = rank["check_fallback"]
        assert got["chosen"] == "step_000001" and got["resumed"] and not got["averaged"]
        assert len(got["warnings"]) == 1 and fault in got["warnings"][0]
        assert fault in got["tag"] and fault in got["latest"]
        assert "--resume step_000009: no complete checkpoint of that name" in got["absent"]


@pytest.mark.parametrize("kind", ["averaged", "frozen", "part"])
def test_the_size_of_a_checkpoint_is_known_beforehand(ranks, kind):
    """But for names, shapes and DeepSpeed's config, which take as much for a large model as for this one."""
    got = ranks[0]["check_sizes"][kind]
    names = sum(got["files"].values()) - got["counted"]
    assert 0 < names < 30000 * len(got["files"])
