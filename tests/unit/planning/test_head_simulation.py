"""Heads and losses simulated without data allocate what they allocate with it, measured on the CPU.

Measured: equal but for at most 20 bytes, of scalars.
"""

import pytest
import torch

from ds_seg.errors import ConfigError
from ds_seg.models.backbone_building import build_backbone
from ds_seg.models.heads import build_heads
from ds_seg.models.probe import draw_features
from ds_seg.planning import unknown_values
from ds_seg.planning.allocations import AllocationTracker
from ds_seg.planning.fitting import choose_fit
from ds_seg.planning.gradient_sums import SumInPlace
from ds_seg.planning.simulation import StepSetting, simulate_heads
from heads_cases import CASES, LOSSES, loss_case, make_run

IMAGES, SIDE_PX = 2, 64
RUNS = {**{f"loss {name}": loss_case(name) for name in LOSSES}, **CASES}
del RUNS["HeadWithSpareLayer"]  # a test's own, which trains in heads_worker.py


def simulate(case):
    side_px = case.get("side_px", SIDE_PX)
    setting = StepSetting(IMAGES, (side_px,) * 2, "none", torch.float32, fused_norms=False, zero3_linear=False)
    trace = simulate_heads(make_run(case).model, setting)
    return trace.kept.total(), trace.peak.total()


def measure(case):
    model, side_px = make_run(case).model, case.get("side_px", SIDE_PX)
    torch.manual_seed(0)
    heads = build_heads(model).train()
    drawn = draw_features(build_backbone(model), IMAGES, (side_px,) * 2, torch.device("cpu"))
    features = [feature.detach().requires_grad_() for feature in drawn]
    del drawn
    labels_B1HW = torch.randint(heads.num_classes, (IMAGES, 1, side_px, side_px))
    for parameter in heads.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda complete: setattr(complete, "grad", None))
    tracker = AllocationTracker(lambda _, phase: phase)
    with tracker, SumInPlace():
        tracker.enter("step")
        entries = heads.losses(features, [{}] * IMAGES, labels_B1HW)
        kept = tracker.live.total()
        torch.stack([value for name, value in entries.items() if "loss" in name]).sum().backward()
    return kept, tracker.peaks["step"].total()


@pytest.mark.parametrize("case", RUNS.values(), ids=RUNS)
def test_memory_without_data_is_that_with_data(case):
    assert simulate(case) == pytest.approx(measure(case), abs=32)


def test_a_mask_that_selects_nothing_would_be_noticed(monkeypatch):
    case = RUNS["loss lovasz"]
    monkeypatch.setattr(unknown_values, "_find_everywhere", lambda mask: mask.new_empty(1, mask.dim(), dtype=int))
    assert simulate(case)[1] < 0.8 * measure(case)[1]


def test_a_head_that_no_plan_is_possible_for_names_the_way_out():
    run = make_run({**RUNS["LRASPPHead"], "side_px": 16})
    with pytest.raises(ConfigError, match="set checkpointing to none, selective or block"):
        choose_fit(run, memory_gib=80, device_type="cuda")
