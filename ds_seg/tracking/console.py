"""What a person sees while a run goes on: a bar on a terminal, plain lines in a log file."""

from __future__ import annotations

import contextlib
import io
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from tqdm import tqdm

_LINE_EVERY_S = 15.0


class LastingStream:
    """Standard output or error that a run outlives: what a full disk or a closed terminal does not take is dropped.

    Characters that its encoding lacks, as in names of files that are not UTF-8, are written as escapes.

    Args:
        stream: what is written to.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        """Write, if that is possible."""
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Hand on what was written, if that is possible."""
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        """Everything else is the stream's."""
        return getattr(self._stream, name)


class Console:
    """Prints the progress of a run; the same facts on a terminal and in a file.

    Args:
        total_steps: Last step of the run.
        first_step: Step that the run starts from (0, or the one it resumed from).
        stream: Where to print; standard output by default.
    """

    def __init__(self, total_steps: int, first_step: int = 0, stream: TextIO | None = None) -> None:
        self._total_steps = total_steps
        self._first_step = first_step
        self._stream = stream if stream is not None else sys.stdout
        self._started = time.perf_counter()
        self._miou: float | None = None
        self._bar = _make_bar(total_steps, "training", first_step, self._stream) if self._stream.isatty() else None

    def info(self, text: str) -> None:
        """Print a message without breaking the bar."""
        if self._bar is None:
            print(text, file=self._stream, flush=True)
        else:
            self._bar.write(text, file=self._stream)

    def warn(self, text: str) -> None:
        """Print a message that wants attention."""
        self.info(f"warning: {text}")

    def log_step(self, row: Mapping[str, Any], note: str = "") -> None:
        """Show a step: move the bar, or print a line; the note stands last."""
        facts, eta = format_row(row, self._miou), f"ETA {_clock(self._compute_eta_s(row['step']))}"
        if self._bar is None:
            self.info("  ".join(filter(None, [f"step {row['step']}/{self._total_steps}", facts, eta, note])))
            return
        self._bar.set_postfix_str("  ".join(filter(None, [facts, note])), refresh=False)
        self._bar.n = row["step"]
        self._bar.refresh()

    def log_evaluation(self, step: int, metrics: Mapping[str, float | None], table: str) -> None:
        """Print an evaluation's table and keep its mIoU in the lines that follow."""
        self._miou = metrics.get("eval/mIoU")
        self.info(f"evaluation at step {step}\n{table}")

    def close(self) -> None:
        """Take the bar down."""
        if self._bar is not None:
            self._bar.close()

    def _compute_eta_s(self, step: int) -> float:
        done = max(step - self._first_step, 1)
        return (time.perf_counter() - self._started) / done * (self._total_steps - step)


def track_images(total: int, label: str, stream: TextIO | None = None) -> Callable[[int], None]:
    """A callback that shows how many images are done: a bar on a terminal, a line every 15 s in a file.

    Args:
        total: Images of this rank.
        label: What is done to them.
        stream: Where to print; standard output by default.

    Returns:
        To be called with the number of images done.
    """
    stream = stream if stream is not None else sys.stdout
    if stream.isatty():
        bar = _make_bar(total, label, 0, stream)

        def move(done: int) -> None:
            bar.update(done - bar.n)
            if done == total:
                bar.close()

        return move
    last_line = time.perf_counter()

    def print_line(done: int) -> None:
        nonlocal last_line
        if time.perf_counter() - last_line >= _LINE_EVERY_S:
            last_line = time.perf_counter()
            print(f"{label}  {done}/{total} images of this rank", file=stream, flush=True)

    return print_line


def _make_bar(total: int, label: str, initial: int, stream: TextIO) -> tqdm:
    leave = label == "training"
    return tqdm(total=total, initial=initial, desc=label, file=stream, dynamic_ncols=True, leave=leave)


def format_row(row: Mapping[str, Any], miou: float | None = None) -> str:
    """A step's facts in one line; those that the row lacks are left out.

    Args:
        row: Keys of metrics.jsonl: `loss`, `lr_min`, `lr_max`, `grad_norm`, `grad_norm_clipped`, `images_per_s`,
            `memory_gib`.
        miou: Of the last evaluation, 0..1.
    """
    parts = []
    if row.get("loss") is not None:
        parts.append(f"loss {row['loss']:.3f}")
    if row.get("lr_max") is not None:
        parts.append(f"lr {row.get('lr_min', row['lr_max']):.1e}..{row['lr_max']:.1e}")
    if row.get("grad_norm") is not None:
        clipped = row.get("grad_norm_clipped")
        parts.append(f"grad {row['grad_norm']:.2f}" + (" (clipped)" if _is_less(clipped, row["grad_norm"]) else ""))
    if miou is not None:
        parts.append(f"mIoU {100 * miou:.1f}%")
    if row.get("images_per_s") is not None:
        parts.append(f"{row['images_per_s']:.1f} img/s")
    if row.get("memory_gib") is not None:
        parts.append(f"{row['memory_gib']:.1f} GiB")
    return "  ".join(parts)


def _is_less(clipped: float | None, norm: float) -> bool:
    return clipped is not None and clipped < norm * (1 - 1e-6)


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"
