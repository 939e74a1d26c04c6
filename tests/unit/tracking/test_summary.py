"""summary.json has every promised key."""

from __future__ import annotations

import json

import pytest

from ds_seg.errors import DsSegError
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


def test_a_summary_that_can_not_be_written_says_what_is_safe(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        DsSegError, match=r"summary\.json can't be written \(.*its checkpoints are complete: `ds-seg evaluate`"
    ):
        write_summary(tmp_path / "file", make_summary())
