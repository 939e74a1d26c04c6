"""`ds-seg predict`: masks and overlays of images that need no annotation."""

from __future__ import annotations

import argparse
from pathlib import Path

from ds_seg import distributed
from ds_seg.collector import resume_collector
from ds_seg.commands.arguments import CHECKPOINT_HELP, add_config_arguments, run_options
from ds_seg.errors import EXIT_OK, UserError
from ds_seg.files import validate_output_folder, writing

# What needs torch or mmseg is imported inside the functions, so that --help answers at once.


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Describe the command."""
    parser = subparsers.add_parser(
        "predict",
        help="masks and overlays for images or folders",
        description="Segment images. DIR/masks gets PNGs of class ids with the dataset's palette (16-bit greyscale "
        "for more than 256 classes), DIR/overlays the images with the classes drawn over them.",
    )
    add_config_arguments(parser)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=CHECKPOINT_HELP)
    parser.add_argument("inputs", metavar="INPUT", nargs="+", help="images, or folders to search, subfolders included")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="where masks and overlays go")
    parser.add_argument(
        "--opacity", type=float, default=0.55, help="opacity of the classes in overlays, 0 to 1 (default: 0.55)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command on this rank."""
    if not 0 <= args.opacity <= 1:
        raise UserError(f"--opacity: got {args.opacity:g}, want 0 to 1.")
    distributed.initialize()
    from ds_seg.data.images import find_images, open_images, validate_images
    from ds_seg.evaluation.pictures import draw_overlay, load_rgb, save_mask, save_picture
    from ds_seg.resumption import resolve_trained
    from ds_seg.session import build_engines, predict_dataset, try_first_images

    resume_collector()
    distributed.agree(lambda: validate_output_folder("--out", args.out))
    config, weights = resolve_trained(run_options(args), args.checkpoint)
    results = distributed.agree(lambda: find_images(args.inputs))
    dataset = open_images(config.data, list(results))
    distributed.agree(lambda: validate_images(dataset))
    try_first_images(config, dataset, annotated=False)
    engines = build_engines(config, training=False, weights=str(weights), log=distributed.print_on_main)
    for prediction in predict_dataset(config, engines, dataset):
        path = dataset.paths[prediction.index]
        result = results[path]
        overlay = draw_overlay(load_rgb(path), prediction.labels_HW, dataset.PALETTE, args.opacity)
        with writing("--out", args.out):
            save_mask(prediction.labels_HW, args.out / "masks" / result, dataset.PALETTE)
            save_picture(overlay, args.out / "overlays" / result)
    distributed.barrier()
    distributed.print_on_main(f"wrote {len(results)} masks and overlays to {args.out}")
    return EXIT_OK
