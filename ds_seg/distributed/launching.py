"""Start processes on this machine alone, on the GPUs that the shell chose: what `launch/train.sh` and the demo run.

DeepSpeed's front end `deepspeed` deletes CUDA_VISIBLE_DEVICES when it is told how many processes to start, and can't
read UUIDs in it (DeepSpeed 0.19.8). What it starts on each machine takes a list of either kind.
"""

from __future__ import annotations

import base64
import json
import os
import sys

from ds_seg.distributed.printing import notify
from ds_seg.distributed.world import free_port
from ds_seg.errors import UserError


def list_gpus() -> list[str]:
    """The GPUs of this machine as CUDA_VISIBLE_DEVICES names them; none where processes are to compute on CPUs."""
    import torch

    found = 0 if os.environ.get("DS_ACCELERATOR") == "cpu" else torch.cuda.device_count()
    chosen = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return (chosen or [str(index) for index in range(found)])[:found]


def build_launcher(processes: int, gpus: list[str]) -> list[str]:
    """The command that starts so many processes of ds_seg, up to ds_seg's own arguments.

    Args:
        processes: how many.
        gpus: of `list_gpus`; the first of them are used.
    """
    world = {"localhost": gpus[:processes] or [str(index) for index in range(processes)]}
    return [
        *(sys.executable, "-m", "deepspeed.launcher.launch", "--log_level=error"),
        f"--world_info={base64.urlsafe_b64encode(json.dumps(world).encode()).decode()}",
        f"--master_port={os.environ.get('MASTER_PORT') or free_port()}",
        *("--module", "ds_seg"),
    ]


def count_processes(gpus: list[str]) -> int:
    """NUM_GPUS, or one process a GPU; one process where there is none.

    Raises:
        UserError: NUM_GPUS is no such number.
    """
    asked = os.environ.get("NUM_GPUS")
    if not asked:
        return max(1, len(gpus))
    if not asked.isdecimal() or int(asked) == 0 or (gpus and int(asked) > len(gpus)):
        there = f"1 to {len(gpus)}, which this shell sees (CUDA_VISIBLE_DEVICES)" if gpus else "1 or more"
        raise UserError(f"NUM_GPUS={asked}: want a number of processes, {there}. Leave it out for all GPUs.")
    return int(asked)


if __name__ == "__main__":
    gpus = list_gpus()
    try:
        processes = count_processes(gpus)
    except UserError as error:
        notify(str(error))
        sys.exit(error.exit_code)
    command = [*build_launcher(processes, gpus), *sys.argv[1:]]
    os.execv(command[0], command)
