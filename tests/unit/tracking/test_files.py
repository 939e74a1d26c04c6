"""Atomic files and what becomes of odd values in JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from ds_seg.files import write_text_atomic
from ds_seg.tracking.files import to_json_value, write_json_atomic


def test_odd_values_become_json():
    value = {
        "nan": float("nan"),
        "inf": [float("inf"), -float("inf")],
        "tensor": torch.tensor(1.5),
        "array": np.arange(2),
        "numpy": np.float32(0.5),
        "tuple": (1, True, None),
        "path": Path("a/b"),
        "dtype": torch.bfloat16,
        3: "key",
    }

    assert to_json_value(value) == {
        "nan": None,
        "inf": [None, None],
        "tensor": 1.5,
        "array": [0, 1],
        "numpy": 0.5,
        "tuple": [1, True, None],
        "path": "a/b",
        "dtype": "torch.bfloat16",
        "3": "key",
    }


def test_floats_come_back_bit_for_bit(tmp_path):
    values = np.random.default_rng(0).standard_normal(100).tolist()
    write_json_atomic(tmp_path / "new" / "a.json", values)

    assert json.loads((tmp_path / "new" / "a.json").read_text()) == values


def test_a_crash_before_the_rename_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_text_atomic(path, "old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))

    with pytest.raises(OSError, match="disk full"):
        write_text_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]  # a part of the new file would take space that may be what is missing


def test_nothing_temporary_is_left(tmp_path):
    write_text_atomic(tmp_path / "a.txt", "text")

    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]
