"""Time and memory of one training step, side by side: ds_seg (ZeRO-3 + DDP head), PyTorch FSDP2, plain DDP.

With --policies: ds_seg alone, once with every activation checkpointing policy.

Each variant trains the same model from the same weights on the same batches with the same AdamW, in
processes of its own, and they take turns, so that whatever else the machine does falls on all alike.
On the CPU all of them stay up and take turns; on GPUs each is started anew for its turn, because their
memory together would not fit.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from figures import compute_flops, compute_ratios, find_peak_tflops, summarise_variant
from prettytable import PrettyTable
from workload import Workload, read_backbone

from ds_seg.errors import UserError
from ds_seg.models.checkpointing import POLICIES, resolve_policy
from ds_seg.planning.flops import compute_tokens

COMPILED = "_compiled"
OTHERS = ("fsdp2", "ddp")
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
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
        command += [str(self.workload.world_size), str(Path(__file__).with_name("step_worker.py"))]
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

    def take_turn(self, warmup: int, steps: int, measure_memory: bool) -> dict[str, Any]:
        """Run steps and return what step_worker measured, or why it could not.

        Args:
            warmup: steps before those that count.
            steps: steps that count.
            measure_memory: also measure memory, which takes another step.

        Raises:
            RuntimeError: its processes ended or stayed silent; the message holds the end of their log.
        """
        key = f"{self.name}/{self.turns}"
        self.store.set(key, json.dumps({"warmup": warmup, "steps": steps, "measure_memory": measure_memory}))
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


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--preset", default="internvit_tiny", help="a file of ds_configs/models, without .py")
    parser.add_argument("--depth", type=int, help="blocks of the backbone instead of the preset's own number")
    parser.add_argument("--crop", type=int, default=224, help="side of a crop in pixels, a multiple of the patch")
    parser.add_argument("--batch", type=int, default=2, help="crops a process")
    parser.add_argument("--world-size", type=int, default=2, help="processes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5, help="turns that each variant takes")
    parser.add_argument("--steps", type=int, default=6, help="measured steps a turn")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them that don't count")
    compared = parser.add_mutually_exclusive_group()
    compared.add_argument("--checkpointing", choices=POLICIES, help="of all variants instead of the preset's own")
    compared.add_argument("--policies", action="store_true", help="compare ds_seg's checkpointing policies")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    return parser.parse_args()


def list_contestants(policies: bool, workload: Workload) -> dict[str, tuple[str, Workload]]:
    """By the name in the table: the variant and what it trains."""
    if policies:
        return {policy: ("ds_seg", replace(workload, checkpointing=policy)) for policy in POLICIES}
    return {
        name: (name.removesuffix(COMPILED), replace(workload, compile=name.endswith(COMPILED)))
        for name in ("ds_seg", "fsdp2", "ddp", "ds_seg_compiled", "fsdp2_compiled")
    }


def measure(args: argparse.Namespace, workload: Workload, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Let the contestants take turns; by name, what each turn measured."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    contestants = []
    for name, (variant, its_workload) in list_contestants(args.policies, workload).items():
        its_workload.write(folder / name)
        contestants.append(Contestant(name, variant, its_workload, folder / name, store))
    turns: dict[str, list[dict[str, Any]]] = {contestant.name: [] for contestant in contestants}
    stay_up = workload.device == "cpu"
    with ExitStack() as all_up:
        for round_number in range(args.rounds):
            is_last = round_number == args.rounds - 1
            for contestant in contestants:
                with ExitStack() as this_turn:
                    if not stay_up or round_number == 0:
                        (all_up if stay_up else this_turn).enter_context(contestant)
                    turns[contestant.name].append(contestant.take_turn(args.warmup, args.steps, is_last))
            print(f"round {round_number + 1} of {args.rounds} done", file=sys.stderr, flush=True)
    return turns


def summarise(workload: Workload, folder: Path, turns: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """All figures of the run, as they go to the JSON file."""
    backbone = workload.build_run(folder).model.backbone
    on_cpu = workload.device == "cpu"
    device_name = platform.processor() or platform.machine() if on_cpu else torch.cuda.get_device_name()
    global_batch = workload.batch * workload.world_size
    flops_per_device = compute_flops(backbone, workload.crop_px) * workload.batch
    variants: dict[str, dict[str, Any]] = {}
    for name, its_turns in turns.items():
        failed = next((turn for turn in its_turns if "out_of_memory" in turn), None)
        variants[name] = failed or summarise_variant(
            its_turns, global_batch, flops_per_device, find_peak_tflops(device_name)
        )
        variants[name]["checkpointing"] = Workload.read(folder / name).checkpointing
    pairs = (
        [*(("ds_seg", other) for other in OTHERS), ("ds_seg_compiled", "fsdp2_compiled")]
        if "ds_seg" in turns
        else [(p, "none") for p in POLICIES[1:]]
    )
    memory_key = "resident_gib" if on_cpu else "gpu_gib"
    return {
        "workload": {key: value for key, value in asdict(workload).items() if key != "checkpointing"},
        "device_name": device_name,
        "torch": torch.__version__,
        "global_batch": global_batch,
        "tokens": compute_tokens((workload.crop_px, workload.crop_px), int(backbone.get("patch_size", 14))),
        "tflop_per_image": compute_flops(backbone, workload.crop_px) / 1e12,
        "memory_key": memory_key,
        "variants": variants,
        "ratios": compute_ratios(variants, pairs, memory_key),
    }


def format_table(figures: dict[str, Any]) -> str:
    """The figures as text."""
    columns = [
        "variant",
        "step s",
        "min",
        "max",
        "CPU s",
        "images/s",
        "MFU",
        "memory GiB",
        "step's",
        "loss first",
        "last",
    ]
    table = PrettyTable(columns)
    table.align = "r"
    table.align["variant"] = "l"
    for name, row in figures["variants"].items():
        if "out_of_memory" in row:
            table.add_row([name, "out of memory", *["-"] * (len(columns) - 2)])
            continue
        times = [f"{row[key]:.3f}" for key in ("step_s", "step_s_min", "step_s_max", "cpu_s")]
        mfu = "-" if row["mfu"] is None else f"{row['mfu']:.1%}"
        memory = [f"{row['memory'][key]:.3f}" for key in (figures["memory_key"], "step_gib")]
        losses = [f"{row[key]:.4f}" for key in ("loss_first", "loss_last")]
        table.add_row([name, *times, f"{row['images_per_s']:.2f}", mfu, *memory, *losses])
    ratios = "  ".join(f"{k} {'-' if v is None else format(v, '.3f')}" for k, v in figures["ratios"].items())
    return f"{table.get_string()}\nratios: {ratios}"


def main() -> int:
    """Measure, print, write."""
    args = parse_arguments()
    try:
        backbone = read_backbone(args.preset)
        policy = args.checkpointing or resolve_policy(backbone.get("checkpointing"), backbone.get("with_cp"))
        size = (args.crop, args.batch, args.world_size)
        workload = Workload(args.preset, args.depth or backbone.depth, *size, args.device, policy)
        with tempfile.TemporaryDirectory(prefix="ds_seg_bench_") as name:
            folder = Path(name)
            workload.write(folder)
            workload.build_run(folder)  # faults of the command line show here, once, and not in every process
            figures = summarise(workload, folder, measure(args, workload, folder))
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(format_table(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
