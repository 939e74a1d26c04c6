"""Save checkpoints, waiting for the disk or for the copy only; each gets its name when all of it is on the disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from ds_seg import __version__, distributed
from ds_seg.checkpoint.config_record import digest_config
from ds_seg.checkpoint.contents import collect_files, count_bytes
from ds_seg.checkpoint.host_copies import HostCopies, find_lack_of_memory
from ds_seg.checkpoint.manifest import FileEntry
from ds_seg.checkpoint.training_state import STATE_FILE, TrainingState, restate
from ds_seg.checkpoint.write import (
    FileContent,
    Save,
    commit,
    explained,
    leaving_nothing,
    list_files,
    prepare_folder,
    replace_file,
    validate_space,
    write_files,
)
from ds_seg.config import RunConfig
from ds_seg.engine.ema import WeightAverages
from ds_seg.engine.engines import Engines
from ds_seg.engine.precision import validate_precision
from ds_seg.supervision import stop
from ds_seg.supervision.progress import SLOW, enter_phase
from ds_seg.versions import find_versions

_PACKAGES = ("torch", "deepspeed", "safetensors")


class CheckpointSaver:
    """Saves both engines' weights, averages and optimizers and the run's state, time after time.

    Every method is a collective over all ranks. With `run.checkpoints.in_background`, `save` returns when the host
    holds a copy; a thread writes it, which issues no collective, and the checkpoint gets its name in the first `poll`
    that finds all ranks' threads done. Where a host has too little memory for the copies, every save waits for the
    disk.

    Args:
        engines: what is saved.
        run: the run.
        ema: averages of the weights; None where there are none.
        log: gets a line for each checkpoint.
    """

    def __init__(
        self,
        engines: Engines,
        run: RunConfig,
        ema: WeightAverages | None = None,
        log: Callable[[str], object] = lambda _line: None,
    ) -> None:
        self.engines, self.run, self.ema, self.log = engines, run, ema, log
        self._copies = HostCopies() if run.checkpoints.in_background else None
        self._thread = ThreadPoolExecutor(1, "checkpoint writer")
        self._pending: tuple[Save, Future[dict[str, FileEntry]]] | None = None
        self._started_s = self._waited_s = 0.0
        self._config_digest = digest_config(run.mmseg)

    def save(self, state: TrainingState) -> Path:
        """Save what the engines hold now; a save that is still in the background is waited for first.

        Returns:
            The folder of the checkpoint, which in the background appears later.

        Raises:
            CheckpointError: the disk has too little room or refuses something; nothing of it is left.
            PrecisionError: a tensor has another dtype than promised; nothing was written.
        """
        self.wait()
        validate_precision(self.engines)
        self._started_s = time.perf_counter()
        save = self._describe(state)
        with leaving_nothing(save):
            prepare_folder(save)
            files, present = self._collect(save, state)
            if self._copies is not None and not self._copies.used and (lack := find_lack_of_memory(files)):
                self.log(f"--checkpoint async needs copies: {lack}. Training waits until checkpoints are written.")
                self._copies = None
            if self._copies is None:
                entries = distributed.agree(lambda: write_files(save, files, present))
                return self._commit(save, entries)
            copied = self._copies.copy(files)
        self._pending = save, self._thread.submit(write_files, save, copied, present)
        self._waited_s = time.perf_counter() - self._started_s
        return save.final

    def amend(self, state: TrainingState) -> bool:
        """Store another state in the checkpoint of this step, whose weights are still those that the engines hold.

        Returns:
            False where that checkpoint is not there any more.

        Raises:
            CheckpointError: the disk refuses something; the checkpoint is as it was.
        """
        self.wait()
        save = self._describe(state)
        text = restate(save.final, state) if distributed.is_main() else ""
        if distributed.broadcast_object(text is None):
            return False
        with leaving_nothing(save):
            prepare_folder(save)
            replace_file(save, STATE_FILE, text or "")
        return True

    def poll(self) -> None:
        """Complete the save in the background if it is written on all ranks; to be called after every step.

        Raises:
            CheckpointError: it could not be written on some rank; nothing of it is left.
        """
        if self._pending is None:
            return
        written = self._pending[1]
        done = written.done()
        flags = [not done, done and written.exception() is not None]
        writing, failed = distributed.reduce_max(torch.tensor(flags, dtype=torch.int, device=self.engines.device))
        if failed or not writing:
            self.wait()

    def wait(self) -> None:
        """Complete the save in the background, if there is one, waiting for the disk.

        Raises:
            CheckpointError: it could not be written on some rank; nothing of it is left.
        """
        if self._pending is None:
            return
        enter_phase(f"waiting for {self._pending[0].final.name} to be written", patience=SLOW)
        started_s = time.perf_counter()
        (save, written), self._pending = self._pending, None
        with leaving_nothing(save):
            entries = distributed.agree(written.result)
            self._waited_s += time.perf_counter() - started_s
            self._commit(save, entries)

    def _describe(self, state: TrainingState) -> Save:
        run = self.run
        return Save(
            work_dir=run.work_dir,
            step=state.step,
            best=state.best_checkpoint,
            good_step=state.step - state.skipped_in_a_row,
            keep=run.checkpoints.keep,
            keep_every_steps=run.checkpoints.keep_interval_steps,
            world_size=run.world_size,
            config_digest=self._config_digest,
            versions={"ds_seg": __version__, **find_versions(_PACKAGES)},
        )

    def _collect(self, save: Save, state: TrainingState) -> tuple[dict[str, FileContent], list[str]]:
        """This rank's files, for which there is room, and its share of those that DeepSpeed has written by itself."""
        with explained(save.final):
            files = collect_files(self.engines, self.run, state, self.ema, save.temporary)
        present = list_files(save.temporary)[distributed.rank() :: distributed.world_size()]
        validate_space(save, sum(map(count_bytes, files.values())), len(files))
        return files, present

    def _commit(self, save: Save, entries: Mapping[str, FileEntry]) -> Path:
        folder = commit(save, entries)
        took_s = time.perf_counter() - self._started_s
        stop.pace.note_save(took_s)
        waited = f" in the background; training waited {self._waited_s:.1f} s" if self._copies is not None else ""
        self.log(f"saved {folder} in {took_s:.1f} s{waited}")
        return folder


def save_checkpoint(engines: Engines, run: RunConfig, state: TrainingState, ema: WeightAverages | None = None) -> Path:
    """Save one checkpoint and wait until it is complete; a collective over all ranks.

    Returns:
        The folder of the checkpoint.
    """
    saver = CheckpointSaver(engines, run, ema)
    folder = saver.save(state)
    saver.wait()
    return folder
