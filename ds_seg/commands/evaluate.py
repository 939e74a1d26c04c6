"""`ds-seg evaluate`: the scores of a checkpoint on the config's test set."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ds_seg import distributed
from ds_seg.collector import resume_collector
from ds_seg.commands.arguments import CHECKPOINT_HELP, add_config_arguments, run_options
from ds_seg.errors import EXIT_OK, UserError
from ds_seg.files import validate_output_file

# What needs torch or mmseg is imported inside the functions, so that --help answers at once.


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Describe the command."""
    parser = subparsers.add_parser(
        "evaluate",
        help="mIoU of a checkpoint",
        description="Evaluate a checkpoint on data.test of the config (data.val where there is none), over all ranks.",
    )
    add_config_arguments(parser)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=CHECKPOINT_HELP)
    parser.add_argument(
        "--tta",
        action="store_true",
        help="average over six scales from 0.5 to 1.75 (none below the pipeline's min_size) and over their "
        "mirrored views",
    )
    parser.add_argument(
        "--window-batch", type=int, metavar="N", help="windows per forward pass (default: the config's)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the scores to this JSON file")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command on this rank."""
    if args.window_batch is not None and args.window_batch < 1:
        raise UserError(f"--window-batch: got {args.window_batch}, want at least 1.")
    distributed.initialize()
    from ds_seg.config.data_section import evaluation_role
    from ds_seg.data.opening import open_datasets
    from ds_seg.resumption import resolve_trained
    from ds_seg.session import Evaluator, build_engines, enable_test_time_augmentation, try_first_images
    from ds_seg.tracking.files import write_json_output

    resume_collector()
    distributed.agree(lambda: validate_output_file("--out", args.out) if args.out and distributed.is_main() else None)
    config, weights = resolve_trained(run_options(args), args.checkpoint)
    role = evaluation_role(config.data)
    if args.tta:
        enable_test_time_augmentation(config, role)
    (dataset,) = open_datasets(config, role)
    try_first_images(config, dataset)
    engines = build_engines(config, training=False, weights=str(weights), log=distributed.print_on_main)
    result = Evaluator(config, dataset, window_batch=args.window_batch)(engines)
    distributed.print_on_main(result.table())
    if fault := result.describe_fault():
        distributed.print_on_main(f"warning: {fault}")
    scores = {"checkpoint": str(weights), "images": result.images, **result.metrics()}
    if args.out:
        if distributed.is_main():
            write_json_output("--out", args.out, scores)
    else:
        distributed.print_on_main(json.dumps({name: value for name, value in scores.items() if "IoU/" not in name}))
    return EXIT_OK
