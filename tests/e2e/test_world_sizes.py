"""The same run with one process and with two, at the same global batch, sees the same losses."""

import pytest

from ds_seg.config import CONFIGS_ROOT
from ds_seg.tracking.metrics_log import read_metrics

# Largest relative differences measured over 20 steps (drop path on, dropout off): 2.1e-7 and 7.8e-6.
TOLERANCES = {"zero3_fp32.json": 2e-6, "zero3_bf16.json": 1e-4}


def losses(work_dir):
    return [row["loss"] for row in read_metrics(work_dir / "metrics.jsonl") if "loss" in row]


@pytest.mark.parametrize("deepspeed_config", TOLERANCES)
def test_losses_of_the_first_20_steps_agree(cli, tiny_config, tmp_path, deepspeed_config):
    found = {}
    for processes, micro_batch in [(1, 8), (2, 4)]:
        work_dir = tmp_path / str(processes)
        arguments = ["--work-dir", work_dir, "--deepspeed-config", CONFIGS_ROOT / "deepspeed" / deepspeed_config]
        options = ["runner.max_iters=20", "model.decode_head.dropout_ratio=0", f"data.samples_per_gpu={micro_batch}"]
        done = cli(
            "train", tiny_config, *arguments, "--cfg-options", *options, processes=processes, launcher="torchrun"
        )
        assert done.returncode == 0, done.stderr
        found[processes] = losses(work_dir)
    assert len(found[1]) == len(found[2]) == 20
    assert max(found[1]) - min(found[1]) > 0.1  # the runs learn, so equal losses mean equal steps
    worst = max(abs(one / two - 1) for one, two in zip(found[1], found[2], strict=True))
    assert worst < TOLERANCES[deepspeed_config], worst
    print(f"{deepspeed_config}: largest relative difference {worst:.2e}")
