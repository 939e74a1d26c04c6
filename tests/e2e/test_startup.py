"""What a start leaves out: libraries that it does not need, compilers, and torch where nothing is computed."""

import json
import subprocess
import sys

import pytest

from command_line import environment
from ds_seg.config import CONFIGS_ROOT

BENCHMARK = CONFIGS_ROOT.parent / "benchmarks" / "startup.py"
WITHOUT_TORCH = """
import sys
from ds_seg.__main__ import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    heavy = {"torch", "numpy", "cv2", "mmcv", "mmseg", "deepspeed", "matplotlib", "wandb"}
    print(sorted(heavy & set(sys.modules)), end.code)
"""


def test_the_demo_starts_without_what_it_does_not_need(tmp_path):
    """Measured by the benchmark, whose figures are looked at on the way."""
    out, built = tmp_path / "startup.json", tmp_path / "extensions"
    command = [sys.executable, str(BENCHMARK), "--json", str(out)]
    command += "--launcher none --repeats 1 --warmup 0 --only-train".split()
    env = environment(TORCH_EXTENSIONS_DIR=str(built))
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    start = json.loads(out.read_text())["here"]["train"]
    assert start["loaded"] == ["torch._dynamo"]  # which torch's own optimizers import
    assert not list(built.rglob("*.so"))
    parts = start["parts"]
    assert {"process group", "config", "datasets", "modules", "DeepSpeed engine", "first data", "first step"} <= set(
        parts
    )
    total = sum(part["cpu_s"] for part in parts.values())
    assert start["cpu_s"] == pytest.approx(total, rel=0.05) and start["rank_cpu_s"] < start["cpu_s"] + 0.01
    assert parts["import torch"]["cpu_s"] > 0.1 and parts["first step"]["wall_s"] > 0.01
    assert "first step" in done.stdout and "all processes" in done.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["plan", "--help"], ["train"], ["--version"]])
def test_what_computes_nothing_imports_no_torch(arguments):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *arguments], capture_output=True, text=True, timeout=60, env=environment()
    )
    assert done.stdout.splitlines()[-1] == f"[] {2 if arguments == ['train'] else 0}", done.stdout + done.stderr
