"""Runs the command line as a user does: in processes of its own, started by a real launcher."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import psutil

from ds_seg.distributed import free_port

BIN = Path(sys.executable).parent
TINY = """
_base_ = {base!r}
model = dict(
    backbone=dict(embed_dim=48, depth=2, num_heads=2, img_size=56, drop_path_rate=0.2, out_indices=[1]),
    decode_head=dict(in_channels=48, channels=48, dropout_ratio=0.1),
)
runner = dict(max_iters=12)
lr_config = dict(warmup_iters=3)
log_config = dict(interval=1)
checkpoint_config = dict(interval=6)
evaluation = dict(interval=12)
"""


def command(processes: int, *arguments: str, launcher: str) -> list[str]:
    """The command line for so many processes: alone, or under a launcher (torchrun starts sooner than deepspeed)."""
    if processes == 1:
        return [sys.executable, "-m", "ds_seg", *arguments]
    if launcher == "torchrun":
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        return [*torchrun, "-m", "ds_seg", *arguments]
    deepspeed = [str(BIN / "deepspeed"), "--master_port", str(free_port()), "--num_accelerators", str(processes)]
    return [*deepspeed, "--module", "ds_seg", *arguments]


def environment(device: str = "cpu", **extra: str) -> dict[str, str]:
    """This process's environment for runs on a device, `cpu` or `cuda`."""
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "DS_ACCELERATOR": device, "OMP_NUM_THREADS": "1", "PATH": path, **extra}


class Cli:
    """Runs `ds-seg` in a folder, on generated images."""

    def __init__(self, folder: Path, data_root: Path) -> None:
        self.folder = folder
        self.started: list[subprocess.Popen] = []
        self.env = environment(DS_SEG_DEMO_ROOT=str(data_root), WANDB_MODE="disabled")

    def __call__(
        self, *arguments: object, processes: int = 1, launcher: str = "deepspeed", timeout_s: float = 180
    ) -> subprocess.CompletedProcess:
        """Run to the end and keep what it printed."""
        return subprocess.run(
            command(processes, *map(str, arguments), launcher=launcher),
            cwd=self.folder,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )

    def start(self, *arguments: object, processes: int = 1, launcher: str = "deepspeed") -> subprocess.Popen:
        """Start and return at once; output goes to a file beside."""
        with (self.folder / "started.log").open("w") as log:
            process = subprocess.Popen(
                command(processes, *map(str, arguments), launcher=launcher),
                cwd=self.folder,
                env=self.env,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def kill_started(self) -> None:
        """Kill what a failed test has left running."""
        for process in self.started:
            if process.poll() is None:
                for left in [*psutil.Process(process.pid).children(recursive=True), process]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        left.kill()
