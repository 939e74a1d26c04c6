"""The two engines on 1, 2 and 4 gloo processes against one process of plain PyTorch, on the same global batches.

Measured in FP32 over 20 steps: losses and gradient norms agree to 2e-7 and 3e-7, all parameters to 3e-6 of what
training changed (3e-5 with every knob on). The farthest single tensor is always `patch_embed.proj.bias`, 1.4e-4: a
bias that shifts all patches alike is nearly undone by the BatchNorm at the end, so that its gradient is a difference of
large numbers, and AdamW divides by its size. Plain PyTorch in FP32 lies as far from plain PyTorch in FP64 there.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cases import BF16_CASES, CASES, CURVES, SUMMED_IN_BF16, SUMMED_IN_FP32
from comparison import (
    LOSS_TOLERANCE,
    NORM_TOLERANCE,
    PARAMETERS_TOLERANCE,
    STATISTICS_TOLERANCE,
    WORST_TENSOR_TOLERANCE,
    compare_curves,
    compare_parameters,
    compare_statistics,
    compare_worst_tensor,
)
from mutations import MUTATIONS
from plain_trainer import PlainTrainer
from ranks import run_ranks

WORKER = Path(__file__).with_name("worker.py")
TIMEOUT_S = 900
pytestmark = pytest.mark.timeout(4 * TIMEOUT_S)  # the first test starts all the processes
WORLDS = (1, 2, 4)
SUMS = (SUMMED_IN_BF16, SUMMED_IN_FP32)
PLAIN = "plain PyTorch, FP32"
every_case = pytest.mark.parametrize("case", CASES)
every_world = pytest.mark.parametrize("world", WORLDS)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Per world size, what rank 0 found for every case and mistake."""
    out = tmp_path_factory.mktemp("parity")
    for world in WORLDS:
        run_ranks(WORKER, world, out, timeout_s=TIMEOUT_S)
    return {world: torch.load(out / f"world{world}.pt") for world in WORLDS}


@pytest.fixture(scope="module")
def plain(trained):
    """The reference run of every case, from the weights that the engines started from."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    runs = {name: train_plain(recipe, trained[1][name]["initial"]) for name, recipe in {**CASES, **BF16_CASES}.items()}
    torch.set_num_threads(threads)
    return runs


def train_plain(recipe, initial, dtype=torch.float32):
    return PlainTrainer(recipe, {name: value.float() for name, value in initial.items()}, dtype).train()


@every_world
@every_case
def test_losses_equal_plain_training(trained, plain, claim, case, world):
    far = compare_curves(trained[world][case]["losses"], plain[case]["losses"])
    claim(case, measured=far, tolerance=LOSS_TOLERANCE, against=PLAIN, world=world)


@every_world
@every_case
def test_gradient_norms_equal_plain_training(trained, plain, claim, case, world):
    far = compare_curves(trained[world][case]["norms"], plain[case]["norms"])
    claim(case, measured=far, tolerance=NORM_TOLERANCE, against=PLAIN, world=world)


@every_world
@every_case
def test_parameters_equal_plain_training(trained, plain, claim, case, world):
    run = trained[world][case]
    assert run["final"].keys() == plain[case]["final"].keys()
    far = compare_parameters(run["final"], plain[case]["final"], run["initial"])
    claim(case, measured=far, tolerance=PARAMETERS_TOLERANCE, against=PLAIN, world=world)


@every_world
@every_case
def test_the_worst_parameter_equals_plain_training(trained, plain, claim, case, world):
    run = trained[world][case]
    far = compare_worst_tensor(run["final"], plain[case]["final"], run["initial"])
    claim(case, measured=far, tolerance=WORST_TENSOR_TOLERANCE, against=PLAIN, world=world)


@every_world
@every_case
def test_running_statistics_equal_plain_training(trained, plain, claim, case, world):
    run, wanted = trained[world][case]["final"], plain[case]["final"]
    batches = [name for name in wanted if name.endswith("num_batches_tracked")]
    assert all(run[name] == wanted[name] for name in batches) and batches
    far = compare_statistics(run, wanted)
    claim(case, measured=far, tolerance=STATISTICS_TOLERANCE, against=PLAIN, world=world)


@every_world
@pytest.mark.parametrize("case", [name for name, recipe in CASES.items() if recipe.ema_momentum])
def test_averages_equal_plain_training(trained, plain, claim, case, world):
    run = trained[world][case]
    far = compare_parameters(run["averages"], plain[case]["averages"], run["initial"])
    claim(case, measured=far, tolerance=PARAMETERS_TOLERANCE, against=PLAIN, world=world)
    assert compare_parameters(run["averages"], run["final"], run["initial"]) > 0.1


@every_case
def test_plain_training_in_fp64_is_as_far_from_plain_training_in_fp32(trained, plain, claim, case):
    """What rounding alone does to the worst parameter: the sharded runs must not lie ten times farther."""
    initial = trained[1][case]["initial"]
    exact = train_plain(CASES[case], initial, torch.float64)
    floor = compare_worst_tensor(plain[case]["final"], exact["final"], initial)
    far = max(compare_worst_tensor(trained[w][case]["final"], exact["final"], initial) for w in WORLDS)
    claim(f"{case} (plain FP32: {floor:.1e})", measured=far, tolerance=10 * floor, against="plain PyTorch, FP64")


@every_world
@pytest.mark.parametrize("case", [name for name, recipe in CASES.items() if recipe.clip_norm])
def test_clipping_bites_on_some_steps_and_not_on_others(trained, case, world):
    run, limit = trained[world][case], CASES[case].clip_norm
    for norm, factor in zip(run["norms"], run["factors"], strict=True):
        assert factor == pytest.approx(min(1.0, limit / (norm + 1e-6)), rel=1e-12)
    assert 5 < sum(factor < 1 for factor in run["factors"]) < 15


MEASURES = {
    "test_losses_equal_plain_training": (
        lambda run, plain: compare_curves(run["losses"], plain["losses"]),
        LOSS_TOLERANCE,
    ),
    "test_gradient_norms_equal_plain_training": (
        lambda run, plain: compare_curves(run["norms"], plain["norms"]),
        NORM_TOLERANCE,
    ),
    "test_parameters_equal_plain_training": (
        lambda run, plain: compare_parameters(run["final"], plain["final"], run["initial"]),
        PARAMETERS_TOLERANCE,
    ),
    "test_running_statistics_equal_plain_training": (
        lambda run, plain: compare_statistics(run["final"], plain["final"]),
        STATISTICS_TOLERANCE,
    ),
}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mistake_is_caught(trained, plain, caught, mutation):
    measure, tolerance = MEASURES[mutation.caught_by]
    far = measure(trained[2][mutation.name], plain[mutation.case])
    caught(mutation.name, by=f"{mutation.caught_by}[{mutation.case}-2]", measured=far, tolerance=tolerance)


BF16_PLAIN = "plain PyTorch, bf16 parameters with FP32 masters"
BF16_LOSS_TOLERANCE = 1e-3
BF16_PARAMETERS_TOLERANCE = 2e-2
two_worlds = pytest.mark.parametrize("world", [1, 2])


@two_worlds
@pytest.mark.parametrize("case", BF16_CASES)
def test_bf16_losses_equal_plain_training_in_bf16(trained, plain, claim, case, world):
    far = compare_curves(trained[world][case]["losses"], plain[case]["losses"])
    claim(case, measured=far, tolerance=BF16_LOSS_TOLERANCE, against=BF16_PLAIN, world=world)


@two_worlds
@pytest.mark.parametrize("case", BF16_CASES)
def test_bf16_parameters_equal_plain_training_in_bf16(trained, plain, claim, case, world):
    run = trained[world][case]
    far = compare_parameters(run["final"], plain[case]["final"], run["initial"])
    claim(case, measured=far, tolerance=BF16_PARAMETERS_TOLERANCE, against=BF16_PLAIN, world=world)


def test_bf16_curves_side_by_side(trained, plain, curves):
    """The picture of docs/fidelity.md; the curves are compared above."""
    in_fp32 = train_plain(BF16_CASES[CURVES].replace(bf16=False), trained[1][CURVES]["initial"])["losses"]
    sharded = {
        f"ds_seg, bf16, {world} {'process' if world == 1 else 'processes'}": trained[world][CURVES]["losses"]
        for world in (1, 2)
    }
    curves({"plain PyTorch, FP32": in_fp32, "plain PyTorch, bf16": plain[CURVES]["losses"], **sharded})
    assert compare_curves(plain[CURVES]["losses"], in_fp32) > compare_curves(*sharded.values())


@two_worlds
def test_summing_16_micro_batches_in_bf16_costs_little(trained, plain, claim, world):
    recipe, initial = BF16_CASES[SUMMED_IN_BF16], trained[1][SUMMED_IN_BF16]["initial"]
    in_fp32 = train_plain(recipe.replace(bf16=False), initial)["final"]
    far = {case: compare_parameters(trained[world][case]["final"], in_fp32, initial) for case in SUMS}
    far["plain PyTorch, bf16"] = compare_parameters(plain[SUMMED_IN_FP32]["final"], in_fp32, initial)
    for case in far:
        claim(case, measured=far[case], tolerance=BF16_PARAMETERS_TOLERANCE, against=PLAIN, world=world)
    assert far[SUMMED_IN_BF16] < 1.5 * far[SUMMED_IN_FP32]


def test_the_reference_is_not_the_engine():
    """The reference trainer imports nothing of ds_seg but the container of a batch."""
    for name in ("plain_trainer.py", "plain_model.py"):
        lines = [line for line in Path(__file__).with_name(name).read_text().splitlines() if "import" in line]
        assert [line for line in lines if "ds_seg" in line] in (
            [],
            ["from ds_seg.data.training_batches import MicroBatch"],
        )
        assert not any("deepspeed" in line for line in lines)
