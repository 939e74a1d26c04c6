"""The benchmark of parameter groups, small: every variant runs and is put beside no layer decay."""

import json
import subprocess
import sys

from command_line import environment
from ds_seg.config import CONFIGS_ROOT


def test_every_variant_is_measured(tmp_path):
    out = tmp_path / "groups.json"
    command = [sys.executable, str(CONFIGS_ROOT.parent / "benchmarks" / "groups.py"), "--json", str(out)]
    command += "--depth 3 --world-sizes 1 --steps 2 --warmup 1 --device cpu".split()
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment())
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["world_1"]
    counts = {name: (row["groups"], row["sub_groups"]) for name, row in rows.items()}
    # embeddings and each of 3 blocks: a group that is decayed and one that is not; a sub-group is a block's size
    assert counts == {
        "ds_seg, layer decay": (8, 3),
        "ds_seg, none": (2, 3),
        "plain, layer decay": (8, 8),
        "plain, none": (2, 4),
    }
    for name, row in rows.items():
        assert name in done.stdout and row["step_ms"] > 0 and row["cpu_ms"] > 0
        assert 0.01 < row["cpu_ms_over_none"] < 100
    assert rows["ds_seg, none"]["cpu_ms_over_none"] == 1.0
