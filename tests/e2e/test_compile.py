"""`--compile` from the command line: the data loader's threads beside it, an evaluation and a checkpoint."""

import pytest

from command_line import environment
from ds_seg.tracking.metrics_log import read_metrics

STEPS = ("--cfg-options", "runner.max_iters=4", "model.backbone.checkpointing=block", "data.workers_per_gpu=1")
LOSS_TOLERANCE = 1e-3
"""In bf16 a compiled block rounds elsewhere; measured on the CPU: 2e-5."""


def test_a_compiled_run_makes_the_same_steps_and_compiles_once(device, cli, tiny_config, tmp_path):
    cache = tmp_path / "compiler_cache"
    cli.env |= environment(device, TORCH_LOGS="recompiles", TORCHINDUCTOR_CACHE_DIR=str(cache))
    losses = {}
    for name, options in (("plain", ()), ("compiled", ("--compile",))):
        done = cli("train", tiny_config, "--work-dir", tmp_path / name, *options, *STEPS)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "Recompiling" not in done.stdout + done.stderr
        assert any(path.is_file() for path in cache.rglob("*")) == (name == "compiled")
        losses[name] = [row["loss"] for row in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in row]
    assert losses["compiled"] == pytest.approx(losses["plain"], rel=LOSS_TOLERANCE)
