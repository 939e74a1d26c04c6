"""Entry point: `ds-seg` and `python -m ds_seg`, alone or under any launcher."""

from __future__ import annotations

import argparse
import gc
import os
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

from ds_seg import __version__
from ds_seg.collector import pause_collector
from ds_seg.errors import EXIT_FAULT, EXIT_INTERRUPTED, DsSegError, UserError, describe_fault

_REPORT_WAIT_S = 10.0

# torch is imported inside the functions: a process that multiprocessing spawns imports this module once more.


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, run the command, and end the process with its exit code."""
    pause_collector()
    try:
        _run_command(sys.argv[1:] if argv is None else argv)
    finally:
        gc.enable()  # a command that failed has not done so


def _run_command(argv: Sequence[str]) -> None:
    _hush_third_parties()
    from ds_seg import distributed
    from ds_seg.commands import add_commands
    from ds_seg.commands.arguments import describe_unknown_arguments
    from ds_seg.tracking.console import LastingStream

    _open_missing_streams()
    sys.stdout, sys.stderr = LastingStream(sys.stdout), LastingStream(sys.stderr)

    parser = argparse.ArgumentParser(
        prog="ds-seg",
        description="Full-parameter fine-tuning of InternViT-6B for semantic segmentation: a ZeRO-3 backbone and a "
        "replicated FP32 MMSegmentation head.",
        epilog="One process: ds-seg train RUN. Several: deepspeed --module ds_seg train RUN, or torchrun "
        "--nproc_per_node N -m ds_seg train RUN. See `ds-seg COMMAND --help` for the options of each.",
    )
    parser.add_argument("--version", action="version", version=f"ds_seg {__version__}")
    parser.add_argument("--local-rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    add_commands(parser)
    _refuse_empty(parser, argv)
    args, unknown = parser.parse_known_args(_with_hyphens(argv))
    if unknown:
        parser.error(describe_unknown_arguments(unknown))
    if args.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    if args.local_rank is not None or "TORCHELASTIC_RUN_ID" in os.environ:
        _end_with_launcher()
    try:
        _validate_home()
        code = args.run(args)
    except DsSegError as error:
        _fail(error.exit_code, f"ds-seg: {type(error).__name__}: {error}")
    except KeyboardInterrupt:
        _fail(EXIT_INTERRUPTED, f"ds-seg: {args.command} was interrupted; what it had written by then stays.")
    except Exception as error:  # a fault of ours or of a library: told once, and no rank left behind
        _fail(EXIT_FAULT, describe_fault(error, distributed.rank()))
    distributed.shutdown()
    sys.exit(code)


def _open_missing_streams() -> None:
    """Started with closed streams, as by some daemons, the first files to be opened would take their numbers."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8"))


def _end_with_launcher() -> None:
    """Ranks whose launcher, deepspeed's or torchrun, died while they started would wait half an hour for each other."""
    from ds_seg.supervision.processes import end_with_parent, has_python_above

    end_with_parent()
    if not has_python_above():
        sys.exit("ds-seg: the launcher has ended before training began; there is nothing to save.")


def _hush_third_parties() -> None:
    """Hide warnings that a user of ds_seg can do nothing about; a user's own -W or PYTHONWARNINGS wins."""
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", module=r"(torch|deepspeed|mmcv|mmseg)\b")


def _with_hyphens(arguments: Sequence[str]) -> list[str]:
    """Accept every option with underscores too: `--cfg_options` is `--cfg-options`."""
    return [_hyphenate(argument) if argument.startswith("--") else argument for argument in arguments]


def _refuse_empty(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """An empty `--resume` or `--load-from`, of a variable that is not set, would start anew in silence."""
    for before, argument in pairwise(["ds-seg", *arguments]):
        if not argument.strip() or (argument.startswith("--") and argument.endswith("=")):
            empty = argument.strip() or f"the argument after {before}"
            parser.error(f"{empty} is empty: is a shell variable there not set?")


def _validate_home() -> None:
    """MMCV's and wandb's imports end without a folder for their caches.

    Raises:
        UserError: the system knows of none.
    """
    try:
        Path.home()
    except RuntimeError as error:
        raise UserError(
            f"HOME is not set, and user {os.getuid()} has no home directory, where libraries keep caches. Set it to a "
            "folder that can be written to: export HOME=/tmp."
        ) from error


def _hyphenate(option: str) -> str:
    name, separator, value = option.partition("=")
    return name.replace("_", "-") + separator + value


def _fail(code: int, message: str) -> NoReturn:
    """Print the message on one rank and end every rank with this code."""
    from ds_seg import distributed

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the end is near and its code is settled
    if distributed.claim_failure_report():
        print(message, file=sys.stderr, flush=True)
        distributed.end_all_ranks(code)
    time.sleep(_REPORT_WAIT_S)  # the rank that reports ends this one with its own code
    distributed.end_this_rank(code)


if __name__ == "__main__":
    main()
