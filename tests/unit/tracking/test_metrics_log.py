"""metrics.jsonl: a resumed run's file equals that of a run that never stopped."""

from __future__ import annotations

import pytest

from disks import fill, small_disk
from ds_seg.errors import DataError
from ds_seg.tracking.metrics_log import MetricsLog, read_metrics


def make_row(step):
    return {"step": step, "loss": 1 / (step + 3)}


def log_steps(path, steps, resume_step=0):
    log = MetricsLog(path, resume_step)
    for step in steps:
        log.append(make_row(step))
    log.close()


def test_a_resumed_file_equals_an_uninterrupted_one(tmp_path):
    log_steps(tmp_path / "through.jsonl", range(1, 11))
    log_steps(tmp_path / "stopped.jsonl", range(1, 8))
    with (tmp_path / "stopped.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # killed while writing
    log_steps(tmp_path / "stopped.jsonl", range(6, 11), resume_step=5)

    assert (tmp_path / "stopped.jsonl").read_bytes() == (tmp_path / "through.jsonl").read_bytes()


def test_a_row_without_its_line_end_is_left_out_for_the_next_would_continue_its_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    log_steps(tmp_path / "metrics.jsonl", [3], resume_step=2)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 3]


def test_an_evaluation_that_is_made_again_is_forgotten_alone(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    rows = [make_row(1), {"step": 1, "eval/mIoU": 0.1}, make_row(2), {"step": 2, "eval/mIoU": 0.2}]
    for row in rows:
        log.append(row)
    for _ in range(2):
        log.rewind(2, evaluated=False)
        assert read_metrics(log.path) == rows[:3]
    log.close()


def test_a_run_resumed_before_its_first_step_forgets_all_rows_and_leaves_no_other_file(tmp_path):
    log_steps(tmp_path / "metrics.jsonl", [1, 2])
    log_steps(tmp_path / "metrics.jsonl", [1])

    assert read_metrics(tmp_path / "metrics.jsonl") == [make_row(1)]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_every_row_is_on_disk_at_once_and_nan_is_null(tmp_path):
    log = MetricsLog(tmp_path / "deep" / "metrics.jsonl")
    log.append({"step": 1, "loss": float("nan")})

    assert read_metrics(log.path) == [{"step": 1, "loss": None}]
    log.close()
    log.close()


def test_a_full_disk_leaves_whole_rows_and_takes_more_once_there_is_space(tmp_path):
    with small_disk(tmp_path / "disk", size_mib=0.1) as disk:
        log = MetricsLog(disk / "metrics.jsonl")
        log.append(make_row(1))
        ballast = fill(disk)
        with pytest.raises(OSError, match="No space left"):
            for step in range(2, 2000):  # the file's own last block has room for some
                log.append(make_row(step))
        before = read_metrics(log.path)
        log.rewind(1)
        ballast.unlink()
        log.append(make_row(7))

        assert [row["step"] for row in before] == list(range(1, len(before) + 1)) and len(before) > 1
        assert read_metrics(log.path) == [make_row(1), make_row(7)]
        log.close()


def test_without_a_file_there_are_no_rows(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("line", ["not json", "[1]", '{"loss": 1}'])
def test_a_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + line + '\n{"step": 3}\n')

    with pytest.raises(DataError, match=r"metrics\.jsonl line 2 is not a JSON object with a step: .*Delete the line"):
        read_metrics(path)


def test_a_row_without_a_step_is_our_own_fault(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    with pytest.raises(AssertionError, match=r"a row of metrics\.jsonl has no step: \{'loss': 1\}"):
        log.append({"loss": 1})
    log.close()
