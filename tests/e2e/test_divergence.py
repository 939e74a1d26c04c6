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
    assert "not finite in 5 steps in a row, the last at step 7. The last checkpoint before them is " in bad.stderr
    assert f"{checkpoint}. Lower optimizer.lr" in bad.stderr and (checkpoint / "manifest.json").is_file()
    assert bad.stderr.count("TrainingDiverged") == 1 and "Traceback" not in bad.stderr
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row] == [
        1,
        *range(2, 7),
    ]


def test_a_run_that_may_go_back_does_so_and_stops_once_that_does_not_help(cli, tiny_config, tmp_path):
    rollback = ["--on-divergence", "rollback", "--cfg-options", "max_rollbacks=1", "max_skipped_steps=2"]
    done = cli("train", tiny_config, "--work-dir", tmp_path / "run", *rollback, INFINITE_IMAGES)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    checkpoint = tmp_path / "run" / "checkpoints" / "step_000000"
    assert f"saved {checkpoint}, for a rollback before the first regular checkpoint" in done.stdout
    assert (
        f"not finite from step 1 to 2: went back to {checkpoint} (rollback 1 of at most 1); from now on the run leaves "
        "out global batches 0 to 1 (samples 0 to 15)"
    ) in done.stdout
    assert "went back 1 times already (max_rollbacks=1)" in done.stderr
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1]
