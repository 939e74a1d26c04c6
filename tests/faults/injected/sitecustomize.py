"""Makes a fault happen at an exact place in a rank; Python imports it at start where PYTHONPATH names its folder.

DS_SEG_FAULT says what: {"rank": 1, "place": "backward", "step": 7, "do": "kill"}. `step` is the index of the global
batch from which on it may happen; it happens once, or `times` times. When it does, a line of JSON goes to the file
DS_SEG_FAULT_LOG first. Without DS_SEG_FAULT nothing is touched.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from importlib.abc import MetaPathFinder
from pathlib import Path

FAULT = json.loads(os.environ.get("DS_SEG_FAULT", "{}"))
state = {"step": -1, "left": FAULT.get("times", 1), "main": os.getpid(), "save_began_s": 0.0, "save_s": None}


def is_due(place):
    """Whether the fault is to happen here and now; data workers, which are forks of the rank, don't count."""
    here = place == FAULT["place"] and state["step"] >= FAULT["step"] and os.getpid() == state["main"]
    return here and state["left"] > 0


def happen(delay_s=0.0):
    """Note the fault, and carry it out unless its place does."""
    state["left"] -= 1
    with Path(os.environ["DS_SEG_FAULT_LOG"]).open("a") as log:
        log.write(json.dumps({"time_s": time.time() + delay_s, "pid": os.getpid(), "step": state["step"]}) + "\n")
    if FAULT["do"] == "kill":
        if delay_s:  # by another process, which needs no turn of this one's interpreter
            subprocess.Popen(["sh", "-c", f"sleep {delay_s:.4f}; kill -KILL {os.getpid()}"], start_new_session=True)
        else:
            os.kill(os.getpid(), 9)


def wrap(owner, name, make):
    """Replace a function by what `make` returns for it."""
    setattr(owner, name, make(getattr(owner, name)))


def patch_step(module):
    def follow(call):
        def stepping(self, step, *args, **kwargs):
            state["step"] = step
            if is_due("clock"):
                happen()
                time.time = lambda true_time=time.time: true_time() + FAULT["do"]
            return call(self, step, *args, **kwargs)

        return stepping

    wrap(module.TwoEngineStep, "__call__", follow)


def patch_block(module):
    def interrupt(forward):
        def running(self, *args, **kwargs):
            if is_due("forward" if self.training else "evaluation"):
                happen()
            return forward(self, *args, **kwargs)

        return running

    wrap(module.Block, "forward", interrupt)


def patch_backbone(module):
    def interrupt(forward):
        def running(self, *args, **kwargs):
            maps = forward(self, *args, **kwargs)
            if self.training and is_due("backward"):
                maps[0].register_hook(lambda gradient: happen())
            if self.training and is_due("maps"):
                happen()
                maps = [map_BDhw * float(FAULT["do"]) for map_BDhw in maps]
            return maps

        return running

    wrap(module.InternViT, "forward", interrupt)


def patch_engine(module):
    def interrupt(step):
        def stepping(self, *args, **kwargs):
            result = step(self, *args, **kwargs)
            if is_due("step"):  # the backbone has made its step, the head has not
                happen()
            return result

        return stepping

    wrap(module.DeepSpeedEngine, "step", interrupt)


def patch_save(module):
    """A save lasts from the call until the checkpoint has its name, which in the background is some steps later."""

    def interrupt(save):
        def saving(*args, **kwargs):
            if is_due("save") and state["save_s"] is not None:
                happen(max(FAULT["part"] * state["save_s"], 1e-4))
            state["save_began_s"] = time.perf_counter()
            return save(*args, **kwargs)

        return saving

    def measure(commit):
        def committing(*args, **kwargs):
            result = commit(*args, **kwargs)
            state["save_s"] = time.perf_counter() - state["save_began_s"]
            return result

        return committing

    def fill_after(validate_space):
        def validating(*args, **kwargs):
            result = validate_space(*args, **kwargs)
            if is_due("space"):
                happen()
                fill_disk(Path(FAULT["do"]))
            return result

        return validating

    wrap(module.CheckpointSaver, "save", interrupt)
    wrap(module, "commit", measure)
    wrap(module, "validate_space", fill_after)


def fill_disk(ballast):
    """Leave a little room on the disk, not enough for a checkpoint."""
    with ballast.open("wb", buffering=0) as file:
        stats = os.statvfs(ballast)
        file.write(bytes(stats.f_bavail * stats.f_frsize - 64 * 1024))


PATCHES = {
    "ds_seg.engine.step": patch_step,
    "ds_seg.models.layers": patch_block,
    "ds_seg.models.internvit": patch_backbone,
    "deepspeed.runtime.engine": patch_engine,
    "ds_seg.checkpoint.save": patch_save,
}


class PatchAfterImport(MetaPathFinder):
    """Calls a module's patch when the module has been executed."""

    def find_spec(self, name, path, target=None):
        patch = PATCHES.pop(name, None)
        if patch is None:
            return None
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_patch(module):
            execute(module)
            patch(module)

        spec.loader.exec_module = execute_and_patch
        return spec


if FAULT and os.environ.get("RANK") == str(FAULT["rank"]):
    sys.meta_path.insert(0, PatchAfterImport())
