"""What is printed of a failure that nobody foresaw, and how messages list names."""

import os
import signal

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from ds_seg.errors import count, describe_fault, name_some


class KillsItsWorker(Dataset):
    """As the system does when memory runs out."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_data_worker_is_told_with_the_remedy():
    with pytest.raises(RuntimeError) as raised:
        list(DataLoader(KillsItsWorker(), num_workers=1))
    told = describe_fault(raised.value, 3)
    assert told.startswith("ds-seg: rank 3: DataLoader worker (pid") and ". If nobody killed it" in told
    assert "lower data.workers_per_gpu, and go on with --resume auto." in told and "\n" not in told


def test_any_other_failure_is_told_with_its_traceback():
    try:
        [][0]
    except IndexError as error:
        told = describe_fault(error, 1)
    assert told.startswith("rank 1 failed:\nTraceback") and told.endswith("IndexError: list index out of range\n")
    assert "[][0]" in told


def test_a_full_gpu_is_told_with_its_traceback_and_the_remedy():
    told = describe_fault(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.20 GiB."), 2)
    assert (
        told.startswith("rank 2 failed:\n") and "Tried to allocate 1.20 GiB.\nds-seg: the GPU's memory is full." in told
    )
    assert "lower data.samples_per_gpu" in told and told.endswith("--resume auto.\n")


def test_more_names_than_a_message_has_room_for():
    assert name_some(["a", "b"], 2) == "a, b" and name_some((7, 8, 9), 2) == "7, 8, ..."


def test_one_is_not_counted_in_the_plural():
    assert [count(1, "process"), count(2, "process"), count(1, "micro-batch"), count(0, "micro-batch")] == [
        *("1 process", "2 processes", "1 micro-batch", "0 micro-batches")
    ]
    assert count(3, "crop") == "3 crops"
