"""`ds-seg train`: from a config to a trained, evaluated and reported model."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_seg import distributed
from ds_seg.collector import resume_collector
from ds_seg.commands.arguments import add_config_arguments, run_options
from ds_seg.errors import EXIT_OK, StoppedBySignal

# What needs torch or mmseg is imported inside the functions, so that --help answers at once.
if TYPE_CHECKING:
    from ds_seg.checkpoint import TrainingState
    from ds_seg.config import RunConfig
    from ds_seg.data.training_batches import MicroBatch
    from ds_seg.engine.ema import WeightAverages
    from ds_seg.engine.engines import Engines
    from ds_seg.loop import LoopRecord
    from ds_seg.tracking.tracker import Tracker


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Describe the command."""
    parser = subparsers.add_parser(
        "train",
        help="fine-tune a backbone and its head",
        description="Fine-tune a ZeRO-3 sharded backbone and a replicated FP32 head, evaluate, and report. Starts "
        "alone or under deepspeed, torchrun or srun.",
    )
    add_config_arguments(parser)
    parser.add_argument("--work-dir", metavar="D", help="where everything is written (default: work_dirs/<run>)")
    parser.add_argument(
        "--resume",
        metavar="auto|TAG",
        help="resume from the newest complete checkpoint, or from this one: step_000100, latest, best, or a path",
    )
    parser.add_argument(
        "--checkpoint",
        default="sync",
        choices=("sync", "async"),
        help="async: training waits only for a copy to host memory, which a thread then writes (default: sync)",
    )
    parser.add_argument(
        "--load-from", metavar="F", help="start from a weight file (head too, if it has one) or a checkpoint"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="fixes data order, augmentation and noise (default: 0)")
    parser.add_argument(
        "--on-divergence",
        choices=["stop", "rollback"],
        help="after max_skipped_steps steps in a row whose loss or gradient is not finite: stop (default), or go back "
        "to the last good checkpoint and leave their data out, at most max_rollbacks (3) times",
    )
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="the same bits every time on GPUs too, at some cost in speed (docs/determinism.md)",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="run the backbone's blocks through torch.compile; the first step takes up to a minute longer",
    )
    parser.add_argument(
        "--max-time",
        metavar="[D-]HH:MM[:SS]",
        help="save and exit with code 75 before this much time has passed since the command started (Slurm's format)",
    )
    parser.add_argument(
        "--watchdog-timeout",
        type=float,
        metavar="S",
        help="seconds without progress after which a rank counts as hung and all ranks end (default: 600; 0: never)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command on this rank."""
    from ds_seg.engine.determinism import explained_operations, use_deterministic_algorithms

    if args.deterministic:
        use_deterministic_algorithms()
    distributed.initialize(watched=True)
    from ds_seg.resumption import resolve_run
    from ds_seg.supervision import supervised

    config = _settle(resolve_run(run_options(args)))
    watched = supervised(config.work_dir, watchdog_timeout_s=config.watchdog_timeout_s, max_time_s=config.max_time_s)
    with explained_operations(), watched:
        train(config)
    return EXIT_OK


def _settle(run: RunConfig) -> RunConfig:
    """The run with values for what its config leaves "auto" and memory decides; a collective over all ranks."""
    from ds_seg.planning.fitting import apply_fit, choose_fit, measure_room, needs_fitting

    device = distributed.device()
    if not needs_fitting(run, device.type):
        return run
    room = measure_room(device)
    fit = distributed.agree_on_main(
        lambda: choose_fit(
            run,
            memory_gib=room.process_gib,
            device_type=device.type,
            host_memory_gib=room.host_gib,
            nodes=room.nodes,
        )
    )
    if fit.warning:
        distributed.print_on_main(fit.warning)
    return apply_fit(run, fit)


def train(run: RunConfig) -> None:
    """Train as `run` says and leave a complete work dir; a collective over all ranks."""
    from ds_seg.checkpoint import TrainingState, resume_training
    from ds_seg.data.opening import open_datasets
    from ds_seg.engine.ema import WeightAverages
    from ds_seg.loop import TrainingLoop
    from ds_seg.predictions import PredictingEvaluator
    from ds_seg.rollback import train_with_rollbacks
    from ds_seg.session import Evaluator, build_engines, try_first_images
    from ds_seg.supervision import stop
    from ds_seg.supervision.progress import SLOW, enter_phase
    from ds_seg.supervision.signals import saving
    from ds_seg.workdir import find_resume_point, open_work_dir
    from ds_seg.workdir_lock import hold_work_dir

    resume_collector()
    enter_phase("opening the datasets")
    train_set, val_set = open_datasets(run, "train", "val")
    distributed.agree(lambda: next(_build_loader(run, train_set, TrainingState(), num_workers=0)))  # as a trial
    try_first_images(run, val_set)
    with contextlib.ExitStack() as stack:
        stack.enter_context(hold_work_dir(run.work_dir))
        resume_from = find_resume_point(run)
        weights = None if resume_from else run.load_from
        enter_phase("building the engines and loading weights", patience=SLOW)
        engines = build_engines(run, training=True, weights=weights, log=distributed.print_on_main)
        ema = WeightAverages(engines, run.ema) if run.ema else None
        if resume_from:
            enter_phase("resuming", patience=SLOW)
        state = resume_training(resume_from, engines, run, ema, verified=True) if resume_from else TrainingState()
        state.note_train_images(len(train_set))
        own_checkpoint = open_work_dir(run, state, resume_from)
        stack.enter_context(saving())
        tracker = stack.enter_context(_open_tracker(run, state.step, val_set))
        _describe_start(run, engines, state, tracker, resume_from)
        evaluate = PredictingEvaluator(Evaluator(run, val_set), engines, tracker, ema)
        loop = TrainingLoop(run, engines, state, tracker, evaluate, ema, saved_in=own_checkpoint)
        record = train_with_rollbacks(loop, lambda state: _open_loader(run, train_set, state, engines, ema))
        enter_phase("writing the summary and the report", patience=SLOW)
        _write_end(run, engines, loop.state, record, resume_from, ema, tracker)
        if record.stopped:
            raise StoppedBySignal(f"{record.stopped} It took {stop.age_s():.1f} s from the signal to the end.")


@contextlib.contextmanager
def _open_tracker(run: RunConfig, step: int, val_set: Any) -> Iterator[Tracker]:
    from ds_seg.tracking.tracker import build_tracker

    tracker = build_tracker(run, step, val_set.CLASSES, val_set.PALETTE)
    status = "failed"
    try:
        yield tracker
        status = "done"
    except StoppedBySignal:
        status = "stopped"
        raise
    finally:
        tracker.close(status)


def _describe_start(
    run: RunConfig, engines: Engines, state: TrainingState, tracker: Tracker, resume_from: Path | None
) -> None:
    import torch

    from ds_seg.config.batches import describe_batch
    from ds_seg.engine.groups import format_groups
    from ds_seg.summary import describe_backbone, describe_heads

    backbone, heads = describe_backbone(engines.backbone.module), describe_heads(engines.heads)
    for note in run.notes:
        tracker.info(note)
    if resume_from:
        unread = f"; {run.load_from} is not read, since the checkpoint has all weights" if run.load_from else ""
        tracker.info(f"resumed from {resume_from}{unread}")
    elif run.load_from is None:
        tracker.warn("no pretrained weights: the backbone starts from random values (give some with --load-from F)")
    held = ", ".join(f"{count:,}" for count in backbone["parameters_held_per_rank"])
    tracker.info(
        f"backbone {backbone['type']}: {backbone['parameters']:,} parameters in {backbone['dtype']}, "
        f"{backbone['trainable']:,} trainable, ZeRO stage 3; held per rank: {held}"
    )
    tracker.info(f"head {heads['type']}: {heads['parameters']:,} parameters in {heads['dtype']} on every rank")
    if run.ema:
        tracker.info(
            f"EMA: evaluations and pictures use averages of the weights, kept in FP32 and saved in each checkpoint; "
            f"momentum {run.ema.momentum:g}, interval {run.ema.interval_steps}, warm-up {run.ema.warm_up_steps} steps"
        )
    tracker.info(f"parameter groups:\n{format_groups(engines.param_groups)}")
    _warn_of_idle_cores(engines, tracker)
    if run.compile:
        tracker.info("--compile: the first step takes a minute or so longer, and so does the first after a resume")
    if torch.are_deterministic_algorithms_enabled():
        tracker.info("deterministic algorithms only (--deterministic): slower on GPUs")
    tracker.info(
        f"steps {state.step} to {run.schedule.max_steps}, global batch "
        f"{describe_batch(run.global_batch, run.micro_batch, run.world_size)}, seed {run.seed}; work dir {run.work_dir}"
    )


def _warn_of_idle_cores(engines: Engines, tracker: Tracker) -> None:
    import torch

    threads, cores = torch.get_num_threads(), distributed.cores_per_process()
    if engines.trainable_backbone and engines.backbone.zero_cpu_offload() and threads < cores:
        tracker.warn(
            f"the optimizer in host memory steps on {threads} of the {cores} cores that a process has: set "
            f"OMP_NUM_THREADS={cores} (torchrun sets it to 1)"
        )


def _open_loader(
    run: RunConfig, train_set: Any, state: TrainingState, engines: Engines, ema: WeightAverages | None
) -> Iterator[MicroBatch]:
    from ds_seg.data.forks import keep_out_of_forks

    keep_out_of_forks([*engines.optimizer_tensors(), *(ema.backbone.values() if ema else ())])
    return _build_loader(run, train_set, state, num_workers=run.workers)


def _build_loader(run: RunConfig, train_set: Any, state: TrainingState, *, num_workers: int) -> Iterator[MicroBatch]:
    from ds_seg.data.training_batches import build_train_loader

    return build_train_loader(
        train_set,
        seed=run.seed,
        micro_batch=run.micro_batch,
        accumulation_steps=run.accumulation_steps,
        rank=distributed.rank(),
        world_size=run.world_size,
        start_step=state.step,
        stop_step=run.schedule.max_steps,
        num_workers=num_workers,
        pin_memory=distributed.device().type == "cuda",
        max_bad_samples=run.max_bad_samples,
        left_out=state.left_out,
    )


def _write_end(
    run: RunConfig,
    engines: Engines,
    state: TrainingState,
    record: LoopRecord,
    resume_from: Path | None,
    ema: WeightAverages | None,
    tracker: Tracker,
) -> None:
    from ds_seg.summary import measure_summary
    from ds_seg.tracking.report import write_report
    from ds_seg.tracking.summary import write_summary

    summary = measure_summary(run, engines, state, record, resume_from, ema)
    if distributed.is_main():
        reported = tracker.write("reports", lambda: write_report(run.work_dir, summary))
        written = [write_summary(run.work_dir, {**summary, "lost_records": tracker.lost})]
        written += [run.work_dir / "report.html"] if reported else []
        tracker.info(f"wrote {' and '.join(map(str, written))}")
    distributed.barrier()  # the first rank to end a stopped run ends all of them
