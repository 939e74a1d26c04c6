"""A run whose loss is not finite any more stops by itself and says what to go back to."""

from ds_seg.tracking.metrics_log import read_metrics

INFINITE_IMAGES = "data.train.pipeline.5.std=[0.0,0.0,0.0]"


def test_five_bad_steps_in_a_row_end_the_run_with_the_step_and_the_last_good_checkpoint(cli, tiny_config, tmp_path):
    command = ["train", tiny_config, "--work-dir", tmp_path / "run", "--resume", "auto", "--cfg-options"]
    good = cli(*command, "runner.max_iters=2")
    assert good.returncode == 0, good.stderr
    bad = cli(*command, "runner.max_iters=40", "checkpoint_config.interval=40", INFINITE_IMAGES)
    assert bad.returncode == 1, bad.stderr
    checkpoint = tmp_path / "run" / "checkpoints" / "step_000002"
    assert "not finite in 5 steps in a row, the last at step 7. The last good checkpoint is " in bad.stderr
    assert f"{checkpoint}. Lower optimizer.lr" in bad.stderr and (checkpoint / "manifest.json").is_file()
    assert bad.stderr.count("TrainingDiverged") == 1 and "Traceback" not in bad.stderr
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row] == [
        1,
        *range(2, 7),
    ]
