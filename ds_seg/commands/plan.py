"""`ds-seg plan`: memory, time and cost of a run before anything is booked."""

from __future__ import annotations

import argparse
import math
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ds_seg import distributed
from ds_seg.collector import resume_collector
from ds_seg.commands.arguments import add_config_arguments, run_options
from ds_seg.errors import EXIT_OK, UserError, count
from ds_seg.files import validate_output_file, writing

# What needs torch or mmseg is imported inside the functions, so that --help answers at once.
if TYPE_CHECKING:
    from ds_seg.planning.candidates import Candidate
    from ds_seg.planning.hardware import Hardware
    from ds_seg.planning.search import Planner

_WORLDS_WITHOUT_GPUS = (1, 8, 64)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Describe the command."""
    parser = subparsers.add_parser(
        "plan",
        help="memory, time and cost of a run on given GPUs",
        description="Predict memory by part, step time, hours, traffic and checkpoints of a run. Tries micro-batches, "
        "checkpointing and an optimizer in host memory, and recommends the fastest combination that fits. Needs no "
        "data, weights or GPUs. Exit code 2 if nothing fits.",
    )
    add_config_arguments(parser)
    parser.add_argument("--gpus", type=int, metavar="N", help="number of GPUs (default: this machine's, else 1, 8, 64)")
    parser.add_argument(
        "--gpu-memory", type=float, metavar="GIB", help="memory of each GPU (default: this machine's, else 80)"
    )
    parser.add_argument("--host-memory", type=float, metavar="GIB", help="memory of each node (default: not limited)")
    parser.add_argument("--nodes", type=int, metavar="N", help="machines (default: up to 8 GPUs each)")
    parser.add_argument(
        "--interconnect-gbps",
        type=float,
        metavar="X",
        default=400.0,
        help="network bandwidth of each GPU between nodes, Gbit/s (default: 400)",
    )
    parser.add_argument(
        "--peak-tflops",
        type=float,
        metavar="X",
        default=989.0,
        help="dense bf16 peak of a GPU, TFLOP/s (default: 989, H100 and H200)",
    )
    parser.add_argument(
        "--sweep", metavar="1,8,64", help="print a scaling table for these numbers of GPUs, and draw a chart"
    )
    parser.add_argument(
        "--chart", type=Path, metavar="PNG", help="where to draw the chart of --sweep (default: plan_<run>_scaling.png)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="F", help="where to write the DeepSpeed JSON (default: plan_<run>_<N>_gpus.json)"
    )
    parser.add_argument("--json", type=Path, metavar="F", help="also write the whole plan as JSON")
    parser.add_argument("--force", action="store_true", help="overwrite existing files")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command in this process.

    Raises:
        UserError: an option can't be, a file is in the way, or no number of GPUs that was asked for suffices.
    """
    if distributed.world_size() > 1:
        raise UserError("ds-seg plan runs in one process: start it alone, without a launcher.")
    worlds = _read_worlds(args)
    from ds_seg.config import build_run_config
    from ds_seg.planning.report import describe_model
    from ds_seg.planning.search import Planner
    from ds_seg.tracking.files import write_json_output

    resume_collector()
    hardware = _read_hardware(args, worlds[0])
    planner = Planner(build_run_config(run_options(args), world_size=1))
    _validate_outputs(args, planner.run.name, worlds)
    print("\n".join([*planner.run.notes, *describe_model(planner)]))
    found = _plan_sweep(args, planner, hardware, worlds) if args.sweep else _plan_each(args, planner, hardware, worlds)
    print("\nassumed, not measured:\n  " + "\n  ".join(hardware.describe()))
    if args.json:
        plan = {"run": planner.run.name, "assumptions": hardware.describe(), "plans": found}
        write_json_output("--json", args.json, plan)
    return EXIT_OK


def _plan_each(args: argparse.Namespace, planner: Planner, hardware: Hardware, worlds: list[int]) -> list[dict]:
    from ds_seg.planning.hardware import place
    from ds_seg.planning.report import describe_choice, format_candidate, format_comparison, to_dict

    found, lacking = [], []
    for gpus in worlds:
        there = replace(hardware, gpus=gpus, nodes=place(gpus, args.nodes))
        chosen = planner.recommend(there)
        print(f"\n{_name_gpus(there)}")
        if chosen is None:
            lacking.append(_describe_remedy(planner, there))
            if len(worlds) > 1:
                print(f"does not fit. {lacking[-1]}")
            continue
        if len(worlds) == 1:
            print(format_comparison(list(planner.list_candidates(there)), chosen))
        print(f"recommended: {describe_choice(chosen)}")
        print(format_candidate(chosen))
        _print_start(args, planner, chosen)
        found.append(to_dict(chosen))
    if not found:
        raise UserError(f"{planner.run.name} does not fit. {lacking[0]}")
    return found


def _plan_sweep(args: argparse.Namespace, planner: Planner, hardware: Hardware, worlds: list[int]) -> list[dict]:
    from ds_seg.planning.hardware import place
    from ds_seg.planning.report import to_dict
    from ds_seg.planning.scaling import compute_scaling, draw_scaling, find_bound, format_scaling

    rows = compute_scaling(planner, hardware, worlds)
    if not rows:
        largest = replace(hardware, gpus=worlds[-1], nodes=place(worlds[-1]))
        raise UserError(f"{planner.run.name} does not fit. {_describe_remedy(planner, largest)}")
    left_out = sorted(set(worlds) - {row.kept.batch.gpus for row in rows})
    print(f"\nGPUs of {hardware.gpu_memory_gib:g} GiB, {hardware.interconnect_gbps:g} Gbit/s between nodes")
    print(format_scaling(rows))
    print(find_bound(rows))
    if left_out:
        print(f"does not fit on {', '.join(map(str, left_out))}")
    chart = _chart_path(args, planner.run.name)
    with writing("--chart", chart):
        draw_scaling(rows, chart, f"{planner.run.name}, GPUs of {hardware.gpu_memory_gib:g} GiB (predicted)")
    print(f"wrote {chart}")
    return [to_dict(row.kept) for row in rows]


def _print_start(args: argparse.Namespace, planner: Planner, chosen: Candidate) -> None:
    """Write the DeepSpeed JSON and print the command that starts the run as planned."""
    from ds_seg.planning.command import build_deepspeed_json, build_train_arguments
    from ds_seg.tracking.files import write_json_atomic

    out = _json_path(args, planner.run.name, chosen.batch.gpus)
    with writing("--out", out):
        write_json_atomic(out, build_deepspeed_json(chosen))
    arguments = build_train_arguments(planner.run, args.config, args.cfg_options, chosen)
    own = planner.run.global_batch if planner.run.mmseg.get("global_batch") is not None else chosen.batch.images
    if chosen.batch.images != own:
        print(
            f"note: a batch of {own} can't be spread over {chosen.batch.gpus} GPUs. This plan has a batch of "
            f"{chosen.batch.images} with {chosen.batch.max_steps} steps in place of {planner.run.schedule.max_steps}, "
            "as many crops in all and in warm-up; the learning rate is the config's."
        )
    if chosen.states.offloaded and chosen.hardware.gpus > 1:
        print(
            "note: torchrun sets OMP_NUM_THREADS=1, and the optimizer in host memory would step on one core of each "
            "process: export OMP_NUM_THREADS first, a node's cores over its "
            f"{count(chosen.hardware.gpus_a_node, 'process')}."
        )
    where = " on every node" if chosen.hardware.nodes > 1 else ""
    train = shlex.join(["train", *arguments, "--deepspeed-config", str(out)])
    print(f"wrote {out}; start{where} with\n  {_name_launcher(chosen.hardware)} {train}")


def _name_launcher(hardware: Hardware) -> str:
    if hardware.gpus == 1:
        return "ds-seg"
    nodes = ""
    if hardware.nodes > 1:
        nodes = f" --nnodes {hardware.nodes} --rdzv-backend c10d --rdzv-endpoint FIRST_HOST:29500"
    return f"torchrun{nodes} --nproc_per_node {hardware.gpus_a_node} -m ds_seg"


def _describe_remedy(planner: Planner, hardware: Hardware) -> str:
    from ds_seg.planning.report import describe_choice, describe_lack

    closest = planner.find_closest(hardware)
    if closest is None:
        lack = f"On one GPU its BatchNorm needs {planner.costs.smallest_alone} crops at once, and its batch has fewer"
        cures = "a larger batch"
    else:
        ways = f"{_name_gpus(hardware)} ({describe_choice(closest)})"
        lack = f"The closest way on {ways} takes {describe_lack(closest)}"
        cures = "larger GPUs (--gpu-memory), more host memory (--host-memory), a smaller crop or head"
    smallest = planner.find_smallest_world(hardware)
    enough = "No number of such GPUs up to 1024 suffices"
    if smallest is not None:
        enough = f"It fits on {_name_gpus(smallest.hardware)}: {describe_choice(smallest)}"
    return f"{lack}. {enough}. Other cures: {cures}."


def _json_path(args: argparse.Namespace, name: str, gpus: int) -> Path:
    return args.out or Path(f"plan_{name}_{gpus}_gpu{'s' if gpus > 1 else ''}.json")


def _chart_path(args: argparse.Namespace, name: str) -> Path:
    return args.chart or Path(f"plan_{name}_scaling.png")


def _name_gpus(hardware: Hardware) -> str:
    nodes = f" on {hardware.nodes} nodes" if hardware.nodes > 1 else ""
    return f"{count(hardware.gpus, 'GPU')} of {hardware.gpu_memory_gib:g} GiB{nodes}"


def _read_worlds(args: argparse.Namespace) -> list[int]:
    for name in ("gpus", "gpu_memory", "host_memory", "nodes", "interconnect_gbps", "peak_tflops"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name.replace('_', '-')}: got {value:g}, want more than 0, and less than infinity.")
    if args.nodes and args.gpus and args.gpus % args.nodes:
        raise UserError(f"--nodes: {args.gpus} GPUs can't be spread evenly over {args.nodes} nodes.")
    if args.chart and not args.sweep:
        raise UserError("--chart: only a --sweep is drawn. Add --sweep 1,8,64, or leave it out.")
    if args.sweep:
        if args.nodes:
            raise UserError(
                "--nodes: a sweep has up to 8 GPUs on each node. Leave it out, or plan one --gpus at a time."
            )
        if args.gpus or args.out:
            option = "--gpus" if args.gpus else "--out"
            raise UserError(f"{option}: a sweep is over its own numbers of GPUs, and writes no JSON. Leave one out.")
        parts = args.sweep.split(",")
        if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
            raise UserError(f"--sweep: got '{args.sweep}', want numbers of GPUs such as 1,8,64,512.")
        return sorted({int(part) for part in parts})
    if args.gpus:
        return [args.gpus]
    if args.nodes:
        raise UserError("--nodes: of how many GPUs in all? Add --gpus, or leave --nodes out.")
    import torch

    return [torch.cuda.device_count()] if torch.cuda.is_available() else list(_WORLDS_WITHOUT_GPUS)


def _read_hardware(args: argparse.Namespace, gpus: int) -> Hardware:
    import torch

    from ds_seg.planning.hardware import GIB, Hardware, place

    memory_gib = args.gpu_memory
    if memory_gib is None:
        found = torch.cuda.get_device_properties(0).total_memory / GIB if torch.cuda.is_available() else 80.0
        memory_gib = round(found, 1)
    return Hardware(
        gpus,
        place(gpus, args.nodes),
        memory_gib,
        args.host_memory,
        interconnect_gbps=args.interconnect_gbps,
        peak_tflops=args.peak_tflops,
    )


def _validate_outputs(args: argparse.Namespace, name: str, worlds: list[int]) -> None:
    if args.out and len(worlds) > 1:
        raise UserError(f"--out: one file for plans of {len(worlds)} numbers of GPUs; add --gpus N.")
    if args.sweep:
        outputs = [("--chart", _chart_path(args, name))]
    else:
        outputs = [("--out", _json_path(args, name, gpus)) for gpus in worlds]
    outputs += [("--json", args.json)] if args.json else []
    for option, path in outputs:
        validate_output_file(option, path)
    there = [str(path) for _, path in outputs if path.exists()]
    if there and not args.force:
        raise UserError(
            f"{', '.join(there)} would be replaced. Name another with --out, --chart or --json, or add --force."
        )
