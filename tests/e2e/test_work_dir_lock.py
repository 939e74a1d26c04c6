"""Two runs on one work dir: the second is refused, and a crash leaves the way free."""

import os
import signal

from ds_seg.checkpoint.store import checkpoint_step, list_checkpoints
from run_rows import wait_for_step


def test_a_work_dir_in_use_is_refused_and_free_after_a_crash(cli, tiny_config, tmp_path):
    train = ["train", tiny_config, "--work-dir", tmp_path / "run"]
    process = cli.start(*train, "--cfg-options", "runner.max_iters=2000", "checkpoint_config.interval=3")
    wait_for_step(process, tmp_path / "run", 4)
    os.killpg(process.pid, signal.SIGSTOP)  # it keeps its lock, and leaves the processor to the others

    second = cli(*train)
    assert second.returncode == 2 and "Traceback" not in second.stderr, second.stderr
    assert f"in use: process {process.pid} on " in second.stderr and "choose another --work-dir" in second.stderr
    assert not (tmp_path / "run" / "earlier-1").exists()

    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    steps = checkpoint_step(list_checkpoints(tmp_path / "run")[-1]) + 1
    resumed = cli(*train, "--resume", "auto", "--cfg-options", f"runner.max_iters={steps}")
    assert resumed.returncode == 0, resumed.stderr
