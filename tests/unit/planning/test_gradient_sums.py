"""Gradients that are summed under a mode take the memory that they take without one, by torch's profiler."""

import json
from itertools import accumulate

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from ds_seg.planning import gradient_sums
from ds_seg.planning.allocations import AllocationTracker
from ds_seg.planning.gradient_sums import SumInPlace


def use_often(x):
    """The gradient of each column is as large as x, and is added to that of those before it."""
    return sum(x[:, i].square().sum() for i in range(8))


def share(x):
    """What reaches y first, the gradient of a sum, is needed for the other summand when more reaches y."""
    y = x * 2
    exponential, sine = y.exp(), y.sin()
    return (exponential + y).square().sum() + sine.sum()


def expand(x):
    """What reaches y first is one number, expanded."""
    y = x * 2
    return y.square().sum() + y.sum()


def compute_again(x):
    """The sum in what is computed again is none of gradients."""
    return checkpoint(lambda y: (y + y.exp()).square().sum(), x * 2, use_reentrant=False, preserve_rng_state=False)


def draw():
    return torch.randn(256, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)


def follow(loss_of):
    x, tracker = draw(), AllocationTracker(lambda _, phase: phase)
    with tracker, SumInPlace():
        tracker.enter("step")
        loss_of(x).backward()
    return tracker.peaks["step"].total(), x.grad


def measure(loss_of, trace_file):
    x = draw()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        loss_of(x).backward()
    trace.export_chrome_trace(str(trace_file))
    events = [event for event in json.loads(trace_file.read_text())["traceEvents"] if event["name"] == "[memory]"]
    changes = [event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])]
    return max(accumulate(changes)), x.grad


@pytest.mark.parametrize("loss_of", [use_often, share, expand, compute_again])
def test_a_sum_takes_what_it_takes_without_a_mode(loss_of, tmp_path):
    (followed, gradient), (measured, true_gradient) = follow(loss_of), measure(loss_of, tmp_path / "trace.json")
    assert followed == pytest.approx(measured, abs=100) and torch.equal(gradient, true_gradient)


@pytest.mark.parametrize(("loss_of", "in_place"), [(use_often, False), (share, True), (compute_again, True)])
def test_a_sum_in_the_wrong_place_would_be_noticed(monkeypatch, loss_of, in_place):
    right, gradient = follow(loss_of)
    monkeypatch.setattr(gradient_sums, "_can_hold_sum", lambda _: in_place)
    monkeypatch.setattr(gradient_sums, "_is_backward", lambda: True)
    wrong, wrong_gradient = follow(loss_of)
    assert wrong < right or not torch.equal(wrong_gradient, gradient) if in_place else wrong >= right + 8 * 2**10
