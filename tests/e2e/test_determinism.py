"""The same command gives the same bits on CPU, whatever loads the data; another seed gives others."""

import pytest

from checkpoint_hash import hash_tensors
from command_line import Cli
from run_rows import read_rows

STEPS = 3
SHORT = [f"runner.max_iters={STEPS}", f"evaluation.interval={STEPS}", f"checkpoint_config.interval={STEPS}"]
RUNS = {
    "alone": {},
    "seed": {"arguments": ["--seed", "1"]},
    "no workers": {"options": ["data.workers_per_gpu=0"]},
    "three workers, deterministic": {"options": ["data.workers_per_gpu=3"], "arguments": ["--deterministic"]},
    "two": {"processes": 2},
    "two again": {"processes": 2},
}


@pytest.fixture(scope="module")
def bits(tmp_path_factory, scenes, tiny_config):
    """What every run leaves: its rows without times, and a hash over every tensor of its last checkpoint."""
    folder = tmp_path_factory.mktemp("determinism")
    return {name: train(Cli(folder, scenes), tiny_config, folder / name, **run) for name, run in RUNS.items()}


def train(cli, config, work_dir, arguments=(), options=(), processes=1):
    command = ["train", config, "--work-dir", work_dir, *arguments, "--cfg-options", *SHORT, *options]
    done = cli(*command, processes=processes, launcher="torchrun")
    assert done.returncode == 0, done.stderr
    assert ("deterministic algorithms only" in done.stdout + done.stderr) == ("--deterministic" in arguments)
    rows = read_rows(work_dir)
    assert len([row for row in rows if "loss" in row]) == STEPS
    return rows, hash_tensors(work_dir / "checkpoints" / f"step_{STEPS:06d}")


def test_two_processes_give_the_same_bits_twice(bits):
    assert bits["two"] == bits["two again"]


@pytest.mark.parametrize("other", ["no workers", "three workers, deterministic"])
def test_neither_workers_nor_deterministic_algorithms_change_a_bit_on_cpu(bits, other):
    """Against one worker and torch's default algorithms."""
    assert bits[other] == bits["alone"]


def test_another_seed_gives_other_bits(bits):
    rows, weights = bits["seed"]
    assert weights != bits["alone"][1]
    assert all(row["loss"] != other["loss"] for row, other in zip(rows, bits["alone"][0], strict=True) if "loss" in row)
