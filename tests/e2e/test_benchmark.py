"""The side-by-side step benchmark, small: all three variants run, agree with each other, and report every figure."""

import json
import subprocess
import sys

import pytest

from ds_seg.config import CONFIGS_ROOT

# All variants start from the same weights on the same batches; largest relative differences measured in bf16:
# first loss and joint gradient norm 7e-8 (3e-6 for DINOv2-S), loss after 4 steps 1.5e-6.
FIRST_TOLERANCE, LAST_TOLERANCE = 1e-5, 1e-4


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    out = tmp_path_factory.mktemp("benchmark") / "step.json"
    command = [sys.executable, str(CONFIGS_ROOT.parent / "benchmarks" / "step.py"), "--preset", "internvit_tiny"]
    command += "--depth 2 --crop 56 --batch 1 --world-size 2 --device cpu".split()
    command += ["--rounds", "2", "--steps", "2", "--warmup", "0", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "step_time_over_fsdp2" in done.stdout
    return json.loads(out.read_text())


def test_every_figure_is_there(figures):
    assert set(figures["variants"]) == {"ds_seg", "fsdp2", "ddp"}
    assert (figures["tokens"], figures["global_batch"]) == (17, 2)
    for name, row in figures["variants"].items():
        assert row["steps"] == 4 and len(row["step_s_by_round"]) == 2, name
        assert row["images_per_s"] == pytest.approx(2 / row["step_s"])
        assert row["mfu"] is None
        assert row["memory"]["resident_gib"] > row["memory"]["resident_growth_gib"] > 0
    for name in ("step_time_over_fsdp2", "step_time_over_ddp", "memory_over_fsdp2"):
        assert 0.01 < figures["ratios"][name] < 100, name


def test_the_variants_make_the_same_steps(figures):
    ours = figures["variants"]["ds_seg"]
    for name in ("fsdp2", "ddp"):
        theirs = figures["variants"][name]
        assert theirs["loss_first"] == pytest.approx(ours["loss_first"], rel=FIRST_TOLERANCE)
        assert theirs["grad_norm_first"] == pytest.approx(ours["grad_norm_first"], rel=FIRST_TOLERANCE)
        assert theirs["loss_last"] == pytest.approx(ours["loss_last"], rel=LAST_TOLERANCE)
    assert ours["loss_first"] != ours["loss_last"]


def test_an_unknown_preset_is_the_users_mistake():
    command = [sys.executable, str(CONFIGS_ROOT.parent / "benchmarks" / "step.py"), "--preset", "nope"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "--preset nope" in done.stderr and "Traceback" not in done.stderr
