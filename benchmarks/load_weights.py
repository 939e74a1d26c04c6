"""Memory and speed of loading pretrained weights into ZeRO-3 shards, on a generated checkpoint in several files.

Blocks of InternViT-6B's width under HuggingFace's names, in bf16, are written to a temporary folder; their files are
flushed and dropped from the page cache, so that they are read from disk. Then every rank builds the sharded network
and loads it: `streamed` as ds_seg does, and `whole` with all tensors read before the first is handed out, as
`load_state_dict` after `torch.load` wants it. Run it alone; it starts its processes itself.

Memory is measured beyond what each rank holds before the load, which includes its own partition: `anonymous` is its
own memory, `file` are touched pages of the mapped shard, which the system can take back. What is to bound each of them
stands above the table: the larger of one file and one block.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import torch
from prettytable import PrettyTable
from process_memory import MemoryPeaks
from safetensors.torch import save_file
from torch import Tensor

from ds_seg import distributed
from ds_seg.models import InternViT, load_backbone_weights, load_weights
from ds_seg.models.weight_files import WeightFiles

_HF_NAMES = {"patch_embed.proj": "embeddings.patch_embedding", "cls_token": "embeddings.class_embedding"}
_HF_NAMES |= {"pos_embed": "embeddings.position_embedding", "blocks.": "encoder.layers.", ".gamma": ""}
_ZERO = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}}
_ZERO |= {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
_MIB = 2**20


class WholeFiles(WeightFiles):
    """The same files with every tensor in memory from the start."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._values = {name: super(WholeFiles, self).read(name).clone() for name in self.entries}
        self.close()

    def read(self, name: str) -> Tensor:
        """The tensor, from memory."""
        return self._values[name]


METHODS = {"streamed": WeightFiles, "whole": WholeFiles}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--width", type=int, default=3200, help="channels (default: 3200, InternViT-6B's)")
    parser.add_argument("--depth", type=int, default=14, help="blocks (default: 14, which make 3.4 GB)")
    parser.add_argument("--shard-mib", type=int, default=1024, help="largest file (default: 1024)")
    parser.add_argument("--world-size", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--methods", nargs="+", choices=sorted(METHODS), default=["streamed", "whole"])
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # of the checkpoint, for the ranks
    return parser.parse_args()


def network_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """InternViT's arguments; heads of 128 channels, as in the 6B model."""
    heads = max(args.width // 128, 1)
    return {"embed_dim": args.width, "depth": args.depth, "num_heads": heads, "out_indices": [args.depth - 1]}


def write_checkpoint(folder: Path, args: argparse.Namespace) -> None:
    """Write random weights in files of at most `--shard-mib`, with an index, and drop them from the page cache."""
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(split_shards(generate_weights(args), args.shard_mib * _MIB), start=1):
        file = folder / f"model-{number:05d}.safetensors"
        save_file(shard, file)
        weight_map |= dict.fromkeys(shard, file.name)
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")


def generate_weights(args: argparse.Namespace) -> Iterator[tuple[str, Tensor]]:
    """Random tensors under HuggingFace's names, one after the other."""
    with torch.device("meta"):
        network = InternViT(**network_arguments(args))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        for ours, theirs in _HF_NAMES.items():
            name = name.replace(ours, theirs)
        values = torch.randint(0, 1 << 14, parameter.shape, generator=generator, dtype=torch.int16)
        yield name, values.view(torch.bfloat16)  # every pattern below 2^14 is a number between 0 and 2


def split_shards(named: Iterator[tuple[str, Tensor]], limit_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Group tensors in their order into files of at most `limit_bytes`, or of one tensor that is larger."""
    shard: dict[str, Tensor] = {}
    for name, tensor in named:
        if shard and sum(value.nbytes for value in shard.values()) + tensor.nbytes > limit_bytes:
            yield shard
            shard = {}
        shard[name] = tensor
    yield shard


def build_sharded(args: argparse.Namespace) -> InternViT:
    """The network, partitioned; zeros stand for its random start, which takes long on a CPU and is overwritten."""
    no_draw = mock.patch.object(torch.nn.init, "trunc_normal_", lambda tensor, **_: torch.nn.init.zeros_(tensor))
    with no_draw, deepspeed.zero.Init(config_dict_or_path=_ZERO):
        return InternViT(**network_arguments(args))


def measure_rank(args: argparse.Namespace) -> dict[str, Any]:
    """What this rank needs for each method."""
    rows = {}
    for method in args.methods:
        network = build_sharded(args)
        distributed.barrier()
        with mock.patch.object(load_weights, "WeightFiles", METHODS[method]), MemoryPeaks() as peaks:
            started = time.perf_counter()
            report = load_backbone_weights(network, args.folder, log=lambda _report: None)
            elapsed_s = time.perf_counter() - started
        partition = sum(parameter.ds_tensor.nbytes for parameter in network.parameters())  # type: ignore[attr-defined]
        rows[method] = {
            "partition_bytes": partition,
            "added_bytes": peaks.added(),
            "rss_before_bytes": peaks.before["total"],
            "max_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "bytes": report.bytes,
            "seconds": elapsed_s,
            "bytes_per_s": report.bytes / elapsed_s,
            "equal": compare_with_files(network, args.folder),
        }
        del network
        gc.collect()  # DeepSpeed ties parameters to their modules in circles
    return rows


@torch.no_grad()
def compare_with_files(network: torch.nn.Module, folder: Path) -> bool:
    """Whether the first and last block hold the very numbers of the files, on this rank."""
    files = WeightFiles(folder)
    named = list(network.named_parameters())
    equal = True
    for name, parameter in named[:18] + named[-16:]:
        theirs = name
        for ours, replaced in _HF_NAMES.items():
            theirs = theirs.replace(ours, replaced)
        with deepspeed.zero.GatheredParameters([parameter]):
            equal &= torch.equal(parameter.data.cpu(), files.read(theirs))
    return equal


def measure_bound(folder: Path, args: argparse.Namespace) -> dict[str, int]:
    """Bytes of the largest file and of one block."""
    blocks: dict[str, int] = {}
    for name, entry in WeightFiles(folder).entries.items():
        key = ".".join(name.split(".")[:3])
        blocks[key] = blocks.get(key, 0) + entry.bytes
    return {
        "files": len(list(folder.glob("*.safetensors"))),
        "checkpoint_bytes": sum(blocks.values()),
        "largest_file_bytes": max(file.stat().st_size for file in folder.glob("*.safetensors")),
        "block_bytes": max(blocks.values()),
    }


def start_ranks(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Run this script once for each rank and read what they measured."""
    environment = dict(os.environ)
    if args.device == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
        environment.setdefault("OMP_NUM_THREADS", "1")
    # freed memory goes back to the system at once, so that what is resident is what is held
    environment["MALLOC_MMAP_THRESHOLD_"] = environment["MALLOC_TRIM_THRESHOLD_"] = "65536"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    command = [*torchrun, str(args.world_size), __file__, *sys.argv[1:], "--folder", str(folder)]
    subprocess.run(command, env=environment, check=True, stdout=sys.stderr)
    return json.loads((folder / "measured.json").read_text(encoding="utf-8"))


def format_table(figures: dict[str, Any]) -> str:
    """One line for each method and rank, in MiB."""
    table = PrettyTable(
        ["method", "rank", "partition", "+ anonymous", "+ file", "+ total", "max RSS", "MiB/s"], align="r"
    )
    for rank, rows in enumerate(figures["ranks"]):
        for method, row in rows.items():
            added = row["added_bytes"]
            sizes = [row["partition_bytes"], *(added[kind] for kind in ("anonymous", "file", "total"))]
            columns = [f"{size / _MIB:,.0f}" for size in (*sizes, row["max_rss_bytes"], row["bytes_per_s"])]
            table.add_row([method, rank, *columns])
    bound = {name: value / _MIB for name, value in figures["bound"].items()}
    return (
        f"{bound['checkpoint_bytes']:,.0f} MiB in {figures['bound']['files']} files; largest file "
        f"{bound['largest_file_bytes']:,.0f} MiB, block {bound['block_bytes']:,.0f} MiB; MiB, beyond the memory before "
        f"the load where marked +\n{table.get_string(sortby='method')}"
    )


def main() -> int:
    """Measure all ranks, print, write."""
    args = parse_arguments()
    if args.folder:
        distributed.initialize()
        measured = distributed.gather_objects(measure_rank(args))
        if distributed.is_main():
            (args.folder / "measured.json").write_text(json.dumps(measured), encoding="utf-8")
        distributed.shutdown()
        return 0
    with tempfile.TemporaryDirectory(prefix="ds_seg_bench_") as name:
        folder = Path(name)
        write_checkpoint(folder, args)
        figures = {"bound": measure_bound(folder, args), "ranks": start_ranks(args, folder)}
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(format_table(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
