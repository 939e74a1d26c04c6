"""`--compile`: the same steps as without, in one graph for all blocks, and no compilation in evaluations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ranks import run_ranks

WORKER = Path(__file__).with_name("compiled_worker.py")
POLICIES = ("none", "selective", "block")
# Two FP32 steps with layer decay, clipping, accumulation and drop path; measured: losses equal, norms 2e-8 apart.
LOSS_TOLERANCE, NORM_TOLERANCE = 1e-6, 1e-6


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two ranks found."""
    out = tmp_path_factory.mktemp("compiled")
    run_ranks(WORKER, 2, out, timeout_s=420)
    return json.loads((out / "world2.json").read_text())


@pytest.mark.parametrize("policy", POLICIES)
def test_compiled_blocks_make_the_same_steps(ranks, policy):
    for rank in ranks:
        eager, compiled = rank["check_eager"], rank["check_compiled"][policy]
        assert compiled["losses"] == pytest.approx(eager["losses"], rel=LOSS_TOLERANCE)
        assert compiled["norms"] == pytest.approx(eager["norms"], rel=NORM_TOLERANCE)
        assert eager["graphs"] == 0 and compiled["norms"] != eager["norms"]


@pytest.mark.parametrize("policy", POLICIES)
def test_all_blocks_share_one_graph_without_breaks(ranks, policy):
    for rank in ranks:
        compiled = rank["check_compiled"][policy]
        assert (compiled["graphs"], compiled["breaks"], compiled["graphs_of_evaluations"]) == (1, 0, 0)
        assert rank["check_a_breaking_block"]["breaks"] > 0


def test_policies_keep_less_and_less(ranks):
    for rank in ranks:
        none, selective, block = (rank["check_compiled"][policy]["kept_bytes"] for policy in POLICIES)
        assert block < 0.5 * selective and selective < 0.9 * none, (none, selective, block)
