"""benchmarks/gpu.sh and the installation from collected wheels: what they refuse, and what they leave when time is up.

What gpu.sh measures is tested piece by piece: tests/gpu, test_benchmark. A dry run of all of it takes minutes:
`DEVICE=cpu benchmarks/gpu.sh`.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from ds_seg.config import CONFIGS_ROOT

ROOT = CONFIGS_ROOT.parent


def run(script, *arguments, **variables):
    env = {**os.environ, "PYTHON": sys.executable, "DEVICE": "cpu", **{k: str(v) for k, v in variables.items()}}
    command = ["bash", str(ROOT / script), *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def test_what_has_no_time_left_is_named_and_the_next_part_goes_on(tmp_path):
    done = run("benchmarks/gpu.sh", "steps", "fit", tmp_path / "out", PART_S=5, MEMORY_GIB=80)
    assert done.returncode == 0, done.stderr
    left_out = {
        part: json.loads((tmp_path / "out" / f"{part}.json").read_text())["commands"] for part in ("steps", "fit")
    }
    names = ("blocks_1_batch_2_selective", "blocks_2_batch_2_block")
    assert left_out["steps"] == [{"command": name, "left_out": True} for name in names]
    assert left_out["fit"] == [{"command": name, "left_out": True} for name in ("offloaded", "resident")]
    assert "resident: left out, the part's time is over" in done.stdout
    assert (tmp_path / "out" / "fit.log").read_text().startswith("fit on cpu, 80 GiB")


def test_pytest_is_stopped_so_that_it_writes_its_results(tmp_path):
    """It does so on SIGINT alone, the step's benchmark on SIGTERM; `timeout` is a stand-in."""
    stand_in = tmp_path / "timeout"
    stand_in.write_text(f'#!/bin/bash\necho "$*" >> {tmp_path}/called\nexit 124\n')
    stand_in.chmod(0o755)
    done = run("benchmarks/gpu.sh", "tests", "steps", tmp_path / "out", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 1, done.stderr
    tests, *steps = (tmp_path / "called").read_text().splitlines()
    assert tests.startswith("-s INT -k ") and "--junitxml" in tests
    assert steps and all(step.startswith("-s TERM -k ") and "step.py" in step for step in steps)


@pytest.mark.parametrize(
    ("script", "arguments", "variables", "message"),
    [
        ("benchmarks/gpu.sh", ["--quick"], {}, "no option --quick"),
        ("benchmarks/gpu.sh", ["a", "b"], {}, "one folder for the figures, got a and b"),
        ("benchmarks/gpu.sh", [], {"PYTHON": "/bin/false"}, "can't import ds_seg's packages: run make setup"),
        ("benchmarks/gpu.sh", ["fit"], {"MEMORY_GIB": 24}, "a GPU of 24 GiB is too small"),
        ("benchmarks/collect_wheels.sh", [], {}, "name a folder"),
        ("benchmarks/collect_wheels.sh", ["x", "--glibc"], {}, "--glibc needs a value"),
        ("benchmarks/collect_wheels.sh", ["x", "--python", "2.7"], {}, "--python 2.7: want 3.10, 3.11 or 3.12"),
        ("benchmarks/collect_wheels.sh", ["x", "--have", "nope"], {}, "--have nope: no such file"),
        ("benchmarks/collect_wheels.sh", [ROOT / "docs"], {}, "docs is not empty"),
        ("scripts/setup.sh", [], {"WHEELS": ROOT / "docs"}, "is no folder with wheels of ds_seg's packages"),
    ],
)
def test_mistakes_are_said_once_with_the_remedy(tmp_path, script, arguments, variables, message):
    done = run(script, *arguments, OUT=tmp_path, **variables)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) <= 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU here")
def test_a_machine_without_a_gpu_is_told_of_the_dry_run(tmp_path):
    done = run("benchmarks/gpu.sh", "fit", tmp_path, DEVICE="cuda")
    assert done.returncode == 2 and "torch sees no CUDA GPU" in done.stderr and "DEVICE=cpu" in done.stderr
