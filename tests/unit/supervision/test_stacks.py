"""Where a rank counts as waiting for others, by stacks as they are under NCCL; simulated, for there is no GPU."""

import gc
import sys
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch

from ds_seg import distributed
from ds_seg.supervision import stacks

SITE = "/venv/lib/python3.11/site-packages/"
STEP = ("/ds_seg/engine/step.py", "_forward_backward")
BACKWARD = (STEP, (SITE + "torch/_tensor.py", "backward"), (SITE + "torch/autograd/graph.py", "_engine_run_backward"))
EVENT = (SITE + "torch/cuda/streams.py", "synchronize")
HOOK = (SITE + "deepspeed/runtime/zero/partitioned_param_coordinator.py", "fetch_sub_module")
READER = ((threading.__file__, "_bootstrap"), ("/ds_seg/supervision/watchdog.py", "_run"))


def stack(*frames):
    """Frames from the outermost to the innermost."""
    innermost = None
    for path, name in frames:
        code = SimpleNamespace(co_filename=path, co_name=name)
        innermost = SimpleNamespace(f_code=code, f_lineno=7, f_back=innermost)
    return innermost


@pytest.mark.parametrize(
    ("device", "main", "others", "place", "waiting"),
    [
        ("cuda", (STEP, HOOK, EVENT), (), "cuda/streams.py:7 in synchronize", True),
        ("cuda", (STEP, (SITE + "torch/cuda/__init__.py", "synchronize")), (), "__init__.py:7 in synchronize", True),
        ("cuda", (STEP, (SITE + "torch/cuda/__init__.py", "set_device")), (), "__init__.py:7 in set_device", False),
        ("cuda", (STEP, ("/ds_seg/models/sync_batchnorm.py", "forward")), (), "sync_batchnorm.py:7", True),
        ("cuda", BACKWARD, (READER,), "graph.py:7 in _engine_run_backward", True),
        ("cuda", BACKWARD, (READER, (HOOK, EVENT)), "cuda/streams.py:7 in synchronize", True),
        ("cuda", BACKWARD, (READER, (HOOK,)), "partitioned_param_coordinator.py:7 in fetch_sub_module", False),
        ("cpu", BACKWARD, (READER,), "graph.py:7 in _engine_run_backward", False),
        ("cpu", (*BACKWARD, HOOK, (SITE + "deepspeed/comm/comm.py", "wait")), (), "comm.py:7 in wait", True),
        ("cuda", (("/ds_seg/data/loader.py", "fetch"),), (READER,), "data/loader.py:7 in fetch", False),
    ],
)
def test_waiting_for_others_is_told_from_work_of_ones_own(monkeypatch, device, main, others, place, waiting):
    frames = {threading.main_thread().ident: stack(*main), **{n: stack(*frames) for n, frames in enumerate(others)}}
    monkeypatch.setattr(stacks, "sys", SimpleNamespace(_current_frames=lambda: dict(frames)))
    monkeypatch.setattr(distributed, "device", lambda: torch.device(device))
    found, is_waiting = stacks.describe_main_thread()
    assert place in found
    assert is_waiting is waiting


def test_what_a_step_holds_is_let_go_though_somebody_looked_at_it():
    def forward(layers):
        if layers:
            return forward(layers - 1)
        looking = threading.Thread(target=stacks.describe_main_thread)
        looking.start()
        looking.join()
        return stacks.describe_main_thread()

    def step():
        activations = torch.zeros(1)
        forward(layers=8)
        return weakref.ref(activations)

    gc.disable()  # which would find a cycle, some day
    try:
        assert step()() is None
    finally:
        gc.enable()


def test_a_thread_of_python_is_told_from_others():
    started, ended = threading.Event(), threading.Event()

    def wait():
        started.set()
        ended.wait()

    thread = threading.Thread(target=wait)
    thread.start()
    started.wait()
    frames = sys._current_frames()
    ended.set()
    thread.join()
    assert stacks._is_of_python(frames[thread.ident])
    assert not stacks._is_of_python(frames[threading.main_thread().ident])
