"""The arithmetic of the step benchmark, and its own mistakes and its user's, each with one message."""

import argparse
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from ds_seg.config import CONFIGS_ROOT
from ds_seg.errors import ConfigError
from ds_seg.planning.flops import compute_tokens

BENCHMARKS = CONFIGS_ROOT.parent / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in ("contestant", "figures", "memory", "phases", "predictions", "results", "step", "workload"):
        sys.modules.pop(name, None)


def test_flops_of_the_6b_model_are_those_of_the_reference():
    from figures import compute_flops

    backbone = {"embed_dim": 3200, "depth": 48, "mlp_ratio": 4, "patch_size": 14, "out_indices": [47]}
    assert compute_tokens((504, 504), 14) == 1297
    assert compute_flops(backbone, 504) == pytest.approx(49.0e12, rel=1e-3)


def turn(*step_s, memory=2.0):
    return {
        "step_s": step_s,
        "cpu_s": step_s,
        "loss": [1.0, 0.5],
        "grad_norm": [3.0, 2.0],
        "memory": {"m": memory, "step_gib": 0.5, "allocated_gib": 1.0},
        "memory_by_rank": [{"m": memory}],
        "phases_s": {"forward": 0.5},
        "rates": {"peak_tflops": 494.5},
    }


def test_figures_of_a_variant():
    from figures import find_peak_tflops, summarise_variant

    found = summarise_variant([turn(1.0, 2.0, 9.0), turn(4.0, 4.0)], 8, 989e12, find_peak_tflops("NVIDIA H200"))
    assert found["step_s"] == 4.0
    assert found["step_s_by_round"] == [2.0, 4.0]
    assert found["images_per_s"] == 2.0
    assert found["mfu"] == pytest.approx(0.25) and found["mfu_of_products"] == pytest.approx(0.5)
    assert found["phases_s"] == {"forward": 0.5}
    assert (found["loss_first"], found["loss_last"], found["steps"]) == (1.0, 0.5, 4)
    assert find_peak_tflops("some CPU") is None


def test_ratios_compare_rounds_so_that_other_load_cancels():
    from figures import compute_ratios, summarise_variant

    ours = summarise_variant([turn(1.0), turn(10.0), turn(2.0)], 1, 1.0, None)
    theirs = summarise_variant([turn(2.0, memory=8.0), turn(20.0), turn(4.0, memory=8.0)], 1, 1.0, None)
    variants = {"ds_seg": ours, "fsdp2": theirs, "ddp": {"out_of_memory": "x"}}
    ratios = compute_ratios(variants, [("ds_seg", "fsdp2"), ("ds_seg", "ddp"), ("fsdp2", "ds_seg")], "m")
    assert ratios == {
        "step_time_over_fsdp2": 0.5,
        "cpu_time_over_fsdp2": 0.5,
        "memory_over_fsdp2": 0.25,
        "step_memory_over_fsdp2": 1.0,
        "step_time_over_ddp": None,
        "cpu_time_over_ddp": None,
        "memory_over_ddp": None,
        "step_memory_over_ddp": None,
        "fsdp2_step_time_over_ds_seg": 2.0,
        "fsdp2_cpu_time_over_ds_seg": 2.0,
        "fsdp2_memory_over_ds_seg": 4.0,
        "fsdp2_step_memory_over_ds_seg": 1.0,
    }


def test_the_memory_of_a_step_is_its_peak():
    from memory import measure_step_gib

    held, mib = [torch.ones(2**18)], 2**20

    def step():
        held.append(held.pop() + 1)  # the new one in the place of the old one
        temporary = torch.ones(3 * 2**18)
        del temporary
        return torch.ones(2**18)

    assert measure_step_gib(step, torch.device("cpu")) * 2**30 == pytest.approx(3 * mib, rel=1e-3)


def test_contestants_are_the_variants_or_the_policies():
    from step import list_contestants, read_variants

    workload = build_workload(checkpointing="selective")
    names = read_variants("ds_seg,fsdp2_compiled")
    variants = list_contestants(argparse.Namespace(policies=False, variants=names), workload)
    compiled = build_workload(checkpointing="selective", compile=True)
    assert variants == {"ds_seg": ("ds_seg", workload), "fsdp2_compiled": ("fsdp2", compiled)}
    policies = list_contestants(argparse.Namespace(policies=True), workload)
    assert [variant for variant, _ in policies.values()] == ["ds_seg"] * 3
    assert [its.checkpointing for _, its in policies.values()] == list(policies) == ["none", "selective", "block"]
    for wrong in ("", "ds_seg,fsdp3", "ddp,ddp"):
        with pytest.raises(argparse.ArgumentTypeError, match="want some of ds_seg, fsdp2, ddp, ds_seg_compiled"):
            read_variants(wrong)


def test_a_plan_is_compared_with_what_was_measured():
    from predictions import compare_with_plan

    parts = {"parameters": 1.0, "moments": 2.0, "activations": 1.0, "CUDA context and fragmentation": 0.5}
    candidate = SimpleNamespace(
        gpu_bytes={name: gib * 2**30 for name, gib in parts.items()},
        gpu_gib=4.5,
        host_gib=1.0,
        time=SimpleNamespace(total_s=3.0),
    )
    found = compare_with_plan(candidate, {"step_s": 2.0, "memory": {"allocated_gib": 5.0, "step_gib": 1.0, "x": 1.0}})
    assert found == {
        "allocated_gib": {"predicted": 4.0, "measured": 5.0, "error": pytest.approx(-0.2)},
        "step_gib": {"predicted": 1.0, "measured": 1.0, "error": 0.0},
        "step_s": {"predicted": 3.0, "measured": 2.0, "error": 0.5},
    }


def test_phases_are_timed_and_put_back():
    from phases import PhaseClock, merged_length, split_step

    class Model:
        def forward(self):
            time.sleep(0.02)
            return 7

    model = Model()
    split = split_step(
        lambda: model.forward() + model.forward(), {"forward": [(model, "forward")]}, torch.device("cpu")
    )
    assert 0.04 <= split["forward"] < 0.2 and 0 <= split["rest"] < 0.1
    clock = PhaseClock({"forward": [(model, "forward")]}, torch.device("cpu"))
    with clock:
        assert model.forward() == 7
    timed = clock.seconds["forward"]
    model.forward()
    assert clock.seconds["forward"] == timed > 0
    assert merged_length([(5, 7), (0, 2), (1, 3), (6, 6.5)]) == 5


def test_memory_that_is_held_is_counted_once():
    from memory import measure_held_gib

    before = measure_held_gib(torch.device("cpu"))
    tensor = torch.ones(2**18)
    view = tensor[2:]
    assert (measure_held_gib(torch.device("cpu")) - before) * 2**30 == pytest.approx(2**20, abs=2**12)
    assert len(view) == 2**18 - 2


def test_taps_keep_their_relative_height():
    from workload import scale_taps

    assert scale_taps([11, 23, 35, 47], 48, 48) == [11, 23, 35, 47]
    assert scale_taps([11, 23, 35, 47], 48, 8) == [1, 3, 5, 7]
    assert scale_taps([5], 6, 2) == [1]


def build_workload(**changes):
    from workload import Workload

    values = dict(preset="internvit_tiny", depth=2, crop_px=56, batch=1, world_size=1, device="cpu")
    return Workload(**{**values, **changes})


def test_an_unknown_preset_is_answered_with_the_known_ones(tmp_path):
    with pytest.raises(ConfigError, match=r"--preset nope: .* does not exist. Presets: .*internvit_tiny"):
        build_workload(preset="nope").write(tmp_path)


def test_a_crop_that_the_patch_does_not_divide(tmp_path):
    with pytest.raises(ConfigError, match="--crop 100: not a multiple of the 14 px patch"):
        build_workload(crop_px=100).build_run(tmp_path)


def test_processes_that_end_without_a_result_are_reported_with_their_log(tmp_path):
    from contestant import Contestant

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    message = r"(?s)variant 'ours' ended with code 1 in turn 1.*No such file or directory: .*workload\.json"
    with (
        pytest.raises(RuntimeError, match=message),
        Contestant("ours", "ds_seg", build_workload(), tmp_path, store) as ours,
    ):
        ours.take_turn(warmup=0, steps=1, measure_more=False)


def test_a_workload_survives_its_file(tmp_path):
    from workload import Workload

    workload = build_workload(depth=3, checkpointing="selective")
    workload.write(tmp_path)
    assert Workload.read(tmp_path) == workload
    assert json.loads(Path(tmp_path / "workload.json").read_text())["depth"] == 3
    run = workload.build_run(tmp_path)
    assert (run.model.backbone.depth, list(run.model.backbone.out_indices), run.global_batch) == (3, [2], 1)
    assert run.model.backbone.checkpointing == "selective"


@pytest.mark.parametrize(("as_view", "mib"), [(False, 4), (True, 0)])
def test_buckets_of_gradients_are_held(as_view, mib):
    """Measured with torch's profiler around three steps: one bucket of FP32 for all that is trained."""
    from memory import measure_held_gib

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        layer = torch.nn.Linear(1024, 1024, bias=False)
        before = measure_held_gib(torch.device("cpu"))
        wrapped = torch.nn.parallel.DistributedDataParallel(layer, gradient_as_bucket_view=as_view)
        held_gib = measure_held_gib(torch.device("cpu")) - before
        assert wrapped.module is layer and held_gib * 2**10 == pytest.approx(mib, abs=0.01)
        del wrapped  # as the group's last owner it would wait for gloo's threads, and they for the interpreter's lock
    finally:
        dist.destroy_process_group()
