"""Memory, traffic, time and checkpoints by arithmetic, against REFERENCE figures and DeepSpeed's own estimators."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs

from ds_seg.config import RunOptions, build_run_config
from ds_seg.planning.candidates import read_states
from ds_seg.planning.communication import compute_traffic, count_live_parameters
from ds_seg.planning.hardware import GIB, Hardware, place
from ds_seg.planning.memory import (
    States,
    compute_checkpoint_bytes,
    compute_copy_bytes,
    compute_gpu_memory,
    compute_host_memory,
)
from ds_seg.planning.model_size import ModelSize, measure_model
from ds_seg.planning.simulation import PARTS
from ds_seg.planning.step_costs import StepCost
from ds_seg.planning.step_time import compute_step_time

P = 5_902_793_600
SIZE = ModelSize(P, P, P, 122_918_400, 40_960_000, 48, 486_550, 486_550, 6_401)
ZERO = {
    "reduce_bucket_size": 200_000_000,
    "sub_group_size": 100_000_000,
    "stage3_prefetch_bucket_size": 122_880_000,
    "stage3_max_live_parameters": 10**9,
    "stage3_max_reuse_distance": 0,
}
STATES = States(bf16=True, offloaded=0.0, pin_memory=False, ema=False, zero=ZERO)
COST = StepCost(Counter({"activations": 4e8, "logits and loss": 5e8}), 16.34e12, 65.4e12, 4.4e12, 4e9, 0.0, 2.0)
ON_GPU = ("parameters", "gradients", "master", "moments")


def hardware(gpus=8, memory=80.0, **changes):
    return Hardware(gpus, place(gpus), memory, **changes)


def gpu(states=STATES, gpus=8, size=SIZE):
    return compute_gpu_memory(size, COST, states, hardware(gpus))


def traffic(there, size=SIZE, zero=ZERO, **changes):
    return compute_traffic(size, zero, 2, there, **{"sent_bytes": 2, **changes})


@pytest.mark.parametrize("gpus", [1, 8, 64])
def test_states_are_16_bytes_a_parameter_over_all_gpus(gpus):
    parts = gpu(gpus=gpus)
    together = sum(parts[name] for name in ON_GPU)
    assert together == pytest.approx(94.5e9 / gpus, rel=1e-3) and parts["parameters"] == 2 * P / gpus


@pytest.mark.parametrize(("gpus", "nodes"), [(1, 1), (8, 1), (64, 8)])
def test_deepspeeds_estimator_agrees(gpus, nodes):
    """It counts 18 bytes a parameter, with FP32 gradients where we have bf16 ones, and no activations."""
    _, gpu_bytes, largest = estimate_zero3_model_states_mem_needs(
        P, SIZE.largest, gpus // nodes, nodes, cpu_offload=False, cpu_offload_params=False
    )
    ours = sum(gpu(gpus=gpus)[name] for name in ON_GPU)
    assert gpu_bytes - largest == pytest.approx(ours + 2 * P / gpus, rel=1e-6)
    host, offloaded, largest = estimate_zero3_model_states_mem_needs(
        P, SIZE.largest, gpus // nodes, nodes, cpu_offload=True, cpu_offload_params=False, additional_buffer_factor=1
    )
    states = replace(STATES, offloaded=1.0)
    assert offloaded - largest == pytest.approx(gpu(states, gpus)["parameters"], rel=1e-6)
    parts = compute_host_memory(SIZE, states, hardware(gpus), workers=0)
    ours = sum(parts[name] for name in ("master", "moments", "gradients"))
    assert ours == pytest.approx(host + 2 * P / nodes, rel=1e-6)  # bf16 gradients beside FP32 ones


def test_the_optimizer_in_host_memory_leaves_parameters_on_the_gpu():
    parts = gpu(replace(STATES, offloaded=1.0), gpus=1)
    assert parts["parameters"] == 2 * P and parts["gradients"] == parts["master"] == parts["moments"] == 0


def test_a_part_of_the_optimizer_in_host_memory():
    """16 bytes a parameter of FP32 state and gradient where it is stepped, and all gradients once more on the host."""
    states = replace(STATES, offloaded=0.25)
    parts, host = gpu(states, gpus=1), compute_host_memory(SIZE, states, hardware(1), workers=0)
    assert sum(parts[name] for name in ON_GPU) == pytest.approx(2 * P + 0.75 * 16 * P)
    assert sum(host[name] for name in ("master", "moments", "gradients")) == pytest.approx(0.25 * 16 * P + 2 * P)


def test_gradients_move_behind_the_computation_if_memory_is_pinned():
    """2 bytes down and up for every micro-batch, 4 down for what is stepped on the host, 25 GB/s."""
    states = replace(STATES, offloaded=0.25)
    unpinned, pinned = (
        compute_step_time(SIZE, COST, replace(states, pin_memory=pin), hardware(1), 2) for pin in (0, 1)
    )
    assert pinned.offload_s == pytest.approx((2 * 4 + 0.25 * 4) * P / 25e9) and unpinned.offload_s == 0
    assert unpinned.optimizer_s == pytest.approx(pinned.optimizer_s + pinned.offload_s)
    all_of_it = compute_step_time(SIZE, COST, replace(states, offloaded=1.0), hardware(1), 2)
    assert unpinned.optimizer_s < all_of_it.optimizer_s
    assert replace(pinned, compute_s=0.1, optimizer_s=0.1).bound.startswith("PCIe")


@pytest.mark.parametrize("said", [{}, {"pin_memory": False}, {"pin_memory": True}])
def test_memory_is_pinned_where_deepspeed_pins_it(said):
    offload = {"device": "cpu", **said}
    states = read_states({"zero_optimization": {"offload_optimizer": offload}}, SimpleNamespace(bf16=True, ema=None))
    assert states.pin_memory == DeepSpeedZeroOffloadOptimizerConfig(**offload).pin_memory


def test_pinned_memory_is_rounded_to_powers_of_two():
    pinned = replace(STATES, offloaded=1.0, pin_memory=True)
    rounding = compute_host_memory(SIZE, pinned, hardware(1), 0)["pinned memory's rounding"]
    flat = 2**34 - 2 * P
    groups = P / (1e8 + SIZE.largest / 2) * (2**29 - 4 * (1e8 + SIZE.largest / 2))
    assert rounding == pytest.approx(flat + groups, rel=1e-6)
    assert compute_host_memory(SIZE, replace(pinned, pin_memory=False), hardware(1), 0)["pinned memory's rounding"] == 0


def test_weights_pass_through_host_memory_at_the_start():
    """All shards of a process at once, before its workers start; what an offloaded optimizer takes later is more."""
    parts = compute_host_memory(SIZE, STATES, hardware(1), workers=4)
    assert sum(parts.values()) == pytest.approx(4 * GIB + 2 * P) and parts["processes"] == 8 * GIB
    offloaded = compute_host_memory(SIZE, replace(STATES, offloaded=0.25), hardware(1), workers=4)
    assert offloaded["weights at the start"] == 0
    assert compute_host_memory(SIZE, STATES, hardware(8), workers=4)["weights at the start"] == 0


def test_a_frozen_backbone_has_no_states():
    parts = gpu(size=replace(SIZE, trainable=0))
    assert all(parts[name] == 0 for name in ("gradients", "master", "moments", "reduce buckets"))
    assert parts["parameters"] == 2 * P / 8


def test_what_heads_allocate_stands_beside_their_states():
    parts = compute_gpu_memory(SIZE, replace(COST, peak=Counter(dict.fromkeys(PARTS, 1e8))), STATES, hardware())
    assert all(parts[part] == 1e8 for part in PARTS)
    assert parts["head"] == 4 * (SIZE.head + SIZE.head_buffers) + 16 * SIZE.head


@pytest.mark.parametrize(("scatters", "elements"), [(True, 2 * 200_000_000), (False, 200_000_000)])
def test_a_reduce_bucket_is_copied_only_where_it_is_scattered(scatters, elements):
    parts = gpu(replace(STATES, zero={**ZERO, "reduce_scatter": scatters}))
    assert parts["reduce buckets"] == 2 * elements


def test_averages_take_four_bytes_where_the_masters_are():
    ema = replace(STATES, ema=True)
    assert gpu(ema)["averages (EMA)"] == 4 * (P / 8 + SIZE.head)
    for part in (0.25, 1.0):
        offloaded = replace(ema, offloaded=part)
        assert gpu(offloaded)["averages (EMA)"] == pytest.approx(4 * ((1 - part) * P / 8 + SIZE.head))
        assert compute_host_memory(SIZE, offloaded, hardware(8), 0)["averages (EMA)"] == pytest.approx(4 * part * P)


def test_live_parameters_follow_the_reuse_distance():
    """A gather of a block stays in its buffer while the one in use, three more and what is kept are whole or coming."""
    assert count_live_parameters(SIZE, ZERO, 1) == 0
    in_use, buffer = SIZE.block + 3 * 122_880_000, SIZE.block
    assert count_live_parameters(SIZE, ZERO, 8) == in_use + buffer
    assert count_live_parameters(SIZE, {**ZERO, "stage3_max_reuse_distance": 10**9}, 8) == 5 * 10**8 + in_use + buffer
    assert count_live_parameters(SIZE, {**ZERO, "stage3_max_live_parameters": 3 * SIZE.block}, 8) == 4 * SIZE.block
    assert count_live_parameters(SIZE, {**ZERO, "stage3_prefetch_bucket_size": 0}, 8) == 2 * SIZE.block
    assert count_live_parameters(SIZE, {**ZERO, "stage3_max_reuse_distance": 2 * P}, 8) == P


def test_a_gather_of_everything_arrives_beside_everything():
    """Measured with DINOv2-S on two processes, a prefetch of 5e7: 40.6 MiB in one buffer, copied to 42 MiB."""
    size = measure_model(build_run_config(RunOptions("camvid_dinov2s_full"), 1).model)
    zero = {**ZERO, "stage3_prefetch_bucket_size": 50_000_000, "stage3_param_persistence_threshold": 0}
    assert count_live_parameters(size, zero, 2) == 2 * size.backbone


def test_persistent_parameters_stay_whole():
    """Measured with DINOv2-S on two processes: 42.0 MiB more are held between steps where all of them persist."""
    size = measure_model(build_run_config(RunOptions("camvid_dinov2s_full"), 1).model)
    zero = {**ZERO, "stage3_prefetch_bucket_size": 0, "stage3_param_persistence_threshold": 0}
    vectors, blocks = 100 * 384 + 12 * (1152 + 1536), 2 * size.block  # one that is whole, and its buffer
    assert count_live_parameters(size, zero, 2) == blocks
    assert count_live_parameters(size, {**zero, "stage3_param_persistence_threshold": 2000}, 2) == blocks + vectors
    everything = {**zero, "stage3_param_persistence_threshold": 10**9}
    assert count_live_parameters(size, everything, 2) == size.backbone
    assert count_live_parameters(size, {**everything, "stage3_model_persistence_threshold": 10**6}, 2) == blocks + 10**6


def test_nothing_is_whole_while_the_optimizer_steps():
    """Measured with DINOv2-S on two processes, 56 px: one sub-group of all parameters takes 42.1 MiB, and no more."""
    one_group = {**ZERO, "sub_group_size": 10**10}
    parts = gpu(replace(STATES, zero=one_group), gpus=2)
    assert parts["optimizer step"] + parts["live parameters"] + COST.peak.total() == pytest.approx(4 * P / 2)
    all_kept = {**one_group, "stage3_max_reuse_distance": 2 * P}
    assert gpu(replace(STATES, zero=all_kept), gpus=2)["optimizer step"] == 0


def test_traffic_of_a_micro_batch():
    large = traffic(hardware(4096))
    assert large.total / 1e9 == pytest.approx(35.4, abs=0.05)
    assert traffic(hardware(1)).total == 0
    assert traffic(hardware(2)).total == pytest.approx(6 * P / 2)
    kept = traffic(hardware(4096), zero={**ZERO, "stage3_max_reuse_distance": 2 * P})
    assert kept.gathered_backward == 0 and kept.total == pytest.approx(large.total * 2 / 3)


def test_gradients_sent_or_summed_in_fp32_take_twice_as_much():
    assert traffic(hardware(), sent_bytes=4).reduced == 2 * traffic(hardware()).reduced
    sent, summed = gpu(replace(STATES, sent_bytes=4)), gpu(replace(STATES, sum_bytes=4))
    assert sent["reduce buckets"] == 2 * gpu()["reduce buckets"] and sent["gradients"] == gpu()["gradients"]
    assert summed["gradients"] == 2 * gpu()["gradients"] and summed["optimizer step"] == 0
    offloaded = replace(STATES, offloaded=1.0)
    hosts = [compute_host_memory(SIZE, replace(offloaded, sum_bytes=width), hardware(1), 0) for width in (2, 4)]
    assert hosts[1]["gradients"] - hosts[0]["gradients"] == 2 * P


@pytest.mark.parametrize(
    ("deepspeed", "sum_bytes", "sent_bytes"),
    [
        ({}, 2, 2),
        ({"data_types": {"grad_accum_dtype": "fp32"}}, 4, 2),
        ({"communication_data_type": "FP32"}, 2, 4),
        ({"communication_data_type": "bf16", "data_types": {}}, 2, 2),
    ],
)
def test_widths_of_gradients_are_read_from_the_json(deepspeed, sum_bytes, sent_bytes):
    run = build_run_config(RunOptions("demo"), 1)
    states = read_states({**run.deepspeed, **deepspeed}, run)
    assert (states.sum_bytes, states.sent_bytes) == (sum_bytes, sent_bytes)
    in_fp32 = replace(run, deepspeed={**run.deepspeed, "bf16": {"enabled": False}})
    states = read_states(in_fp32.deepspeed, in_fp32)
    assert (states.parameter_bytes, states.sum_bytes, states.sent_bytes) == (4, 4, 4)


def test_an_fp32_backbone_has_masters_beside_its_parameters():
    """Measured on 2 CPU processes, DINOv2-S: 20 bytes a parameter, halved, are held between steps."""
    parts = gpu(replace(STATES, bf16=False, sum_bytes=4, sent_bytes=4), gpus=1)
    assert sum(parts[name] for name in ON_GPU) == 20 * P


def test_hpz_gathers_inside_the_node():
    there = hardware(64)
    zeros = [{**ZERO, "zero_hpz_partition_size": sharing} for sharing in (1, 8)]
    slow, fast = (traffic(there, zero=zero) for zero in zeros)
    assert fast.seconds < slow.seconds and fast.total == slow.total
    gathers = P / SIZE.block
    assert slow.seconds - fast.seconds == pytest.approx(gathers * 1e-6 * (3.4 * (56 - 7) + 14 * 7))
    cards = [traffic(hardware(64, interconnect_gbps=40), zero=zero) for zero in zeros]
    rest_s = slow.gathered_backward * (1 / 32e9 - 1 / 300e9)
    assert cards[0].seconds - cards[1].seconds - (slow.seconds - fast.seconds) == pytest.approx(rest_s)
    assert traffic(there, zero={**ZERO, "zero_hpz_partition_size": 16}) == slow  # copies over two nodes


@pytest.mark.parametrize(("sharing", "kept", "copied"), [(1, 0, 0), (8, 0, P / 8), (8, P / 2, P / 16), (8, 2 * P, 0)])
def test_hpz_copies_what_the_forward_pass_lets_go_of(sharing, kept, copied):
    zero = {**ZERO, "zero_hpz_partition_size": sharing, "stage3_max_reuse_distance": 2 * kept}
    assert gpu(replace(STATES, zero=zero), gpus=64)["copies inside the node (hpZ)"] == pytest.approx(2 * copied)


def test_a_ring_over_nodes_has_all_their_network_cards():
    assert [hardware(n).collective_gb_per_s for n in (8, 64)] == [300, 300]
    assert hardware(64, interconnect_gbps=100).collective_gb_per_s == pytest.approx(80)
    assert Hardware(64, 64, 80).collective_gb_per_s == pytest.approx(40)
    assert hardware(8).ring_s == pytest.approx(7 * 3.4e-6) == hardware(8).ring_in_node_s
    assert hardware(512).ring_s == pytest.approx((448 * 3.4 + 63 * 14) * 1e-6)
    assert hardware(1).ring_s == 0


@pytest.mark.parametrize(("gpus", "nodes"), [(1, 1), (8, 1), (9, 3), (12, 2), (64, 8), (68, 17), (11, 11)])
def test_nodes_have_as_many_gpus_each(gpus, nodes):
    assert place(gpus) == nodes and gpus % nodes == 0


def test_a_frozen_trunk_is_not_gathered_again_and_has_no_backward_pass():
    frozen = replace(SIZE, trainable=10**8, used_again=10**8)
    assert traffic(hardware()).gathered_backward == pytest.approx(2 * P * 7 / 8)
    assert traffic(hardware(), frozen).gathered_backward == pytest.approx(2e8 * 7 / 8)
    assert COST.model_flops == 3 * COST.forward_flops
    assert replace(COST, backbone_flops=COST.forward_flops).model_flops == COST.forward_flops


def test_time_and_what_binds_it():
    free = hardware(1)
    time = compute_step_time(SIZE, COST, STATES, free, 16)
    products_s, attention_s = 61.0e12 / (0.65 * 989e12), 4.4e12 / (0.33 * 989e12)
    assert time.communication_s == 0 and time.compute_s == pytest.approx(16 * (products_s + attention_s), rel=1e-3)
    assert "computation" in time.bound
    slow = compute_step_time(SIZE, COST, STATES, hardware(64, interconnect_gbps=10), 1)
    assert slow.bound.startswith("communication") and slow.total_s > slow.communication_s > slow.compute_s
    offloaded = compute_step_time(SIZE, COST, replace(STATES, offloaded=1.0), free, 1)
    assert "host memory" in offloaded.bound and offloaded.optimizer_s > time.optimizer_s


def test_attention_has_a_rate_of_its_own():
    time, slower = (
        compute_step_time(SIZE, COST, STATES, hardware(1, attention_utilisation=share), 16) for share in (0.5, 0.1)
    )
    assert slower.compute_s - time.compute_s == pytest.approx(16 * 4.4e12 / 989e12 * (1 / 0.1 - 1 / 0.5))


def test_kernels_that_only_read_and_write_take_their_time():
    moving = replace(COST, moved_bytes=36e9)
    time, longer = (compute_step_time(SIZE, cost, STATES, hardware(1), 16).compute_s for cost in (COST, moving))
    assert longer - time == pytest.approx(16 * 36e9 / 2000e9)


def test_gpu_hours_of_the_published_schedule():
    """35 H100-hours for 80k steps of 16 crops at half the peak, counted without recomputation."""
    once, half = replace(COST, backbone_flops=49.0e12), {"utilisation": 0.5, "attention_utilisation": 0.5}
    compute_s = compute_step_time(SIZE, once, STATES, hardware(1, **half), 16).compute_s
    assert compute_s * 80_000 / 3600 == pytest.approx(35, rel=0.01)


def test_a_checkpoint_has_weights_masters_and_moments():
    heads = 12 * SIZE.head + 4 * SIZE.head_buffers
    assert compute_checkpoint_bytes(SIZE, STATES) == 12 * P + heads
    assert compute_checkpoint_bytes(SIZE, replace(STATES, ema=True)) == 16 * P + heads + 4 * SIZE.head


def test_python_takes_its_time_for_every_block_and_micro_batch():
    time = compute_step_time(SIZE, COST, STATES, hardware(1), 16)
    assert time.host_s == pytest.approx(16 * 48 * 2e-3) and time.total_s == time.compute_s + time.optimizer_s
    frozen, blockwise = replace(SIZE, used_again=10**8), replace(COST, host_ms_a_block=6.0)
    forward_s = 16 * 48 * 4e-3 / 3
    assert compute_step_time(frozen, blockwise, STATES, hardware(1), 16).host_s == pytest.approx(forward_s)
    bound = compute_step_time(SIZE, replace(COST, backbone_flops=1e9), STATES, hardware(1), 16)
    assert bound.total_s == pytest.approx(bound.host_s + bound.optimizer_s) and bound.bound.startswith("Python")
    on_cpu = compute_step_time(SIZE, COST, STATES, hardware(8, overlaps=False), 16)
    one_by_one = on_cpu.compute_s + on_cpu.communication_s + on_cpu.host_s + on_cpu.optimizer_s + on_cpu.head_reduce_s
    assert on_cpu.total_s == pytest.approx(one_by_one) and on_cpu.communication_s > 0


def test_a_copy_of_a_checkpoint_is_pinned_in_powers_of_two_where_its_original_is_on_a_gpu():
    offloaded = replace(STATES, offloaded=1.0)
    assert compute_copy_bytes(SIZE, offloaded, hardware(64)) == compute_checkpoint_bytes(SIZE, offloaded) / 8
    group = 100_000_000 + SIZE.largest / 64 / 2
    part = (P / 64) * 4  # less than a sub-group
    assert part < 4 * group
    rounded = compute_checkpoint_bytes(SIZE, STATES) / 64 + 3 * (2**29 - part)
    assert compute_copy_bytes(SIZE, STATES, hardware(64)) == pytest.approx(8 * rounded)


def test_context_and_fragmentation_are_stated_assumptions():
    parts = gpu(gpus=1)
    assert parts["CUDA context and fragmentation"] == pytest.approx(1.5 * GIB + 0.05 * 9e8)
    assert any("1.5 GiB" in line and "5%" in line for line in hardware().describe())
