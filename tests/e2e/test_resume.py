"""A run that is stopped or killed and resumed equals, bit for bit, one that ran through."""

import json
import os
import shutil
import signal
import time

from ds_seg.checkpoint import list_checkpoints
from run_rows import read_rows, wait_for_step


def test_stopped_by_a_signal_and_resumed(cli, tiny_config, tmp_path):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    options = ("--cfg-options", "runner.max_iters=24")
    done = cli("train", tiny_config, "--work-dir", straight, *options)
    assert done.returncode == 0, done.stderr

    process = cli.start("train", tiny_config, "--work-dir", stopped, *options)
    wait_for_step(process, stopped, 4)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75, (tmp_path / "started.log").read_text()
    summary = json.loads((stopped / "summary.json").read_text())
    assert summary["status"] == "stopped" and 4 <= summary["steps"] < 24
    assert "Run the same command with --resume auto" in (tmp_path / "started.log").read_text()

    resumed = cli("train", tiny_config, "--work-dir", stopped, "--resume", "auto", *options)
    assert resumed.returncode == 0, resumed.stderr
    assert read_rows(stopped) == read_rows(straight)
    summary = json.loads((stopped / "summary.json").read_text())
    assert summary["status"] == "completed" and summary["resumed_from"].endswith(f"step_{rows_before(summary):06d}")


def test_a_run_that_is_resumed_at_its_end_has_the_same_scores_and_rows(cli, tiny_config, trained, tmp_path):
    work_dir = shutil.copytree(trained, tmp_path / "run")
    (work_dir / "summary.json").unlink()  # it was killed after its last save
    again = cli("train", tiny_config, "--work-dir", work_dir, "--resume", "auto", "--load-from", "long_gone.pth")
    assert again.returncode == 0, again.stderr
    assert "checkpoints/step_000012; long_gone.pth is not read" in again.stdout
    first, second = (json.loads((folder / "summary.json").read_text()) for folder in (trained, work_dir))
    scores = ("status", "steps", "mIoU", "mAcc", "aAcc", "IoU", "loss_first", "loss_last")
    assert [second[key] for key in scores] == [first[key] for key in scores] and second["mIoU"] > 0
    assert second["images_per_s"] is None and second["step_time_s"] == {"median": None, "p95": None}  # no step was made
    assert read_rows(work_dir) == read_rows(trained)
    assert len(list_checkpoints(work_dir)) == len(list_checkpoints(trained)) and "saved " not in again.stdout


def rows_before(summary):
    """The step in the name of the checkpoint that a run resumed from."""
    return int(summary["resumed_from"].rpartition("_")[2])


def test_resuming_from_a_copy_of_an_earlier_step_forgets_what_came_after_and_tells_of_another_config(
    cli, tiny_config, tmp_path
):
    work_dir = tmp_path / "run"
    keep = ("--on-divergence", "rollback", "--cfg-options", "checkpoint_config.max_keep_ckpts=9")
    first = cli("train", tiny_config, "--work-dir", work_dir, *keep)
    assert first.returncode == 0, first.stderr
    assert "warning: no pretrained weights" in first.stdout
    before = read_rows(work_dir)
    shutil.copytree(work_dir / "checkpoints" / "step_000000", work_dir / "checkpoints" / "mybest")
    options = ("--resume", "mybest", *keep, "checkpoint_config.interval=4")
    again = cli("train", tiny_config, "--work-dir", work_dir, *options)
    assert again.returncode == 0, again.stderr
    assert read_rows(work_dir) == before
    assert (work_dir / "earlier-1" / "step_000012" / "manifest.json").is_file()
    assert "the config is not the one that mybest was saved with: checkpoint_config.interval 6 -> 4." in again.stdout
    assert "no pretrained weights" not in again.stdout


def test_a_run_goes_on_in_a_work_dir_that_another_run_has_used(cli, tiny_config, trained, tmp_path):
    work_dir = tmp_path / "used"
    other = cli("train", tiny_config, "--work-dir", work_dir, "--seed", "7", "--cfg-options", "runner.max_iters=3")
    assert other.returncode == 0, other.stderr
    checkpoint = trained / "checkpoints" / "step_000006"
    resumed = cli("train", tiny_config, "--work-dir", work_dir, "--resume", checkpoint)
    assert resumed.returncode == 0, resumed.stderr
    assert read_rows(work_dir) == [row for row in read_rows(trained) if row["step"] > 6]
    assert [folder.name for folder in list_checkpoints(work_dir)] == ["step_000012"]
    assert [folder.name for folder in list_checkpoints(work_dir / "earlier-1")] == ["step_000003"]
    assert len(read_rows(work_dir / "earlier-1")) == 4


def test_ctrl_c_under_the_launcher_saves_first(cli, tiny_config, tmp_path):
    work_dir = tmp_path / "run"
    options = ["--cfg-options", "runner.max_iters=2000", "checkpoint_config.interval=1000"]
    process = cli.start("train", tiny_config, "--work-dir", work_dir, *options, processes=2)
    wait_for_step(process, work_dir, 4)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does: everyone gets it, the launcher and each rank
    assert process.wait(60) != 0
    end = time.monotonic() + 30
    while not (work_dir / "summary.json").exists():
        assert time.monotonic() < end, (tmp_path / "started.log").read_text()
        time.sleep(0.2)
    summary = json.loads((work_dir / "summary.json").read_text())
    assert summary["status"] == "stopped"
    assert (work_dir / "checkpoints" / f"step_{summary['steps']:06d}" / "manifest.json").is_file()
