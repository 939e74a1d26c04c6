"""The uninterrupted runs, made once for all test processes, and the rows of docs/faults.md."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from checkpoint_hash import hash_tensors
from command_line import TINY
from ds_seg.checkpoint.store import checkpoint_step, list_checkpoints
from ds_seg.config import CONFIGS_ROOT
from ds_seg.data.demo_scenes import write_demo_dataset
from life import Life, unfinished
from measured_rows import keep_row
from run_rows import read_rows
from story import EVALUATION_INTERVAL_STEPS, SAVE_INTERVAL_STEPS, Reference, Story

CONFIG = (
    TINY
    + """
runner = dict(max_iters={steps})
global_batch = 4
data = dict(samples_per_gpu=2)
checkpoint_config = dict(interval={save}, max_keep_ckpts=3)
evaluation = dict(interval={evaluate})
"""
)


@pytest.fixture(autouse=True)
def no_processes_left() -> Iterator[None]:
    """End what a failed test has left running."""
    yield
    for life in list(unfinished):
        life.end()


@pytest.fixture(scope="session")
def reference_of(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Callable[[int], Reference]:
    """Makes an uninterrupted run of so many steps, or finds it where another test process has made it."""
    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent

    def find(steps: int) -> Reference:
        folder = shared / f"reference-{steps}"
        with (shared / f"reference-{steps}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / "hashes.json").exists():
                make_reference(folder, steps)
        hashes = json.loads((folder / "hashes.json").read_text())
        return Reference(
            config=folder / "tiny.py",
            environment={"DS_SEG_DEMO_ROOT": str(folder / "data"), "WANDB_MODE": "disabled"},
            data=folder / "data",
            steps=steps,
            rows=read_rows(folder / "run"),
            hashes={int(step): value for step, value in hashes.items()},
        )

    return find


def make_reference(folder: Path, steps: int) -> None:
    """Train without a fault and keep every checkpoint's hash."""
    shutil.rmtree(folder, ignore_errors=True)  # of an attempt that failed
    folder.mkdir()
    config = CONFIG.format(
        base=str(CONFIGS_ROOT / "runs" / "demo.py"),
        steps=steps,
        save=SAVE_INTERVAL_STEPS,
        evaluate=EVALUATION_INTERVAL_STEPS,
    )
    (folder / "tiny.py").write_text(config)
    write_demo_dataset(folder / "data", train_images=16, val_images=6, size_px=112)
    life = Life(
        *("train", folder / "tiny.py", "--work-dir", folder / "run"),
        *("--cfg-options", f"checkpoint_config.max_keep_ckpts={steps}"),
        folder=folder,
        environment={"DS_SEG_DEMO_ROOT": str(folder / "data"), "WANDB_MODE": "disabled"},
    )
    ending = life.finish()
    assert ending.exit_code == 0, ending.output[-4000:]
    hashes = {checkpoint_step(path): hash_tensors(path) for path in list_checkpoints(folder / "run")}
    (folder / "hashes.json").write_text(json.dumps(hashes))


@pytest.fixture
def fault_row(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Keep a row of docs/faults.md."""
    return lambda **row: keep_row(request, "faults", row)


@pytest.fixture
def story(
    reference_of: Callable[[int], Reference], tmp_path: Path, fault_row: Callable[..., None]
) -> Callable[..., Story]:
    """Begins a run of so many steps that faults will interrupt."""

    def begin(
        steps: int,
        folder: Path = tmp_path,
        work_dir: Path | None = None,
        record: Callable[..., None] = fault_row,
    ) -> Story:
        folder.mkdir(exist_ok=True)
        return Story(reference_of(steps), folder, record, work_dir)

    return begin
