"""The processes of one variant of the step benchmark: started, given turns, and ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist
from workload import Workload

_TURN_TIMEOUT_S = 3600.0
_LOG_TAIL_CHARS = 6000


class Contestant:
    """The processes of one variant.

    Args:
        name: what the table calls it.
        variant: `ds_seg` or one of OTHERS.
        workload: what it trains.
        folder: where the workload is written and the log goes.
        store: carries turns to the processes and results back.
    """

    def __init__(self, name: str, variant: str, workload: Workload, folder: Path, store: dist.TCPStore) -> None:
        self.name, self.variant, self.workload, self.folder, self.store = name, variant, workload, folder, store
        self.log = folder / "log.txt"
        self.turns = 0

    def __enter__(self) -> Contestant:
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        if self.workload.device == "cpu":
            environment["DS_ACCELERATOR"] = "cpu"
            environment.setdefault("OMP_NUM_THREADS", "1")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        command += ["--nproc_per_node", str(self.workload.world_size), str(Path(__file__).with_name("step_worker.py"))]
        command += [self.name, self.variant, str(self.folder), str(self.store.port)]
        with self.log.open("a", encoding="utf-8") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self.process.poll() is None:
            self.store.set(f"{self.name}/{self.turns}", "{}")
        else:
            self.process.terminate()
        self.process.wait()
        for turn in range(self.turns + 1):
            self.store.delete_key(f"{self.name}/{turn}")
            self.store.delete_key(f"{self.name}/{turn}/result")
        self.turns = 0

    def take_turn(self, warmup: int, steps: int, measure_more: bool) -> dict[str, Any]:
        """Run steps and return what step_worker measured, or why it could not.

        Args:
            warmup: steps before those that count.
            steps: steps that count.
            measure_more: also measure memory and the phases of a step, which takes three more steps.

        Raises:
            RuntimeError: its processes ended or stayed silent; the message holds the end of their log.
        """
        key = f"{self.name}/{self.turns}"
        self.store.set(key, json.dumps({"warmup": warmup, "steps": steps, "measure_more": measure_more}))
        self.turns += 1
        deadline = time.monotonic() + _TURN_TIMEOUT_S
        while time.monotonic() < deadline:
            for answer in (f"{key}/result", f"{self.name}/failed"):
                if self.store.check([answer]):
                    return json.loads(self.store.get(answer))
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        tail = self.log.read_text(encoding="utf-8", errors="replace")[-_LOG_TAIL_CHARS:]
        raise RuntimeError(
            f"The processes of variant '{self.name}' ended with code {self.process.poll()} in turn {self.turns} and "
            f"gave no result (None: still silent after {_TURN_TIMEOUT_S:.0f} s). The end of their log:\n{tail}"
        )
