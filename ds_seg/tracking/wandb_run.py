"""Weights & Biases: one run on global rank 0 that may fail without the training noticing."""

from __future__ import annotations

import contextlib
import netrc
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

import numpy as np
import psutil

from ds_seg.config.hooks import WandbSettings
from ds_seg.evaluation.pictures import MOST_IN_PALETTE, Palette, Picture, draw_comparison
from ds_seg.files import write_text_atomic
from ds_seg.tracking.files import to_json_value

if TYPE_CHECKING:
    import wandb

_IGNORED_ID = 255
_INIT_TIMEOUT_S = 30.0
_FINISH_TIMEOUT_S = 120.0
"""A job that has done its work does not hold its GPUs longer than this for a network that is gone."""
_EARLY_FINISH_TIMEOUT_S = 10.0
_MOST_WAITING = 200
"""Records that wait for wandb, pictures among them."""
_OUR_ARGUMENTS = ("config", "dir", "id", "resume", "settings")


class WandbRun:
    """Sends rows, evaluations and pictures to a wandb run; an error is reported once and training goes on.

    wandb is only talked to from a thread: a service of it that hangs (wandb 0.31 blocks once its socket is full) or a
    slow disk below it then costs records, not time.

    Args:
        run: as `wandb.init` returned it.
        warn: prints what went wrong.
    """

    def __init__(self, run: wandb.Run, warn: Callable[[str], None]) -> None:
        self._run = run
        self._warn = warn
        self._warned = False
        self._lost = 0
        self._jobs: queue.Queue[Callable[[], object] | None] = queue.Queue(_MOST_WAITING)
        self._thread = threading.Thread(target=self._work, name="wandb records", daemon=True)
        self._thread.start()
        # Charts follow our own step: wandb's counter drops rows that go back, as a resume does.
        self._submit(
            lambda: [run.define_metric(group, step_metric="step") for group in ("train/*", "eval/*", "predictions/*")]
        )

    def log_step(self, row: Mapping[str, Any]) -> None:
        """Log a row of metrics.jsonl under `train/`."""
        values = {f"train/{key}": value for key, value in row.items() if key != "step" and value is not None}
        self._submit(lambda: self._run.log({"step": row["step"], **values}))

    def log_evaluation(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Log `eval/*` scalars and a table of the IoU by class."""
        prefix = "eval/IoU/"

        def send() -> None:
            import wandb

            classes = [[key[len(prefix) :], value] for key, value in metrics.items() if key.startswith(prefix)]
            scalars = {key: value for key, value in metrics.items() if value is not None}
            table = wandb.Table(columns=["class", "IoU"], data=classes)
            self._run.log({"step": step, **scalars, "eval/IoU_table": table})

        self._submit(send)

    def log_pictures(
        self, step: int, pictures: Sequence[Picture], class_names: Sequence[str], palette: Palette
    ) -> None:
        """Log each image under `predictions/<name>`, with prediction and ground truth as masks to switch on and off.

        Of more classes than wandb's masks hold, comparisons are logged.
        """
        labels = dict(enumerate(class_names)) | {_IGNORED_ID: "ignored"}

        def send() -> None:
            import wandb

            images: dict[str, wandb.Image] = {}
            for name, image_HW3, prediction_HW, label_HW in pictures:
                key = f"predictions/{name}"
                if len(class_names) > MOST_IN_PALETTE:
                    comparison_HW3 = draw_comparison(image_HW3, prediction_HW, label_HW, palette, class_names)
                    images[key] = wandb.Image(comparison_HW3)
                    continue
                masks = {"prediction": {"mask_data": prediction_HW.astype(np.uint8), "class_labels": labels}}
                if label_HW is not None:
                    masks["ground_truth"] = {"mask_data": label_HW.astype(np.uint8), "class_labels": labels}
                images[key] = wandb.Image(image_HW3, masks=masks)
            self._run.log({"step": step, **images})

        self._submit(send)

    def finish(self, status: str) -> None:
        """End the run; the server shows it as finished, as preempted where it was stopped to go on later, or as failed.

        What can't be sent in time stays on the disk, with a line on how to send it. A failed or stopped run takes only
        a moment: its message, or its scheduler, waits.
        """
        timeout_s = _finish_timeout_s(self._run) if status == "done" else _EARLY_FINISH_TIMEOUT_S
        if status == "stopped":
            self._submit(self._run.mark_preempting)
        self._submit(lambda: self._run.finish(exit_code=int(status != "done")))
        end = time.monotonic() + timeout_s
        with contextlib.suppress(queue.Full):
            self._jobs.put(None, timeout=timeout_s)
        self._thread.join(max(end - time.monotonic(), 0.0))
        if self._thread.is_alive():
            self._warn_once(f"wandb did not end within {timeout_s:g} s")
            _end_service()
        if self._warned:
            lost = self._lost + self._jobs.qsize()
            self._warn(
                f"{f'{lost} records never reached wandb. ' if lost else ''}Upload what it has on the disk with  "
                f"wandb sync {self._run.settings.sync_dir}"
            )

    def _submit(self, action: Callable[[], object]) -> None:
        try:
            self._jobs.put_nowait(action)
        except queue.Full:
            self._lost += 1
            self._warn_once("wandb does not take any more records")

    def _work(self) -> None:
        while (action := self._jobs.get()) is not None:
            try:
                action()
            except Exception as error:  # wandb raises many unrelated kinds, and a run must outlive its tracking
                ended = isinstance(error, ConnectionError)
                gone = ", and its process ended before it had written everything" if ended else ""
                self._warn_once(f"wandb failed ({type(error).__name__}: {error}){gone}")

    def _warn_once(self, what: str) -> None:
        if not self._warned:
            self._warn(f"{what}. Training goes on; metrics.jsonl is complete.")
        self._warned = True


def start_wandb(
    work_dir: str | os.PathLike[str],
    settings: WandbSettings,
    run_config: Mapping[str, Any],
    *,
    resumed: bool,
    info: Callable[[str], None],
    warn: Callable[[str], None],
) -> WandbRun | None:
    """Open this work dir's wandb run: online with a key and a network, else offline.

    Args:
        work_dir: Where wandb keeps its files unless WANDB_DIR says otherwise, and where a resume finds the id of the
            run: WANDB_RUN_ID, which a sweep's agent sets too, or one drawn here.
        settings: Their `init_kwargs` go to wandb.init. WANDB_MODE, then their `mode`, decide before the presence
            of a key.
        run_config: Shown as the run's config.
        resumed: Continue the run whose id is in work_dir.
        info: Prints the line that says where the run is.
        warn: Prints what went wrong, at most once for starting and once for logging.

    Returns:
        The run, or None if it is switched off or could not be started at all.
    """
    wanted = os.environ.get("WANDB_MODE") or settings.init_kwargs.get("mode") or ""
    if not settings.enabled or wanted == "disabled":
        return None
    ours = sorted(set(_OUR_ARGUMENTS) & set(settings.init_kwargs))
    if ours:
        warn(f"log_config: init_kwargs {ours} of the WandbLoggerHook are ignored; the work dir decides them.")
    try:
        import wandb

        mode = _choose_mode(wandb.setup().settings, wanted, warn)
        run_id = _load_or_make_id(Path(work_dir), resumed)
        try:
            run = _init(work_dir, settings, run_config, run_id, mode)
        except wandb.Error as error:
            if mode == "offline":
                raise
            warn(f"wandb could not go online ({error}); recording offline.")
            wandb.teardown()  # the service process still holds the run's id
            run = _init(work_dir, settings, run_config, run_id, "offline")
    except Exception as error:  # as in WandbRun._work
        warn(f"wandb could not be started ({type(error).__name__}: {error}). Training goes on without it.")
        return None
    folder = run.settings.sync_dir
    info(f"wandb offline: upload with  wandb sync {folder}" if run.offline else f"wandb online: {run.url}  ({folder})")
    return WandbRun(run, warn)


def _end_service() -> None:
    """Kill this process's wandb service: wandb's exit hook would wait for one that hangs without any bound."""
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if child.name().startswith("wandb-core"):
                child.kill()


def _finish_timeout_s(run: wandb.Run) -> float:
    """The user's WANDB_FINISH_TIMEOUT, or ours, and a moment for wandb to say that it is over."""
    return (getattr(run.settings, "finish_timeout", 0.0) or _FINISH_TIMEOUT_S) + 5.0


def _choose_mode(settings: wandb.Settings, wanted: str, warn: Callable[[str], None]) -> str:
    if wanted in ("offline", "dryrun"):
        return "offline"
    if _has_credentials(settings):
        return "online"
    if wanted == "online":  # wandb would ask for a key on the terminal and wait
        warn("WANDB_MODE is online but no wandb API key is configured; recording offline. Run `wandb login` once.")
    return "offline"


def _has_credentials(settings: wandb.Settings) -> bool:
    """Whether a key is in the environment, wandb's settings files or ~/.netrc; asks no server."""
    if settings.api_key or getattr(settings, "identity_token_file", None):
        return True
    try:
        return (
            netrc.netrc(os.environ.get("NETRC")).authenticators(urlparse(settings.base_url).hostname or "") is not None
        )
    except (OSError, netrc.NetrcParseError):
        return False


def _load_or_make_id(work_dir: Path, resumed: bool) -> str:
    path = work_dir / "wandb_run_id"
    known = path.read_text(encoding="utf-8").strip() if resumed and path.exists() else ""
    run_id = os.environ.get("WANDB_RUN_ID") or known or secrets.token_hex(4)
    if run_id != known:
        write_text_atomic(path, run_id + "\n")
    return run_id


def _init(
    work_dir: str | os.PathLike[str], settings: WandbSettings, run_config: Mapping[str, Any], run_id: str, mode: str
) -> wandb.Run:
    import wandb

    quiet: dict[str, Any] = {}
    if "WANDB_INIT_TIMEOUT" not in os.environ:
        quiet["init_timeout"] = _INIT_TIMEOUT_S
    if "WANDB_SILENT" not in os.environ:
        quiet["silent"] = True
    if "WANDB_CONSOLE" not in os.environ:
        quiet["console"] = "off"  # wandb's capture of standard output tears progress bars
    if "WANDB_FINISH_TIMEOUT" not in os.environ and "finish_timeout" in wandb.Settings.model_fields:
        quiet["finish_timeout"] = _FINISH_TIMEOUT_S  # by default a lost network holds the finished job for ever
        quiet["finish_timeout_raises"] = True  # or the line that says so would be lost with `silent`
    given = {key: value for key, value in settings.init_kwargs.items() if key not in (*_OUR_ARGUMENTS, "mode")}
    given.setdefault("project", os.environ.get("WANDB_PROJECT", "ds_seg"))
    return wandb.init(
        **given,
        dir=os.environ.get("WANDB_DIR") or os.fspath(work_dir),
        id=run_id,
        resume="allow",
        mode="offline" if mode == "offline" else "online",
        config=to_json_value(run_config),
        settings=wandb.Settings(**quiet),
    )
