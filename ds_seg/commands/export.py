"""`ds-seg export`: a trained model as one file, for others and for the Python API."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ds_seg import distributed
from ds_seg.collector import resume_collector
from ds_seg.commands.arguments import CHECKPOINT_HELP, add_config_arguments, run_options
from ds_seg.errors import EXIT_OK, UserError

# What needs torch or mmseg is imported inside the functions, so that --help answers at once.
if TYPE_CHECKING:
    from torch import nn

    from ds_seg.checkpoint.model_weights import ModelWeights
    from ds_seg.config import RunConfig
    from ds_seg.models.heads import SegmentationHeads


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Describe the command."""
    parser = subparsers.add_parser(
        "export",
        help="one file with backbone, heads, classes and palette",
        description="Write backbone, heads, classes, palette and everything needed to use them into one file. The file "
        "is a CHECKPOINT itself, and ds_seg.load_model reads it. Weights are streamed: no GPU is needed, and memory "
        "for a few parameters only. Logits of the file and of the checkpoint are compared before it gets its name.",
    )
    add_config_arguments(parser)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=CHECKPOINT_HELP)
    parser.add_argument(
        "--format",
        required=True,
        choices=("safetensors", "mmseg"),
        help="safetensors: HuggingFace InternVisionModel's names; mmseg: a .pth for MMSegmentation 0.x and InternVL",
    )
    parser.add_argument(
        "--out", metavar="F", type=Path, required=True, help="where to write the file; it is overwritten if it exists"
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16"),
        help="dtype of the backbone; heads stay float32 (default: float32)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command in this process."""
    if distributed.world_size() > 1:
        raise UserError("ds-seg export reads a checkpoint of any world size by itself: start it without a launcher.")
    from tqdm import tqdm

    from ds_seg.checkpoint.description import describe_model_of
    from ds_seg.checkpoint.export import DTYPES, note_for_mmseg, validate_output, write_export
    from ds_seg.checkpoint.model_weights import open_exported
    from ds_seg.checkpoint.round_trip import compare_logits
    from ds_seg.models.weight_report import format_rate
    from ds_seg.resumption import resolve_trained

    resume_collector()
    validate_output(args.out, args.format)
    config, source = resolve_trained(run_options(args), args.checkpoint, with_engines=False)
    description = describe_model_of(config)
    backbone, heads, weights = _open_source(config, source)
    dtype = DTYPES[args.dtype]
    started = time.perf_counter()
    with (
        tqdm(desc="exporting", unit="B", unit_scale=True, leave=False, disable=None) as bar,  # None: on a terminal only
        write_export(args.out, args.format, weights, description, dtype, bar.update) as file,
    ):
        rate = format_rate(file.stat().st_size, time.perf_counter() - started)
        found = compare_logits(backbone, heads, weights, open_exported(file), file_dtype=dtype, dtype=description.dtype)
    print(found.describe())
    if args.format == "mmseg" and (note := note_for_mmseg(description.model)):
        print(note)
    averages = ", averages of the weights (EMA)" if weights.averaged else ""
    classes = len(description.classes)
    print(f"wrote {args.out}: backbone {args.dtype}, heads float32, {classes} classes{averages}; {rate}")
    return EXIT_OK


def _open_source(config: RunConfig, source: Path) -> tuple[nn.Module, SegmentationHeads, ModelWeights]:
    """The backbone on the meta device, the heads, and the weights for both."""
    import torch

    from ds_seg.checkpoint.model_weights import open_checkpoint, open_modules
    from ds_seg.models import build_heads, validate_head_channels
    from ds_seg.models.backbone_building import build_backbone
    from ds_seg.models.weight_files import is_weight_path

    with torch.device("meta"):
        backbone = build_backbone(config.model)
    validate_head_channels(config.model, backbone.out_channels)
    heads = build_heads(config.model)
    if not is_weight_path(source):
        return backbone, heads, open_checkpoint(source, backbone, heads)
    from ds_seg.session import load_weights

    filled = build_backbone(config.model)
    load_weights(config, filled, heads, str(source), training=False, log=print)
    weights = open_modules(filled, heads)
    return backbone, build_heads(config.model), weights
