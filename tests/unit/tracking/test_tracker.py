"""The tracker hands every fact to metrics.jsonl, the console and the pictures, on the main rank only."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from disks import fill, read_only, small_disk
from ds_seg import distributed
from ds_seg.config.hooks import WandbSettings
from ds_seg.evaluation.pictures import load_rgb
from ds_seg.tracking.metrics_log import read_metrics
from ds_seg.tracking.tracker import build_tracker

from mmcv import Config  # isort: skip


def build(work_dir, *, resume_step=0, log_interval=5):
    run = SimpleNamespace(
        name="tiny",
        work_dir=work_dir,
        mmseg=Config(),
        deepspeed={},
        schedule=SimpleNamespace(max_steps=12),
        log_interval_steps=log_interval,
        wandb=WandbSettings(enabled=False),
    )
    return build_tracker(run, resume_step, ("road", "sky"), [[200, 0, 0], [0, 200, 0]])


def test_the_first_the_last_and_every_fifth_step_are_recorded(tmp_path, capsys):
    tracker = build(tmp_path)
    for step in range(1, 13):
        tracker.log_step({"step": step, "loss": 1.0 / step})
    tracker.close("done")

    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 5, 10, 12]
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["1/12", "5/12", "10/12", "12/12"]


def test_a_resumed_tracker_continues_the_file(tmp_path):
    for first, last, resume_step in ((1, 8, 0), (6, 12, 5)):
        tracker = build(tmp_path / "resumed", resume_step=resume_step, log_interval=1)
        for step in range(first, last + 1):
            tracker.log_step({"step": step})
        tracker.close("done")

    assert [row["step"] for row in read_metrics(tmp_path / "resumed" / "metrics.jsonl")] == list(range(1, 13))


def test_an_evaluation_is_a_row_and_a_table(tmp_path, capsys):
    tracker = build(tmp_path)
    tracker.info("hello")
    tracker.warn("careful")
    tracker.log_evaluation(10, {"eval/mIoU": 0.5, "eval/IoU/sky": None}, "| a table |")
    tracker.close("done")

    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 10, "eval/mIoU": 0.5, "eval/IoU/sky": None}]
    assert capsys.readouterr().out == "hello\nwarning: careful\nevaluation at step 10\n| a table |\n"


def test_pictures_are_files_named_after_their_image(tmp_path):
    tracker = build(tmp_path)
    ids = np.ones((40, 60), np.uint8)
    tracker.log_pictures(10, [("scene_1", np.zeros((40, 60, 3), np.uint8), ids, ids)])
    tracker.close("done")

    assert load_rgb(tmp_path / "predictions" / "scene_1.png").shape[1] == 3 * 330 + 10


def test_a_full_disk_costs_records_and_two_lines(tmp_path, capsys):
    ids = np.ones((40, 60), np.uint8)
    with small_disk(tmp_path / "disk", size_mib=0.2) as disk:
        tracker = build(disk, log_interval=1)
        ballast = fill(disk)
        for step in range(1, 101):
            tracker.log_step({"step": step, "loss": 1.0, "note": "x" * 100})
        tracker.log_pictures(10, [(name, np.zeros((40, 60, 3), np.uint8), ids, ids) for name in "ab"])
        assert not tracker.write("reports", lambda: (disk / "report.html").write_text("text"))
        ballast.unlink()
        assert tracker.write("reports", lambda: (disk / "report.html").write_text("text"))
        tracker.log_step({"step": 101})
        tracker.close("done")

        kept = [row["step"] for row in read_metrics(disk / "metrics.jsonl")]
        assert kept[-1] == 101 and kept[:-1] == list(range(1, len(kept))) and not list((disk / "predictions").iterdir())
    lost = {"rows of metrics.jsonl": 101 - len(kept), "pictures": 2, "reports": 1}
    assert tracker.lost == lost and lost["rows of metrics.jsonl"] > 50
    first, last = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert first.startswith(
        "warning: rows of metrics.jsonl can't be written ([Errno 28] No space left on device). Training"
    )
    assert last == (
        f"warning: lost because they could not be written: 2 pictures, 1 reports, {lost['rows of metrics.jsonl']} "
        "rows of metrics.jsonl"
    )


def test_a_read_only_predictions_folder_costs_the_pictures(tmp_path, capsys):
    ids = np.ones((40, 60), np.uint8)
    (tmp_path / "predictions").mkdir()
    tracker = build(tmp_path)
    with read_only(tmp_path / "predictions"):
        tracker.log_pictures(10, [("a", np.zeros((40, 60, 3), np.uint8), ids, ids)])
    tracker.close("done")
    assert tracker.lost == {"pictures": 1}
    assert "warning: pictures can't be written ([Errno 30] Read-only file system" in capsys.readouterr().out


def test_other_ranks_do_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    tracker = build(tmp_path / "work")
    tracker.info("hello")
    tracker.warn("careful")
    tracker.log_step({"step": 1})
    tracker.log_evaluation(1, {}, "")
    tracker.log_pictures(1, [("a", np.zeros((1, 1, 3), np.uint8), np.zeros((1, 1)), None)])
    tracker.rewind(0)
    assert not tracker.write("reports", lambda: 1 / 0) and tracker.lost == {}
    tracker.close("done")

    assert not (tmp_path / "work").exists()
    assert capsys.readouterr().out == ""


def test_wandb_gets_everything_and_the_status(tmp_path):
    class Recorder:
        def __init__(self):
            self.calls = []

        def __getattr__(self, name):
            return lambda *args, **kwargs: self.calls.append((name, args, kwargs))

    tracker = build(tmp_path)
    tracker._wandb = recorder = Recorder()
    tracker.log_step({"step": 5})
    tracker.log_evaluation(5, {"eval/mIoU": 0.5}, "")
    tracker.log_pictures(5, [])
    tracker.close("stopped")

    assert [name for name, _, _ in recorder.calls] == ["log_step", "log_evaluation", "log_pictures", "finish"]
    assert recorder.calls[-1][1] == ("stopped",)
