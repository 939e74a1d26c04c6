"""The benchmark of checkpoints, small: every kind runs and is put beside no checkpoint."""

import json
import subprocess
import sys

from command_line import environment
from ds_seg.config import CONFIGS_ROOT


def test_every_kind_is_measured(tmp_path):
    out = tmp_path / "checkpoint.json"
    command = [sys.executable, str(CONFIGS_ROOT.parent / "benchmarks" / "checkpoint.py"), "--json", str(out)]
    command += "--preset internvit_tiny --depth 1 --crop 28 --world-size 1 --rounds 1 --warmup 0 --steps 2".split()
    command += ["--device", "cpu", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment())
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())
    assert figures["bytes"] > 1e6 and set(figures["kinds"]) == {"none", "sync", "async"}
    for kind, row in figures["kinds"].items():
        assert kind in done.stdout and row["round_s"] > 0
        assert (row["stall_s"] > 1e-3) == (kind != "none")
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
