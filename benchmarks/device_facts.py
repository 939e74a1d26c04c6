"""What a machine is, and how fast: versions, device, and the measured rates that a plan rests on, as JSON.

The rates are what figures of a training step on this machine are to be held against; random data, medians.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F

from ds_seg.versions import find_versions

GIB = 2**30
_PACKAGES = ("ds_seg", "torch", "triton", "torchvision", "deepspeed", "mmcv-full", "mmsegmentation", "numpy")
_QUERY = "name,driver_version,memory.total,clocks.max.sm,clocks.sm,power.limit,temperature.gpu"
_REPEATS = 20
# rows, columns summed over, columns: a large square, and the MLP's first product of 8 crops of 504 px in the 6B model
_PRODUCTS = {"cuda": ((8192, 8192, 8192), (10376, 3200, 12800)), "cpu": ((512, 512, 512), (136, 320, 1280))}
# batch, heads, tokens, channels of a head: 8 crops of the same
_ATTENTION = {"cuda": (8, 25, 1297, 128), "cpu": (2, 10, 65, 32)}
_COPY_BYTES = {"cuda": GIB, "cpu": GIB // 64}


def measure_s(work: Callable[[], object], device: torch.device) -> float:
    """Median seconds of a piece of work, each time until the device is idle."""
    times_s = []
    for _ in range(_REPEATS + 3):
        _wait(device)
        started = time.perf_counter()
        work()
        _wait(device)
        times_s.append(time.perf_counter() - started)
    return statistics.median(times_s[3:])


def measure_products(device: torch.device) -> dict[str, float]:
    """TFLOP/s of bf16 matrix products, by their shape."""
    rates = {}
    for rows, inner, columns in _PRODUCTS[device.type]:
        a, b = (torch.randn(shape, device=device).bfloat16() for shape in ((rows, inner), (inner, columns)))
        rates[f"{rows} x {inner} x {columns}"] = 2 * rows * inner * columns / measure_s(lambda: a @ b, device) / 1e12  # noqa: B023
    return rates


def measure_layer(rows: int, inner: int, columns: int, device: torch.device) -> float:
    """TFLOP/s of a linear layer in bf16, forward and backward: 3 products."""
    x = torch.randn(rows, inner, device=device).bfloat16().requires_grad_()
    weight = torch.randn(columns, inner, device=device).bfloat16().requires_grad_()
    gradient = torch.randn(rows, columns, device=device).bfloat16()
    seconds = measure_s(lambda: torch.autograd.grad(F.linear(x, weight), (x, weight), gradient), device)
    return 3 * 2 * rows * inner * columns / seconds / 1e12


def measure_activation(rows: int, columns: int, device: torch.device) -> float:
    """GB/s that GELU in bf16 reads and writes, forward (2 tensors) and backward (3)."""
    x, gradient = torch.randn(2, rows, columns, device=device).bfloat16()
    x.requires_grad_()
    return 5 * 2 * rows * columns / measure_s(lambda: torch.autograd.grad(F.gelu(x), x, gradient), device) / 1e9


def measure_attention(shape_BHNE: tuple[int, int, int, int], device: torch.device) -> float:
    """TFLOP/s of attention in bf16, forward and backward, counted as torch's FlopCounterMode does: 2 and 5 products."""
    batch, heads, tokens, channels = shape_BHNE
    qkv_gradient = torch.randn(4, batch, tokens, heads, channels, device=device).bfloat16().transpose(2, 3)
    *qkv, gradient_BHNE = (tensor.clone().requires_grad_() for tensor in qkv_gradient)
    seconds = measure_s(lambda: torch.autograd.grad(F.scaled_dot_product_attention(*qkv), qkv, gradient_BHNE), device)
    return 7 * 2 * batch * heads * tokens**2 * channels / seconds / 1e12


def measure_copy_within(device: torch.device) -> float:
    """GB/s of a copy within the device, bytes read and written."""
    source, target = torch.zeros(2, _COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    return 2 * source.numel() / measure_s(lambda: target.copy_(source), device) / 1e9


def measure_copies(device: torch.device) -> dict[str, float]:
    """GB/s of copies within the device, and from and to host memory where there is another."""
    rates = {"within the device": measure_copy_within(device)}
    if device.type == "cuda":
        there = torch.zeros(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
        for pinned in (True, False):
            host = torch.zeros(there.numel(), dtype=torch.uint8, pin_memory=pinned)
            kind = "pinned" if pinned else "unpinned"
            rates[f"from {kind} host memory"] = host.numel() / measure_s(lambda: there.copy_(host), device) / 1e9  # noqa: B023
            rates[f"to {kind} host memory"] = host.numel() / measure_s(lambda: host.copy_(there), device) / 1e9  # noqa: B023
    return rates


def describe_versions() -> dict[str, str]:
    """Of Python, of the packages, and of what torch was built with."""
    versions = {
        "python": platform.python_version(),
        "kernel": platform.release(),
        "libc": " ".join(platform.libc_ver()),
    }
    versions |= find_versions(_PACKAGES)
    if torch.cuda.is_available():
        versions |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return versions


def name_device(device: torch.device) -> str:
    """The model of the GPU, or of the processor as Linux tells it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    told = re.search(r"^model name\s*: (.+)$", cpuinfo.read_text() if cpuinfo.exists() else "", re.MULTILINE)
    return told.group(1) if told else platform.machine()


def describe_device(device: torch.device) -> dict[str, Any]:
    """Name, memory and settings of the device, and of the host."""
    host = {"cores": os.cpu_count(), "host_memory_gib": psutil.virtual_memory().total / GIB}
    if device.type == "cpu":
        return {"name": name_device(device), **host}
    properties = torch.cuda.get_device_properties(device)
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader"]
    told = subprocess.run(command, capture_output=True, text=True, check=False) if shutil.which(command[0]) else None
    return {
        "name": name_device(device),
        "memory_gib": properties.total_memory / GIB,
        "free_gib": torch.cuda.mem_get_info()[0] / GIB,
        "multiprocessors": properties.multi_processor_count,
        "nvidia_smi": {_QUERY: told.stdout.strip() if told else "not there"},
        **host,
    }


def main() -> int:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything here too")
    args = parser.parse_args()
    device = torch.device(args.device)
    layer = _PRODUCTS[device.type][-1]
    facts = {
        "versions": describe_versions(),
        "device": describe_device(device),
        "bf16_tflops": measure_products(device),
        "layer_tflops": measure_layer(*layer, device),
        "attention_tflops": measure_attention(_ATTENTION[device.type], device),
        "gelu_gb_per_s": measure_activation(layer[0], layer[2], device),
        "copies_gb_per_s": measure_copies(device),
    }
    text = json.dumps(facts, indent=2)
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
