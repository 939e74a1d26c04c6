"""Real wandb, offline: what is recorded, how a resume goes on, and that its failures stay its own."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import struct
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import wandb
from wandb.proto import wandb_internal_pb2

from ds_seg.config.hooks import WandbSettings
from ds_seg.tracking import wandb_run
from ds_seg.tracking.wandb_run import WandbRun, start_wandb
from wandb_server import wandb_server

NAMES = ("road", "sky")
PALETTE = ((90, 90, 90), (0, 0, 255))


def read_records(path):
    """The protobuf records of a .wandb file (LevelDB's log format: 32 KiB blocks, 7-byte headers)."""
    wandb.teardown()  # its service may write the file a moment after the run has finished
    content, position, parts = Path(path).read_bytes(), 7, []
    while position + 7 <= len(content):
        room = 32768 - position % 32768
        if room < 7:
            position += room
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        parts.append(content[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):  # the whole record, or its last part
            yield wandb_internal_pb2.Record.FromString(b"".join(parts))
            parts = []


def read_history(work_dir):
    """Every logged row of every offline run below a work dir."""
    rows = []
    for path in sorted(Path(work_dir).glob("wandb/offline-run-*/*.wandb")):
        for record in read_records(path):
            if record.HasField("history"):
                items = record.history.item
                rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


@pytest.fixture(autouse=True)
def no_account(monkeypatch, tmp_path):
    """As on a machine where nobody has logged in, whatever this one's user did."""
    for name in (
        "WANDB_API_KEY",
        "WANDB_MODE",
        "WANDB_SILENT",
        "WANDB_CONSOLE",
        "WANDB_PROJECT",
        "WANDB_BASE_URL",
        "WANDB_RUN_ID",
        "WANDB_DIR",
    ):
        monkeypatch.delenv(name, raising=False)
    for name in ("NETRC", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home" / name.lower()))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    wandb.teardown()
    yield
    wandb.teardown()


def start(work_dir, lines, *, resumed=False, enabled=True, **init_kwargs):
    work_dir.mkdir(exist_ok=True)
    return start_wandb(
        work_dir,
        WandbSettings(enabled, init_kwargs),
        {"optimizer": {"lr": 1e-3}, "crop": (504, 504)},
        resumed=resumed,
        info=lines.append,
        warn=lambda text: lines.append(f"warning: {text}"),
    )


def test_without_a_key_everything_is_recorded_offline(tmp_path):
    lines = []
    run = start(tmp_path / "run", lines)
    run.log_step({"step": 10, "loss": 0.5, "loss_ce": 0.5, "grad_norm": None})
    run.log_evaluation(20, {"eval/mIoU": 0.4, "eval/IoU/road": 0.4, "eval/IoU/sky": None})
    image, ids = np.zeros((12, 16, 3), np.uint8), np.ones((12, 16), np.int64)
    run.log_pictures(20, [("a", image, ids, ids * 255), ("b", image[:9], ids[:9], None)], NAMES, PALETTE)
    run.finish("done")

    train, evaluation, pictures = read_history(tmp_path / "run")
    assert (train["step"], train["train/loss"], train["train/loss_ce"]) == (10, 0.5, 0.5)
    assert "train/grad_norm" not in train
    assert (evaluation["step"], evaluation["eval/mIoU"], evaluation["eval/IoU/road"]) == (20, 0.4, 0.4)
    assert evaluation["eval/IoU_table.nrows"] == 2
    assert (pictures["predictions/a.width"], pictures["predictions/b.height"]) == (16, 9)
    assert "predictions/a.masks.ground_truth.path" in pictures
    assert "predictions/b.masks.prediction.path" in pictures
    assert "predictions/b.masks.ground_truth.path" not in pictures
    files = list((tmp_path / "run").rglob("media/images/**/*.png"))
    assert len(files) == 2 + 3  # images and masks
    folder = next((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert lines == [f"wandb offline: upload with  wandb sync {folder}"]


def test_more_classes_than_wandbs_masks_hold_are_sent_as_comparisons(tmp_path):
    lines = []
    run = start(tmp_path / "run", lines)
    image, ids = np.zeros((12, 16, 3), np.uint8), np.full((12, 16), 299, np.int64)
    run.log_pictures(5, [("a", image, ids, ids)], [str(number) for number in range(300)], [[0, 0, 0]] * 300)
    run.finish("done")
    (pictures,) = read_history(tmp_path / "run")
    assert pictures["predictions/a.width"] > 2 * 320 and "predictions/a.masks.prediction.path" not in pictures
    assert not [line for line in lines if "warning" in line]


def test_config_and_project_are_in_the_run(tmp_path):
    start(tmp_path / "run", [], project="mine").finish("failed")

    records = list(read_records(next((tmp_path / "run").rglob("*.wandb"))))
    (run,) = [record.run for record in records if record.HasField("run")]
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert run.project == "mine"
    assert config["optimizer"] == {"lr": 1e-3}
    assert config["crop"] == [504, 504]
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [1]
    assert not [record for record in records if record.HasField("preempting")]


def test_a_stopped_run_is_preempted_and_not_failed(tmp_path):
    """As the server knows it: marked so before it ends with a code other than 0."""
    start(tmp_path / "run", []).finish("stopped")

    records = list(read_records(next((tmp_path / "run").rglob("*.wandb"))))
    kinds = [record.WhichOneof("record_type") for record in records]
    assert [kind for kind in kinds if kind in ("preempting", "exit")] == ["preempting", "exit"]


def test_a_resume_goes_on_in_the_same_run_and_a_fresh_start_does_not(tmp_path):
    ids = []
    for resumed in (False, True, False):
        start(tmp_path / "run", [], resumed=resumed).finish("done")
        ids.append((tmp_path / "run" / "wandb_run_id").read_text())

    assert ids[0] == ids[1] != ids[2]
    assert len(list((tmp_path / "run").glob(f"wandb/offline-run-*-{ids[0].strip()}"))) >= 1


def test_the_users_id_and_folder_count_and_a_resume_keeps_the_id(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    start(tmp_path / "run", []).finish("stopped")
    monkeypatch.delenv("WANDB_RUN_ID")
    time.sleep(1.1)  # wandb names folders by the second
    start(tmp_path / "run", [], resumed=True).finish("done")
    assert len(list((tmp_path / "scratch").glob("wandb/offline-run-*-mine"))) == 2


@pytest.mark.parametrize("how", ["setting", "mode", "environment"])
def test_switched_off_it_leaves_no_trace(tmp_path, monkeypatch, how):
    if how == "environment":
        monkeypatch.setenv("WANDB_MODE", "disabled")
    lines = []

    options = {"setting": {"enabled": False}, "mode": {"mode": "disabled"}, "environment": {}}[how]

    assert start(tmp_path / "run", lines, **options) is None
    assert lines == []
    assert list((tmp_path / "run").iterdir()) == []


def test_a_login_in_netrc_counts_for_its_own_server(monkeypatch, tmp_path):
    (tmp_path / "logins").write_text("machine wandb.example login user password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "logins"))
    for host, known in (("wandb.example", True), ("other.example", False)):
        assert wandb_run._has_credentials(wandb.Settings(base_url=f"https://{host}")) is known


def test_online_without_a_key_records_offline_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    lines = []
    start(tmp_path / "run", lines).finish("done")

    assert "warning: WANDB_MODE is online but no wandb API key is configured" in lines[0]
    assert lines[1].startswith("wandb offline: ")


def test_arguments_that_the_work_dir_decides_are_named(tmp_path):
    lines = []
    start(tmp_path / "run", lines, id="mine", name="a name").finish("done")

    assert lines[0] == (
        "warning: log_config: init_kwargs ['id'] of the WandbLoggerHook are ignored; the work dir decides them."
    )


@pytest.mark.parametrize("listening", [True, False])
def test_a_server_that_never_answers_or_refuses_is_given_up(tmp_path, monkeypatch, listening):
    with socket.socket() as hole:
        hole.bind(("127.0.0.1", 0))
        if listening:
            hole.listen()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{hole.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        wandb.teardown()
        lines = []
        monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
        run = start(tmp_path / "run", lines)
        run.log_step({"step": 1, "loss": 0.5})
        run.finish("done")

    assert lines[0].startswith("warning: wandb could not go online (")
    assert lines[1].startswith("wandb offline: ")
    assert [row["train/loss"] for row in read_history(tmp_path / "run")] == [0.5]


def test_a_start_that_fails_altogether_is_one_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(wandb, "init", lambda **_: (_ for _ in ()).throw(RuntimeError("no service")))
    lines = []

    assert start(tmp_path / "run", lines) is None
    assert lines == ["warning: wandb could not be started (RuntimeError: no service). Training goes on without it."]


def test_failures_while_logging_are_told_once_and_raise_nothing():
    class Broken:
        settings = SimpleNamespace(finish_timeout=5.0, sync_dir="wandb/run-1")

        def __getattr__(self, name):
            raise BrokenPipeError(name)

    lines = []
    run = WandbRun(Broken(), lines.append)
    run.log_step({"step": 1, "loss": 0.5})
    run.log_evaluation(1, {"eval/mIoU": 0.1})
    run.log_pictures(1, [], NAMES, PALETTE)
    run.finish("done")

    assert lines == [
        "wandb failed (BrokenPipeError: define_metric), and its process ended before it had written everything. "
        "Training goes on; metrics.jsonl is complete.",
        "Upload what it has on the disk with  wandb sync wandb/run-1",
    ]


def test_a_service_that_hangs_costs_records_and_no_time(tmp_path, monkeypatch):
    """Without the thread `run.log` of wandb 0.31 blocks for good once the stopped service's socket is full."""
    monkeypatch.setattr(wandb_run, "_EARLY_FINISH_TIMEOUT_S", 0.5)
    lines = []
    run = start(tmp_path / "run", lines)
    services = [child for child in psutil.Process().children() if "wandb" in child.name()]
    assert services
    for service in services:
        service.suspend()
    try:
        started = time.monotonic()
        for step in range(2000):
            run.log_step({"step": step, **{f"loss_{name}": 0.5 for name in range(40)}})
        run.finish("failed")
        assert time.monotonic() - started < 10
    finally:
        for service in services:
            service.kill()
        with contextlib.suppress(ConnectionError):
            wandb.teardown()
    assert lines[1] == "warning: wandb does not take any more records. Training goes on; metrics.jsonl is complete."
    assert re.search(r"1\d\d\d records never reached wandb\. Upload .* with  wandb sync .*run-", lines[2])


def test_a_server_that_is_lost_midway_costs_seconds_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(wandb_run, "_FINISH_TIMEOUT_S", 3.0)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    lines = []
    with wandb_server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_address[1]}")
        wandb.teardown()
        run = start(tmp_path / "run", lines)
        run.log_step({"step": 1, "loss": 0.5})
        end = time.monotonic() + 60
        while not any(path.endswith("/file_stream") for path in server.requests):
            assert time.monotonic() < end
            time.sleep(0.1)
    started = time.monotonic()
    run.log_step({"step": 2, "loss": 0.4})
    run.finish("done")
    assert time.monotonic() - started < 20
    assert lines[0].startswith("wandb online: http://127.0.0.1:")
    assert lines[1].startswith("warning: wandb failed (TimeoutError: Timed out finishing run")
    folder = next((tmp_path / "run" / "wandb").glob("run-*"))
    assert lines[2] == f"warning: Upload what it has on the disk with  wandb sync {folder}"
    steps = [
        json.loads(item.value_json)
        for record in read_records(next(folder.glob("*.wandb")))
        if record.HasField("history")
        for item in record.history.item
        if "step" in (item.key, *item.nested_key)
    ]
    assert steps == [1, 2]
