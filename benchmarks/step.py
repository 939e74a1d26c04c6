"""Time and memory of one training step, side by side: ds_seg (ZeRO-3 + DDP head), PyTorch FSDP2, plain DDP.

`--variants ds_seg,ds_seg_compiled,fsdp2_compiled` names others than the three; --policies compares ds_seg alone, once
with every activation checkpointing policy. Of ds_seg, memory and time are compared with what `ds-seg plan` predicts.

Each variant trains the same model from the same weights on the same batches with the same AdamW, in
processes of its own, and they take turns, so that whatever else the machine does falls on all alike.
On the CPU all of them stay up and take turns; on GPUs each is started anew for its turn, because their
memory together would not fit.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from contestant import Contestant
from results import format_table, summarise
from workload import Workload, read_backbone

from ds_seg.errors import UserError
from ds_seg.models.checkpointing import POLICIES, resolve_policy

COMPILED = "_compiled"
Turns = dict[str, list[dict[str, Any]]]
VARIANTS = ("ds_seg", "fsdp2", "ddp", "ds_seg_compiled", "fsdp2_compiled")


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
    parser.add_argument(
        "--variants",
        type=read_variants,
        default=",".join(VARIANTS[:3]),
        metavar="A,B",
        help=f"what is compared, of {', '.join(VARIANTS)}",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    return parser.parse_args()


def read_variants(text: str) -> tuple[str, ...]:
    """The names in a list with commas.

    Raises:
        argparse.ArgumentTypeError: one of them is no variant, or is there twice.
    """
    names = tuple(filter(None, text.split(",")))
    if not names or not set(names) <= set(VARIANTS) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"got {text!r}, want some of {', '.join(VARIANTS)}, each once")
    return names


def list_contestants(args: argparse.Namespace, workload: Workload) -> dict[str, tuple[str, Workload]]:
    """By the name in the table: the variant and what it trains."""
    if args.policies:
        return {policy: ("ds_seg", replace(workload, checkpointing=policy)) for policy in POLICIES}
    return {
        name: (name.removesuffix(COMPILED), replace(workload, compile=name.endswith(COMPILED)))
        for name in args.variants
    }


def measure(args: argparse.Namespace, workload: Workload, folder: Path, turns: Turns) -> None:
    """Let the contestants take turns; one that fails takes no more.

    Args:
        args: the command line.
        workload: what they train.
        folder: where their logs go.
        turns: by name, gets what each turn measured, or why there is nothing.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    contestants = []
    for name, (variant, its_workload) in list_contestants(args, workload).items():
        its_workload.write(folder / name)
        contestants.append(Contestant(name, variant, its_workload, folder / name, store))
    stay_up = workload.device == "cpu"
    with ExitStack() as all_up:
        for round_number in range(args.rounds):
            is_last = round_number == args.rounds - 1
            for contestant in list(contestants):
                with ExitStack() as this_turn:
                    if not stay_up or round_number == 0:
                        (all_up if stay_up else this_turn).enter_context(contestant)
                    try:
                        turn = contestant.take_turn(args.warmup, args.steps, is_last)
                    except RuntimeError as error:
                        print(error, file=sys.stderr, flush=True)
                        turn = {"failed": str(error)}
                        contestants.remove(contestant)
                turns.setdefault(contestant.name, []).append(turn)
            print(f"round {round_number + 1} of {args.rounds} done", file=sys.stderr, flush=True)


def is_complete(its_turns: list[dict[str, Any]]) -> bool:
    """Whether a variant took its last turn, in which memory is measured, or failed."""
    return bool({"memory", "out_of_memory", "failed"} & set(its_turns[-1]))


def main() -> int:
    """Measure, print, write; what was measured until then also if it is told to stop (SIGTERM)."""
    args = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    turns: Turns = {}
    code = 0
    try:
        backbone = read_backbone(args.preset)
        policy = args.checkpointing or resolve_policy(backbone.get("checkpointing"), backbone.get("with_cp"))
        size = (args.crop, args.batch, args.world_size)
        workload = Workload(args.preset, args.depth or backbone.depth, *size, args.device, policy)
        with tempfile.TemporaryDirectory(prefix="ds_seg_bench_") as name:
            folder = Path(name)
            workload.write(folder)
            workload.build_run(folder)  # faults of the command line show here, once, and not in every process
            try:
                measure(args, workload, folder, turns)
            except SystemExit as stopped:
                code = int(stopped.code or 0)
            turns = {variant: its_turns for variant, its_turns in turns.items() if is_complete(its_turns)}
            figures = summarise(workload, folder, turns)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(format_table(figures))
    return code or int(any("failed" in its_turns[-1] for its_turns in turns.values()))


if __name__ == "__main__":
    sys.exit(main())
