"""Arguments that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ds_seg.config import RunOptions

CHECKPOINT_HELP = (
    "a checkpoint folder, a work dir (its newest one), or a weight file or HuggingFace folder with backbone and head"
)

_ELSEWHERE = {
    **dict.fromkeys(("--options", "--eval-options"), "--cfg-options"),
    **dict.fromkeys(("--gpus", "--gpu-id", "--gpu-ids"), "CUDA_VISIBLE_DEVICES"),
    **dict.fromkeys(("--show", "--show-dir", "--format-only"), "ds-seg predict CONFIG CHECKPOINT INPUT --out DIR"),
    "--launcher": "not needed",
    "--eval": "not needed (every score is computed)",
    "--aug-test": "--tta",
    "--auto-resume": "--resume auto",
    "--resume-from": "--resume step_001000",
}
"""Options of MMSegmentation 0.x -> what there is in their place."""


def describe_unknown_arguments(arguments: Sequence[str]) -> str:
    """What is said of arguments that the command doesn't take, with what MMSegmentation's options are called here."""
    names = dict.fromkeys(argument.partition("=")[0] for argument in arguments)
    known = [f"{name} of MMSegmentation is {_ELSEWHERE[name]} here." for name in names if name in _ELSEWHERE]
    return ". ".join([f"unrecognized arguments: {' '.join(arguments)}", *([" ".join(known)] if known else [])])


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG and what changes it."""
    parser.add_argument(
        "config", metavar="CONFIG", help="path of an MMSeg 0.x config, or the name of a run in ds_configs/runs"
    )
    parser.add_argument(
        "--deepspeed-config", metavar="F", help="DeepSpeed JSON (default: the config's, else zero3_bf16.json)"
    )
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        metavar="K=V",
        default=[],
        help="change config values, as in MMSeg: optimizer.lr=1e-4 data.samples_per_gpu=4",
    )


def run_options(args: argparse.Namespace) -> RunOptions:
    """The parsed arguments as options of a run."""
    from ds_seg.config import RunOptions
    from ds_seg.config.overrides import parse_overrides

    return RunOptions(
        config=args.config,
        deepspeed_config=args.deepspeed_config,
        work_dir=getattr(args, "work_dir", None),
        resume=getattr(args, "resume", None),
        load_from=getattr(args, "load_from", None),
        seed=getattr(args, "seed", None),
        on_divergence=getattr(args, "on_divergence", None),
        checkpoint=getattr(args, "checkpoint", "sync"),
        compile=getattr(args, "compile", False),
        max_time=getattr(args, "max_time", None),
        watchdog_timeout_s=getattr(args, "watchdog_timeout", None),
        cfg_options=parse_overrides(args.cfg_options),
    )
