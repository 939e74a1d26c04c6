"""The kinds of failure, the exit code that each one ends the process with, and words that messages share."""

from __future__ import annotations

import traceback
from collections.abc import Sequence

EXIT_OK = 0
EXIT_FAULT = 1
EXIT_USER_ERROR = 2
EXIT_STOPPED_BY_SIGNAL = 75
"""EX_TEMPFAIL: a checkpoint was saved and the scheduler may requeue the job."""
EXIT_INTERRUPTED = 130
"""Ctrl-C where there was nothing to save: 128 + SIGINT, as shells have it."""
_FULL_GPU = (
    "ds-seg: the GPU's memory is full. In training lower data.samples_per_gpu (a fixed global_batch stays what it is), "
    "recompute more (model.backbone.checkpointing='block'), keep more of the optimizer in host memory "
    "(offload_optimizer) or take more GPUs: `ds-seg plan` compares them. In an evaluation lower the window batch "
    "(evaluation.window_batch, --window-batch). If much is reserved by PyTorch but unallocated, set "
    "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True. A training goes on with --resume auto.\n"
)


class DsSegError(Exception):
    """A failure that ds_seg foresaw; its message is written for the person who runs it."""

    exit_code = EXIT_FAULT


class UserError(DsSegError):
    """The user's mistake: one message with the remedy, no traceback, exit code 2."""

    exit_code = EXIT_USER_ERROR


class ConfigError(UserError):
    """A config file, DeepSpeed JSON or override that can't mean what was wanted."""


class DataError(UserError):
    """A dataset folder, image or annotation that can't be used as it is."""


class WeightsError(UserError):
    """A weight file that doesn't fit the model it is loaded into."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, of another model or another kind of run, or that can't be written."""


class TrainingDiverged(DsSegError):
    """Too many optimizer steps in a row had a loss or a gradient that is not finite."""


class PrecisionError(DsSegError):
    """A parameter, buffer, gradient or optimizer state has another dtype than the run promised."""


class ExportError(DsSegError):
    """An exported file does not compute what the model computes that it was exported from."""


class StoppedBySignal(DsSegError):
    """The run was asked to stop (a signal, --max-time) and saved a checkpoint first."""

    exit_code = EXIT_STOPPED_BY_SIGNAL


def name_some(names: Sequence[object], most: int) -> str:
    """The first so many of them, and `...` in the place of more."""
    return ", ".join(map(str, names[:most])) + (", ..." if len(names) > most else "")


def count(number: int, noun: str) -> str:
    """A number and its noun: `1 process`, `2 micro-batches`."""
    return f"{number} {noun}" + ("" if number == 1 else "es" if noun.endswith(("s", "ch")) else "s")


def describe_fault(error: Exception, rank: int) -> str:
    """What a rank prints of a failure that nobody foresaw: its traceback, but for a data worker that was killed."""
    text = str(error).strip()
    if not text.startswith("DataLoader worker"):
        remedy = _FULL_GPU if type(error).__name__ == "OutOfMemoryError" else ""  # torch's, without importing torch
        return f"rank {rank} failed:\n{''.join(traceback.format_exception(error))}{remedy}"
    return (
        f"ds-seg: rank {rank}: {text.rstrip('.')}. If nobody killed it, the machine ran out of memory: give the job "
        "more of it, or lower data.workers_per_gpu, and go on with --resume auto."
    )
