"""One rank of startup.py: `ds-seg` up to the end of the first training step, with the time of each part written down.

Usage: startup_worker.py ARGUMENTS_OF_DS_SEG, with the folder for the result in STARTUP_OUT. Every moment counts for one
part only: an import within a part counts for its package, a part within a part for the inner one.
"""

from __future__ import annotations

import resource
import sys
import time

_BEGAN = time.time()

import functools  # noqa: E402
import importlib.abc  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
from collections.abc import Callable, Sequence  # noqa: E402
from importlib.machinery import ModuleSpec, PathFinder  # noqa: E402
from pathlib import Path  # noqa: E402
from types import ModuleType  # noqa: E402
from typing import Any  # noqa: E402

PARTS = {
    ("ds_seg.distributed.group", "initialize"): "process group",
    ("ds_seg.resumption", "resolve_run"): "config",
    ("ds_seg.data.opening", "open_datasets"): "datasets",
    ("ds_seg.workdir", "open_work_dir"): "work dir",
    ("ds_seg.tracking.tracker", "build_tracker"): "tracker",
    ("ds_seg.engine.engines", "build_modules"): "modules",
    ("ds_seg.models.probe", "probe_heads"): "trial of the heads",
    ("ds_seg.session", "load_weights"): "weights",
    ("ds_seg.engine.engines", "_wrap_backbone"): "DeepSpeed engine",
    ("ds_seg.engine.engines", "Engines.__init__"): "head engine",
    ("ds_seg.commands.train", "_describe_start"): "description",
    ("ds_seg.loop", "TrainingLoop.__init__"): "loop",
    ("ds_seg.loop", "TrainingLoop._fetch"): "first data",
    ("ds_seg.engine.step", "TwoEngineStep.__call__"): "first step",
}
"""Module and function -> what it is called."""
HEAVY = (
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torchvision.models",
    "matplotlib",
    "wandb",
    "transformers",
    "pandas",
    "scipy",
)
"""What would make a start slow."""
_OWN_PACKAGES = ("torch", "deepspeed", "mmcv", "mmseg", "torchvision", "wandb", "numpy", "cv2", "matplotlib", "ds_seg")


class Clock:
    """Gives every moment of this process to the innermost part that is under way."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self._stack = ["the rest"]
        self._wall_s, self._cpu_s = time.perf_counter(), _cpu_s()

    def enter(self, part: str) -> None:
        """Begin a part within the one under way."""
        self._book()
        self._stack.append(part)

    def leave(self) -> None:
        """End the innermost part."""
        self._book()
        self._stack.pop()

    def _book(self) -> None:
        wall_s, cpu_s = time.perf_counter(), _cpu_s()
        spent = self.seconds.setdefault(self._stack[-1], [0.0, 0.0])
        spent[0] += wall_s - self._wall_s
        spent[1] += cpu_s - self._cpu_s
        self._wall_s, self._cpu_s = wall_s, cpu_s


def _cpu_s() -> float:
    """Of this process and of those that it has started and seen to their end."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


class TimedImports(importlib.abc.MetaPathFinder):
    """Books the execution of every module, and wraps the functions of PARTS as they come into being."""

    def __init__(self, clock: Clock, end: Callable[[], None]) -> None:
        self._clock, self._end = clock, end

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The ordinary specification, with a loader that is timed."""
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None and hasattr(spec.loader, "exec_module"):
            self._time(spec.loader, name)
        return spec

    def _time(self, loader: Any, name: str) -> None:
        execute, package = loader.exec_module, name.partition(".")[0]

        def exec_module(module: ModuleType) -> None:
            self._clock.enter(f"import {package}" if package in _OWN_PACKAGES else "import others")
            try:
                execute(module)
            finally:
                self._clock.leave()
            for (module_name, function), part in PARTS.items():
                if module_name == name:
                    self._wrap(module, function, part)

        loader.exec_module = exec_module

    def _wrap(self, owner: Any, name: str, part: str) -> None:
        outer, _, inner = name.rpartition(".")
        owner = getattr(owner, outer) if outer else owner
        function = getattr(owner, inner)

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._clock.enter(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._clock.leave()
                if part == "first step":
                    self._end()

        setattr(owner, inner, timed)


def main() -> None:
    """Run `ds-seg` and end after its first step."""
    clock, before_s = Clock(), _cpu_s()

    def end() -> None:
        import torch.distributed as dist

        ended = time.time()
        result = {"began": _BEGAN, "ended": ended, "python_cpu_s": before_s, "cpu_s": _cpu_s(), "parts": clock.seconds}
        result["loaded"] = [name for name in HEAVY if name in sys.modules]
        Path(os.environ["STARTUP_OUT"], f"rank{os.environ['RANK']}.json").write_text(json.dumps(result))
        dist.barrier()
        os._exit(0)

    sys.path.pop(0)  # the benchmarks' folder: -m ds_seg would not have it
    sys.meta_path.insert(0, TimedImports(clock, end))
    from ds_seg.__main__ import main as run

    run()


if __name__ == "__main__":
    main()
