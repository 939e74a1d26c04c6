from types import SimpleNamespace

import pytest

from ds_seg.config import RunOptions, build_run_config
from ds_seg.planning.candidates import Batch
from ds_seg.planning.command import build_train_arguments

STEPS = 1000
POLICIES = {
    "step": {"policy": "step", "step": [400, 700]},
    "one step": {"policy": "step", "step": 400, "warmup": "linear", "warmup_iters": 10},
    "periods": {"policy": "CosineRestart", "min_lr": 0.0, "periods": [600, 400], "restart_weights": [1, 1]},
}


@pytest.mark.parametrize(
    ("policy", "wanted"),
    [
        ("step", ["lr_config.step=[100,175]"]),
        ("one step", ["lr_config.warmup_iters=3", "lr_config.step=100"]),
        ("periods", ["lr_config.periods=[150,100]"]),
    ],
)
def test_what_is_counted_in_steps_shrinks_with_the_run(policy, wanted):
    options = {"runner.max_iters": STEPS, "lr_config": {"_delete_": True, **POLICIES[policy]}}
    run = build_run_config(RunOptions("demo", cfg_options=options), 1)
    candidate = SimpleNamespace(
        batch=Batch(4, run.micro_batch, run.accumulation_steps, STEPS // 4),
        checkpointing=run.model.backbone.get("checkpointing"),
        states=SimpleNamespace(zero={"stage": 3}),
    )
    arguments = build_train_arguments(run, "demo", [], candidate)
    assert arguments[-len(wanted) :] == wanted and f"runner.max_iters={STEPS // 4}" in arguments
