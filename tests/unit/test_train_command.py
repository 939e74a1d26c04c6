"""What `ds-seg train` tells before its first step."""

from types import SimpleNamespace

import pytest
import torch

from ds_seg import distributed
from ds_seg.commands import train
from ds_seg.planning import fitting


def test_a_training_has_no_timeout_beside_the_watchdogs(monkeypatch):
    def initialize(*, watched=False):
        raise InterruptedError(f"watched: {watched}")

    monkeypatch.setattr(distributed, "initialize", initialize)
    with pytest.raises(InterruptedError, match="watched: True"):
        train.run(SimpleNamespace(deterministic=False))


def test_too_little_host_memory_is_told_of_before_anything_is_built(monkeypatch, capsys):
    monkeypatch.setattr(fitting, "needs_fitting", lambda *_: True)
    monkeypatch.setattr(fitting, "choose_fit", lambda *_, **room: fitting.Fit(None, {}, "note", f"warning: {room}"))
    monkeypatch.setattr(fitting, "apply_fit", lambda *_: "settled")
    monkeypatch.setattr(fitting, "measure_room", lambda _device: fitting.Room(80.0, 32.0, 2))
    assert train._settle("run") == "settled"
    said = capsys.readouterr().out
    assert "'memory_gib': 80.0" in said and "'host_memory_gib': 32.0" in said and "'nodes': 2" in said


@pytest.mark.parametrize(
    ("offloaded", "threads", "cores", "told"),
    [(True, 1, 8, True), (True, 8, 8, False), (True, 2, 1, False), (False, 1, 8, False)],
)
def test_cores_that_an_offloaded_optimizer_leaves_idle_are_told_of(monkeypatch, offloaded, threads, cores, told):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(distributed, "cores_per_process", lambda: cores)
    backbone = SimpleNamespace(zero_cpu_offload=lambda: offloaded)
    warnings = []
    train._warn_of_idle_cores(
        SimpleNamespace(trainable_backbone=[torch.zeros(1)], backbone=backbone), SimpleNamespace(warn=warnings.append)
    )
    wanted = "steps on 1 of the 8 cores that a process has: set OMP_NUM_THREADS=8"
    assert [wanted in warning for warning in warnings] == [True] * told
