"""A work dir without space while a run logs: training goes on, counts what is lost, and uses space that comes back."""

import json
import signal
import time

from disks import fill, small_disk
from ds_seg.tracking.metrics_log import read_metrics
from run_rows import wait_for_step


def wait_for(condition, what, timeout_s=90):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def test_rows_are_lost_and_counted_and_the_run_goes_on(cli, tiny_config, tmp_path):
    cli.env["WANDB_MODE"] = "offline"
    log = tmp_path / "started.log"
    options = ("--cfg-options", "runner.max_iters=5000", "checkpoint_config.interval=5000", "evaluation.interval=5000")
    with small_disk(tmp_path / "disk", size_mib=48) as disk:
        work_dir = disk / "run"
        process = cli.start("train", tiny_config, "--work-dir", work_dir, *options)
        wait_for_step(process, work_dir, 3)
        ballast = fill(disk)
        wait_for(lambda: "rows of metrics.jsonl can't be written" in log.read_text(), "the disk did not fill up")
        step = read_metrics(work_dir / "metrics.jsonl")[-1]["step"]
        wait_for(lambda: f"step {step + 20}/" in log.read_text(), "training did not go on")
        ballast.unlink()
        wait_for_step(process, work_dir, step + 21)
        process.send_signal(signal.SIGTERM)
        assert process.wait(90) == 75, log.read_text()
        summary = json.loads((work_dir / "summary.json").read_text())
        steps = [row["step"] for row in read_metrics(work_dir / "metrics.jsonl")]
    lost = summary["steps"] - len(steps)
    assert summary["status"] == "stopped" and summary["lost_records"] == {"rows of metrics.jsonl": lost} and lost >= 20
    text = log.read_text()
    assert text.count("can't be written (") == 1 and "No space left on device" in text
    assert f"warning: lost because they could not be written: {lost} rows of metrics.jsonl" in text
