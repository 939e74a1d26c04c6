"""What one training step allocates, exact on every device, unlike the resident set of a process."""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile, record_function

_MEASURED = "measured step"


def measure_held_gib(device: torch.device) -> float:
    """Memory of all tensors that Python knows of, each storage once, and of DistributedDataParallel's buckets.

    Args:
        device: where they are.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated() / 2**30
    storages, buckets = {}, 0
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, nn.Parameter) and thing.device.type == "cpu":  # no wrappers, no fakes
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif type(thing) is DistributedDataParallel and not thing.gradient_as_bucket_view:
            buckets += sum(parameter.nbytes for parameter in thing.parameters() if parameter.requires_grad)
    return (sum(storages.values()) + buckets) / 2**30


def measure_step_gib(step: Callable[[], object], device: torch.device) -> float:
    """Run a step and measure the memory of tensors at its peak, beyond what was there before it.

    On the CPU torch's profiler follows every allocation. It sees no release of what was allocated before it began, so
    the step that counts is a second one, which replaces what the first has made.

    Args:
        step: makes one training step.
        device: where its tensors are.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**30
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        step()
        with record_function(_MEASURED):
            step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    (begun,) = (event["ts"] for event in events if event["name"] == _MEASURED)
    totals = sorted((event["ts"], event["args"]["Total Allocated"]) for event in events if event["name"] == "[memory]")
    before = [total for time, total in totals if time < begun][-1]
    return max(total - before for time, total in totals if time >= begun) / 2**30
