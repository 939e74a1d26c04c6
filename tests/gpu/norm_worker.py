"""One of two gloo processes on one device: SyncBatchNorm over halves of a batch against BatchNorm over the whole.

NCCL refuses two processes on one GPU and gloo takes tensors of GPUs, so that torch's own SyncBatchNorm, which ours
hands over to there, really synchronises. Usage: norm_worker.py OUTPUT_FOLDER cpu|cuda
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from ds_seg.models.sync_batchnorm import SyncBatchNorm

OUT, DEVICE = Path(sys.argv[1]), sys.argv[2]
CHANNELS, IMAGES = 5, (3, 1)
"""The ranks have batches of different sizes."""


def run_norm(norm: nn.Module, x_BCHW: torch.Tensor, weight_BCHW: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output, gradients and statistics of one training pass."""
    x_BCHW = x_BCHW.clone().requires_grad_()
    out_BCHW = norm(x_BCHW)
    (out_BCHW * weight_BCHW).sum().backward()
    assert x_BCHW.grad is not None
    found = {"output": out_BCHW.detach(), "gradient": x_BCHW.grad}
    found |= {f"gradient of {name}": parameter.grad for name, parameter in norm.named_parameters()}
    return {**found, "mean": norm.running_mean, "variance": norm.running_var}


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(0)
    x_BCHW, weight_BCHW = (
        torch.randn(sum(IMAGES), CHANNELS, 4, 6, generator=generator).mul(3).add(10).to(DEVICE) for _ in range(2)
    )
    whole = run_norm(nn.BatchNorm2d(CHANNELS).to(DEVICE), x_BCHW, weight_BCHW)
    own = slice(sum(IMAGES[:rank]), sum(IMAGES[: rank + 1]))
    part = run_norm(SyncBatchNorm(CHANNELS).to(DEVICE), x_BCHW[own], weight_BCHW[own])
    apart = {}
    for name, wanted in whole.items():
        got = part[name]
        if name in ("output", "gradient"):
            wanted = wanted[own]
        elif name.startswith("gradient of"):
            got = got.clone()
            dist.all_reduce(got)  # DistributedDataParallel's work
        apart[name] = ((got - wanted).abs().max() / wanted.abs().max()).item()
    (OUT / f"norm_rank{rank}.json").write_text(json.dumps(apart))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    assert os.environ["WORLD_SIZE"] == str(len(IMAGES))
    main()
