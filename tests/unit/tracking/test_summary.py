"""summary.json has every promised key."""

from __future__ import annotations

import json

import pytest

from ds_seg.tracking.summary import SUMMARY_KEYS, write_summary


def make_summary():
    return {key: dict.fromkeys(inner, 1) if inner else 1 for key, inner in SUMMARY_KEYS.items()}


def test_a_complete_summary_is_written(tmp_path):
    path = write_summary(tmp_path, make_summary() | {"loss_last": float("nan"), "extra": 2})

    written = json.loads(path.read_text())
    assert path == tmp_path / "summary.json"
    assert written["loss_last"] is None
    assert written["extra"] == 2
    assert set(written) >= set(SUMMARY_KEYS)


def test_missing_keys_are_our_own_fault_and_named(tmp_path):
    summary = make_summary()
    del summary["mIoU"], summary["head"]["dtype"], summary["step_time_s"]["p95"]

    with pytest.raises(AssertionError, match=r"would lack \['mIoU', 'head\.dtype', 'step_time_s\.p95'\]"):
        write_summary(tmp_path, summary)
    assert not (tmp_path / "summary.json").exists()
