"""What a start costs: seconds and processor time from the command to the end of the first step of the demo, by part.

It starts two CPU processes under `deepspeed` (or torchrun, or one alone), and the commands that need no training.
`--against FOLDER` takes turns with another checkout of the project: busy machines slow both. Processor time counts user
and system time of all processes that a command starts.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from prettytable import PrettyTable

ROOT = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).with_name("startup_worker.py")
COMMANDS = {
    "--help": ["--help"],
    "train --help": ["train", "--help"],
    "a wrong path": ["train", "no_such_run"],
    "plan demo": ["plan", "demo", "--gpus", "8", "--force"],
}
"""What a user may wait for beside a training -> the arguments."""
LAUNCHERS = ("deepspeed", "torchrun", "none")


def main() -> None:
    """Measure and print."""
    args = parse_arguments()
    checkouts = {"here": ROOT} | ({"against": args.against.resolve()} if args.against else {})
    starts: dict[str, list[dict[str, Any]]] = {name: [] for name in checkouts}
    commands: dict[str, dict[str, list[dict[str, float]]]] = {name: {} for name in checkouts}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for turn in range(args.warmup + args.repeats):
            for name, checkout in checkouts.items():
                measured = measure_start(checkout, Path(folder), args.launcher, args.processes)
                others = {} if args.only_train else {key: measure(checkout, Path(folder), key) for key in COMMANDS}
                if turn >= args.warmup:
                    starts[name].append(measured)
                    for key, figures in others.items():
                        commands[name].setdefault(key, []).append(figures)
    result = {
        name: {"train": summarise_starts(starts[name]), "commands": summarise_commands(commands[name])}
        for name in checkouts
    }
    print_tables(result)
    if args.json:
        args.json.write_text(
            json.dumps({"launcher": args.launcher, "repeats": args.repeats, **result}, indent=1) + "\n"
        )


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launcher", choices=LAUNCHERS, default="deepspeed", help="default: deepspeed")
    parser.add_argument("--processes", type=int, default=2, help="ranks under a launcher (default: 2)")
    parser.add_argument("--repeats", type=int, default=3, help="turns that count (default: 3)")
    parser.add_argument("--warmup", type=int, default=1, help="turns before, for the caches of files (default: 1)")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="another checkout, measured in turns with this")
    parser.add_argument("--only-train", action="store_true", help="leave out the commands without a training")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    return parser.parse_args()


def prepare(folder: Path) -> None:
    """Draw the images of the demo once, and fewer of them."""
    sys.path.insert(0, str(ROOT))
    from ds_seg.data.demo_scenes import write_demo_dataset

    write_demo_dataset(folder / "data", train_images=16, val_images=4)


def measure_start(checkout: Path, folder: Path, launcher: str, processes: int) -> dict[str, Any]:
    """One start of the demo's training up to the end of its first step."""
    arguments = [str(WORKER), "train", "demo", "--work-dir", str(folder / "run")]
    bin_folder = Path(sys.executable).parent
    command = {
        "none": [sys.executable, *arguments],
        "torchrun": [sys.executable, *f"-m torch.distributed.run --standalone --nproc_per_node {processes}".split()],
        "deepspeed": [
            str(bin_folder / "deepspeed"),
            *f"--log_level error --num_accelerators {processes} --master_port {_free_port()}".split(),
        ],
    }[launcher]
    command += [] if launcher == "none" else arguments
    shutil.rmtree(folder / "run", ignore_errors=True)
    for file in folder.glob("rank*.json"):
        file.unlink()
    began, cpu_s = run(command, checkout, folder)
    ranks = [json.loads(file.read_text()) for file in sorted(folder.glob("rank*.json"))]
    assert len(ranks) == (1 if launcher == "none" else processes), f"{command} did not get to a first step"
    first = ranks[0]
    parts = {"launcher": [first["began"] - began, cpu_s - sum(rank["cpu_s"] for rank in ranks)]}
    parts |= {"python itself": [0.0, first["python_cpu_s"]], **first["parts"]}
    return {
        "wall_s": first["ended"] - began,
        "cpu_s": cpu_s,
        "rank_cpu_s": statistics.mean(rank["cpu_s"] for rank in ranks),
        "parts": parts,
        "loaded": first["loaded"],
    }


def measure(checkout: Path, folder: Path, key: str) -> dict[str, float]:
    """One run of a command that trains nothing."""
    began, cpu_s = run([sys.executable, "-m", "ds_seg", *COMMANDS[key]], checkout, folder)
    return {"wall_s": time.time() - began, "cpu_s": cpu_s}


def run(command: list[str], checkout: Path, folder: Path) -> tuple[float, float]:
    """Run a command; when it began, and the processor seconds of all its processes."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment |= {"WANDB_MODE": "disabled", "DS_SEG_DEMO_ROOT": str(folder / "data"), "STARTUP_OUT": str(folder)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    began = time.time()
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 2):
        sys.exit(f"{command} failed:\n{(folder / 'log').read_text()[-3000:]}")
    return began, used.ru_utime + used.ru_stime


def summarise_starts(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the turns, in all and by part."""
    names = list(dict.fromkeys(name for turn in turns for name in turn["parts"]))
    parts = {
        name: {
            key: round(statistics.median(turn["parts"].get(name, [0.0, 0.0])[index] for turn in turns), 3)
            for index, key in enumerate(("wall_s", "cpu_s"))
        }
        for name in names
    }
    totals = {
        key: round(statistics.median(turn[key] for turn in turns), 2) for key in ("wall_s", "cpu_s", "rank_cpu_s")
    }
    return {**totals, "parts": parts, "loaded": turns[0]["loaded"]}


def summarise_commands(turns: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Medians over the turns of each command."""
    return {
        name: {key: round(statistics.median(one[key] for one in figures), 2) for key in ("wall_s", "cpu_s")}
        for name, figures in turns.items()
    }


def print_tables(result: dict[str, Any]) -> None:
    """Two tables: the parts of a training's start, and the other commands."""
    headings = [f"{kind}, {name}" if len(result) > 1 else kind for name in result for kind in ("wall s", "CPU s")]
    first, second = PrettyTable(["part of rank 0", *headings]), PrettyTable(["command", *headings])
    starts, commands = ([side[key] for side in result.values()] for key in ("train", "commands"))
    parts = dict.fromkeys(part for start in starts for part in start["parts"])
    for part in sorted(parts, key=lambda part: -starts[-1]["parts"].get(part, {"cpu_s": 0.0})["cpu_s"]):
        first.add_row([part, *_cells([start["parts"].get(part) for start in starts])])
    first.add_row(["a rank in all", *(cell for start in starts for cell in ("", f"{start['rank_cpu_s']:.2f}"))])
    first.add_row(["all processes", *_cells(starts)])
    print(first)
    for name, side in result.items():
        print(f"large parts of libraries in a rank of '{name}': {', '.join(side['train']['loaded']) or 'none'}")
    for name in commands[0]:
        second.add_row([f"ds-seg {name}", *_cells([side[name] for side in commands])])
    if commands[0]:
        print(second)


def _cells(figures: list[dict[str, float] | None]) -> list[str]:
    return [f"{one[key]:.2f}" if one else "" for one in figures for key in ("wall_s", "cpu_s")]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    main()
