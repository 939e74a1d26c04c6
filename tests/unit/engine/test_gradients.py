"""What a step of the backbone does beside stepping, with DeepSpeed's engine and accelerator replaced."""

from collections import defaultdict

import pytest

from ds_seg.engine import gradients


class Backbone:
    """A DeepSpeed engine that notes what it is told, and makes its optimizer's state when it first steps."""

    def __init__(self, calls):
        self.calls, self.optimizer, self.state = calls, self, defaultdict(dict)

    def override_loss_scale(self, scale):
        self.calls.append(f"scale {scale:g}")

    def step(self):
        self.calls.append("step")
        self.state["flat"]["exp_avg"] = 0.0


@pytest.fixture
def calls(monkeypatch):
    """Calls of the accelerator and the engine, in order."""
    calls = []

    class Accelerator:
        def empty_cache(self):
            calls.append("empty_cache")

        def synchronize(self):
            calls.append("synchronize")

    monkeypatch.setattr(gradients, "get_accelerator", Accelerator)
    return calls


def test_the_first_step_makes_its_moments_in_memory_of_their_own(calls):
    backbone = Backbone(calls)
    gradients.step_scaled(backbone, norm=4.0, factor=0.25)
    step = ["scale 4", "step", "scale 1", "synchronize"]
    assert calls == ["empty_cache", *step] and backbone.joint_norm == 4.0
    calls.clear()
    gradients.step_scaled(backbone, norm=4.0, factor=0.25)
    assert calls == step
