"""A run is stopped in the worst moments, by every launcher's death and by the clock, and goes on as if nothing was."""

import contextlib
import json
import re
import signal
import time
from pathlib import Path

import psutil
import pytest

from run_rows import read_rows, wait_for_step

HANGING = """
from ds_configs.pipelines import keep_ratio, test_pipeline, train_pipeline

_base_ = {base!r}
custom_imports = dict(imports=['hanging_step'])
trained = train_pipeline(None, 112, reduce_zero_label=True, ratio_range=(0.8, 1.25), colours=False)
data = dict(
    train=dict(pipeline=[dict(type='HangWhen', flag={folder!r} + '/train', rank=1), *trained]),
    val=dict(pipeline=[dict(type='HangWhen', flag={folder!r} + '/val', rank=1), *test_pipeline(None, *keep_ratio())]),
)
checkpoint_config = dict(interval=1000)
evaluation = dict(interval=8)
"""


@pytest.fixture
def hanging(cli, tiny_config, tmp_path):
    """A config whose data hang on rank 1, in training or in the evaluation, once a file is there."""
    cli.env["PYTHONPATH"] = f"{Path(__file__).parent}:{cli.env.get('PYTHONPATH', '')}"
    path = tmp_path / "hanging.py"
    path.write_text(HANGING.format(base=str(tiny_config), folder=str(tmp_path)))
    return path


def test_a_signal_after_the_last_step_does_not_keep_a_run_from_ending(cli, tiny_config, tmp_path):
    cli.env["PYTHONPATH"] = f"{Path(__file__).parent}:{cli.env.get('PYTHONPATH', '')}"
    config = tmp_path / "signalled.py"
    imports = dict(imports=["signal_in_report"])
    config.write_text(f"_base_ = {str(tiny_config)!r}\ncustom_imports = {imports}\nrunner = dict(max_iters=2)\n")
    done = cli("train", config, "--work-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "SIGTERM on rank 0 (writing the summary and the report)" in done.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "completed"


def wait_for_file(path, process, log, timeout_s=240):
    end = time.monotonic() + timeout_s
    while not path.exists():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.05)
    path.unlink()


def wait_until_gone(processes, log, timeout_s=60):
    _, alive = psutil.wait_procs(processes, timeout=timeout_s)
    assert not alive, f"{alive} are left\n{log.read_text()}"


def test_stops_in_a_data_stall_and_in_an_evaluation_change_nothing(cli, hanging, tmp_path):
    straight, stopped, log = tmp_path / "straight", tmp_path / "stopped", tmp_path / "started.log"
    assert cli("train", hanging, "--work-dir", straight, processes=2, launcher="torchrun").returncode == 0

    # rank 1 waits for its data, rank 0 for rank 1, and the launcher just dies of the signal
    process = cli.start("train", hanging, "--work-dir", stopped, processes=2)
    wait_for_step(process, stopped, 3)
    (tmp_path / "train").touch()
    wait_for_file(tmp_path / "train_loads_1", process, log)
    everything = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) != 0
    wait_until_gone(everything, log)
    (tmp_path / "train").unlink()
    summary = json.loads((stopped / "summary.json").read_text())
    assert summary["status"] == "stopped" and 3 <= summary["steps"] < 8
    assert re.search(r"because of the end of its launcher|SIGTERM on rank", log.read_text())

    # rank 1 hangs in the evaluation after step 8, rank 0 gets the signal
    (tmp_path / "val").touch()
    resume = ("train", hanging, "--work-dir", stopped, "--resume", "auto")
    process = cli.start(*resume, processes=2, launcher="torchrun")
    wait_for_file(tmp_path / "val_loads_0", process, log)
    wait_for_file(tmp_path / "val_loads_1", process, log)
    everything = psutil.Process(process.pid).children(recursive=True)
    first = next(child for child in everything if child.environ().get("RANK") == "0")
    signalled = time.monotonic()
    first.send_signal(signal.SIGUSR1)
    wait_until_gone(everything, log)
    assert time.monotonic() - signalled < 20
    (tmp_path / "val").unlink()
    summary = json.loads((stopped / "summary.json").read_text())
    assert (summary["status"], summary["steps"], summary["mIoU"]) == ("stopped", 8, None)
    text = log.read_text()
    assert re.search(r"SIGUSR1 on rank 0 \((the images of )?window batch \d+ of an evaluation\): all ranks stop", text)
    assert "Stopped by SIGUSR1 on rank 0 after step 8 of 12" in text
    assert re.search(r"It took \d+\.\d s from the signal to the end\.", text)

    done = cli(*resume, processes=2, launcher="torchrun")
    assert done.returncode == 0, done.stderr
    assert read_rows(stopped) == read_rows(straight)


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_ranks_end_with_a_launcher_that_is_killed_while_they_start(cli, tiny_config, tmp_path, launcher):
    process = cli.start("train", tiny_config, "--work-dir", tmp_path / "work", processes=2, launcher=launcher)
    end = time.monotonic() + 120
    while len(ranks := find_ranks(process.pid)) < 2:
        assert process.poll() is None and time.monotonic() < end, (tmp_path / "started.log").read_text()
        time.sleep(0.05)
    psutil.Process(ranks[0].ppid()).kill()
    wait_until_gone(ranks, tmp_path / "started.log", timeout_s=30)
    process.wait(30)


def find_ranks(pid):
    """The processes below a launcher that are ranks; others come and go while it starts."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [child] if "LOCAL_RANK" in child.environ() else []
    return found


def test_a_hung_data_worker_ends_the_run_with_its_stacks_and_leaves_no_process(cli, hanging, tmp_path):
    hanging.write_text(hanging.read_text().replace("rank=1", "rank=0"))
    (tmp_path / "train").touch()
    process = cli.start("train", hanging, "--work-dir", tmp_path / "run", "--watchdog-timeout", "3")
    wait_for_file(tmp_path / "train_loads_0", process, tmp_path / "started.log")
    workers = psutil.Process(process.pid).children(recursive=True)
    assert process.wait(60) == 1
    wait_until_gone(workers, tmp_path / "started.log", timeout_s=5)
    text = (tmp_path / "started.log").read_text()
    assert re.search(r"rank 0: no progress for \d+ s in: waiting for the data of step 1 \(for", text)
    assert "--watchdog-timeout 3 s" in text
    assert "Thread" in (tmp_path / "run" / "stacks" / "rank_00000.txt").read_text()


def test_a_stopped_rank_0_under_torchrun_is_killed_and_not_waited_for(cli, tiny_config, tmp_path):
    """Left alone, torchrun would send it SIGTERM, and SIGKILL 30 s later."""
    options = (
        "--watchdog-timeout",
        "5",
        "--cfg-options",
        "runner.max_iters=100000",
        "checkpoint_config.interval=100000",
    )
    process = cli.start(
        "train", tiny_config, "--work-dir", tmp_path / "run", *options, processes=2, launcher="torchrun"
    )
    wait_for_step(process, tmp_path / "run", 3)
    everything = psutil.Process(process.pid).children(recursive=True)
    first = next(child for child in everything if child.environ().get("RANK") == "0")
    first.suspend()
    stopped = time.monotonic()
    wait_until_gone(everything, tmp_path / "started.log")
    assert 4 < time.monotonic() - stopped < 5 + 15
    assert process.wait(10) == 1
    assert "rank 0: no heartbeat for 5 s" in (tmp_path / "started.log").read_text()


def test_max_time_ends_a_run_before_it_is_over(cli, tiny_config, tmp_path):
    limit_s = 40
    started = time.monotonic()
    options = ["--cfg-options", "runner.max_iters=100000", "checkpoint_config.interval=100000"]
    done = cli("train", tiny_config, "--work-dir", tmp_path / "run", "--max-time", f"00:00:{limit_s}", *options)
    assert done.returncode == 75, done.stderr
    assert time.monotonic() - started < limit_s
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "stopped" and summary["steps"] > 0
    assert re.search(r"Stopped by --max-time \(40 s, of which the end gets \d+ s: a step takes up to", done.stderr)
