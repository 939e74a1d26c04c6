"""One rank of test_save_distributed.py: saves a tiny training with and without waiting for the disk.

Usage: save_worker.py OUTPUT_FOLDER [CHECK ...]
"""

from __future__ import annotations

import contextlib
import dataclasses
import resource
import shutil
import sys
import threading
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

from checks import run_checks
from ds_seg import distributed, files
from ds_seg.checkpoint import (
    CheckpointSaver,
    TrainingState,
    checkpoint_bytes,
    choose_resume_point,
    host_copies,
    list_checkpoints,
    load_weights_from_checkpoint,
    resume_training,
    save,
    write,
)
from ds_seg.checkpoint.manifest import read_manifest, verify_files
from ds_seg.checkpoint.store import checkpoints_folder
from ds_seg.config import EmaSettings, RunConfig
from ds_seg.engine.ema import WeightAverages
from ds_seg.engine.engines import build_modules
from engine_setup import digest, make_run, start, train
from engine_worker import catch, flip_byte
from sharded import change_saving

OUT = Path(sys.argv[1])
EMA = EmaSettings(momentum=0.4, interval_steps=1, warm_up_steps=10)
KINDS = {
    "averaged": ({}, EMA),
    "frozen": ({"freeze_vit": True}, EMA),
    "part": ({"freeze_vit": True, "unfreeze_pos_embed": True}, None),
}


def in_background(run: RunConfig, name: str) -> RunConfig:
    return change_saving(dataclasses.replace(run, work_dir=OUT / name), in_background=True, keep=9)


@contextlib.contextmanager
def held_back(here: bool = True) -> Iterator[threading.Event]:
    """Let this rank's writing begin only once the event is set."""
    gate, own = threading.Event(), save.write_files

    def write_later(*arguments):
        assert gate.wait(60)
        return own(*arguments)

    save.write_files = write_later if here else own
    try:
        yield gate
    finally:
        save.write_files = own


def names(run: RunConfig) -> list[str]:
    distributed.barrier()
    found = sorted(path.name for path in checkpoints_folder(run.work_dir).iterdir())
    distributed.barrier()
    return found


def check_same_bits() -> dict:
    """Save now; copy, train on, and only then write: the same files, and of them the same run."""
    report = {}
    for kind, (options, settings) in KINDS.items():
        run = make_run("bf16", OUT / f"{kind}_sync", **options)
        engines, train_step = start(run)
        ema = WeightAverages(engines, settings) if settings else None
        train(train_step, range(1))
        state = TrainingState(step=1, scheduled_steps=1, best_checkpoint="step_000001")
        now = CheckpointSaver(engines, run, ema).save(state)
        saved = digest(engines)
        later = in_background(run, f"{kind}_async")
        with held_back() as gate:
            saver = CheckpointSaver(engines, later, ema)
            folder = saver.save(state)
            train(train_step, range(1, 3))
            if ema is not None:
                ema.update(1)
            saver.poll()
            early = names(later)
            gate.set()
            saver.wait()
        again, _ = start(later)
        ema_again = WeightAverages(again, settings) if settings else None
        fresh = digest(again) != saved
        resumed = resume_training(folder, again, later, ema_again)
        first = names(later)
        saver.save(dataclasses.replace(state, step=2))
        saver.wait()
        report[kind] = {
            "files": read_manifest(folder).files == read_manifest(now).files,
            "count": len(read_manifest(folder).files),
            "moved": digest(engines) != saved and fresh,
            "early": early,
            "names": first,
            "second": names(later),
            "resumed": digest(again) == saved and resumed == state,
        }
    return report


def check_polls() -> dict:
    """Rank 1 writes late: nothing is committed before, on either rank, and two saves do not overlap."""
    run = in_background(make_run("bf16"), "polls")
    engines, train_step = start(run)
    lines: list[str] = []
    saver = CheckpointSaver(engines, run, log=lines.append)
    report: dict = {}
    with held_back(distributed.rank() == 1) as gate:
        saver.save(TrainingState(step=1))
        for step in range(2):
            train(train_step, range(step, step + 1))
            saver.poll()
        report["waiting"] = names(run)
        gate.set()
        while not list_checkpoints(run.work_dir):  # collective polls until the one that commits, on all ranks the same
            saver.poll()
            distributed.barrier()
        report["committed"] = names(run)
    with held_back(distributed.rank() == 1) as gate:
        saver.save(TrainingState(step=2))
        threading.Timer(0.5, gate.set).start()
        saver.save(TrainingState(step=3))
        report["second"] = [name for name in names(run) if name != "step_000003" and "tmp" not in name]
        saver.wait()
        saver.wait()
    report["all"] = names(run)
    report["lines"] = lines
    return report


def check_amendment() -> dict:
    """A score is found out while the checkpoint is being written; and once more when somebody has removed it."""
    run = in_background(make_run("bf16"), "amended")
    engines, train_step = start(run)
    saver = CheckpointSaver(engines, run)
    train(train_step, range(1))
    with held_back(distributed.rank() == 1) as gate:
        folder = saver.save(TrainingState(step=1, evaluation_due=True))
        threading.Timer(0.5, gate.set).start()
        scored = TrainingState(step=1, best_score=0.5, best_checkpoint="step_000001")
        report: dict = {"amended": saver.amend(scored), "names": names(run)}
    verify_files(folder, distributed.rank(), 2)
    again, _ = start(run)
    report["state"] = resume_training(folder, again, run) == scored
    report["weights"] = digest(again) == digest(engines)
    distributed.barrier()
    if distributed.is_main():
        shutil.rmtree(folder)
    distributed.barrier()
    report["gone"] = saver.amend(scored)
    report["left"] = names(run)
    return report


def check_little_memory() -> dict:
    """Rank 1 sees too little memory for copies: both ranks write at once, then and later."""
    run = in_background(make_run("bf16"), "little_memory")
    engines, _ = start(run)
    lines: list[str] = []
    own = host_copies.measure_free_bytes
    host_copies.measure_free_bytes = lambda: 1 << 40 if distributed.is_main() else 1000
    try:
        saver = CheckpointSaver(engines, run, log=lines.append)
        found = []
        for step in (1, 2):
            saver.save(TrainingState(step=step))
            found.append(names(run))
            host_copies.measure_free_bytes = own
    finally:
        host_copies.measure_free_bytes = own
    return {"names": found, "lines": lines}


@contextlib.contextmanager
def small_files_only(here: bool) -> Iterator[None]:
    """A limit on the size of this process's files stands for a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18 if here else limits[0], limits[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def check_full_disk() -> dict:
    """A disk that refuses on rank 1 alone, or has too little room, when saving now and in the background."""
    report = {}
    engines, train_step = start(make_run("bf16"))
    for kind in ("sync", "async"):
        run = in_background(make_run("bf16"), f"full_{kind}")
        run = change_saving(run, in_background=kind == "async")
        saver = CheckpointSaver(engines, run)
        saver.save(TrainingState(step=1))
        saver.wait()
        with small_files_only(distributed.rank() == 1):
            message = catch(saver.save, TrainingState(step=2))
            if kind == "async":
                report["async_started"] = message
                train(train_step, range(1))
                saver._pending[1].exception(60)
                distributed.barrier()
                message = catch(saver.poll)
        report[kind] = message
        report[f"{kind}_names"] = names(run)
        usage, own = namedtuple("usage", "free"), shutil.disk_usage
        write.shutil.disk_usage = lambda _folder, usage=usage: usage(1000 if distributed.is_main() else 1 << 40)
        report[f"{kind}_room"] = catch(saver.save, TrainingState(step=3))
        write.shutil.disk_usage = own
        report[f"{kind}_room_names"] = names(run)
        saver.save(TrainingState(step=4))
        saver.wait()
        report[f"{kind}_after"] = names(run)
    return report


def check_own_disks() -> dict:
    """Each rank sees a disk of its own under the same path, as two machines do that share none."""
    files._SHOWN_AFTER_S = 0.0
    report = {}
    engines, _ = start(make_run("bf16"))
    for kind in ("sync", "async"):
        run = in_background(make_run("bf16"), f"own_disks_{kind}/node{distributed.rank()}")
        saver = CheckpointSaver(engines, change_saving(run, in_background=kind == "async"))
        message = catch(saver.save, TrainingState(step=1))
        report[kind] = catch(saver.wait) if kind == "async" else message
        report[f"{kind}_names"] = names(run)
    return report


def check_fallback() -> dict:
    """Rank 1's shard of the newest checkpoint is damaged; files of others lie beside the older one's."""
    run = change_saving(make_run("bf16", OUT / "fallback"), keep=9)
    engines, train_step = start(run)
    saver, digests = CheckpointSaver(engines, run), []
    for step in range(2):
        train(train_step, range(step, step + 1))
        saver.save(TrainingState(step=step + 1, scheduled_steps=step + 1))
        digests.append(digest(engines))
    older, newer = list_checkpoints(run.work_dir)
    if distributed.is_main():
        flip_byte(newer / "backbone" / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt")
        for name in ("notes.txt", "backbone/old.pt"):
            (older / name).write_bytes(b"not of this checkpoint")
    distributed.barrier()
    warnings: list[str] = []
    chosen = choose_resume_point(run.work_dir, "auto", warnings.append)
    again, _ = start(run)
    state = resume_training(chosen, again, run, verified=True)
    backbone, heads = build_modules(run)
    return {
        "chosen": chosen.name,
        "warnings": warnings,
        "resumed": digest(again) == digests[0] and state.step == 1,
        "averaged": load_weights_from_checkpoint(older, backbone, heads).averaged,
        "tag": catch(choose_resume_point, run.work_dir, newer.name, warnings.append),
        "latest": catch(choose_resume_point, run.work_dir, "latest", warnings.append),
        "absent": catch(choose_resume_point, run.work_dir, "step_000009", warnings.append),
    }


def check_sizes() -> dict:
    """Bytes on the disk beside those that the planner counts with."""
    report = {}
    for kind, (options, settings) in KINDS.items():
        backbone, heads = build_modules(make_run("bf16", **options))
        parameters = list(backbone.parameters())
        trained = sum(p.ds_numel for p in parameters if p.requires_grad)
        report[kind] = {
            "counted": checkpoint_bytes(
                trained=trained,
                frozen=sum(p.ds_numel for p in parameters) - trained,
                heads=sum(p.numel() for p in heads.parameters()),
                head_buffers=sum(b.numel() for b in heads.buffers()),
                averaged=settings is not None,
            ),
            "files": {
                name: entry["bytes"]
                for name, entry in read_manifest(OUT / f"{kind}_sync" / "checkpoints" / "step_000001").files.items()
                if name.endswith((".pt", ".safetensors"))
            },
        }
    verify_files(OUT / "averaged_async" / "checkpoints" / "step_000001", 0, 1)
    return report


if __name__ == "__main__":
    run_checks(globals())
