"""What a run depends on but does not own: wandb's server, the clock, the images, other runs on the same work dir."""

import contextlib
import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from signal import SIGCONT, SIGSTOP

import pytest

from ds_seg.distributed import free_port
from life import Life

STEPS = 12


@contextlib.contextmanager
def black_hole() -> Iterator[int]:
    """A port that takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        yield listener.getsockname()[1]


def wandb_at(port: int) -> dict[str, str]:
    """An account on a server that is not there."""
    return {
        "WANDB_MODE": "online",
        "WANDB_API_KEY": "0123456789" * 4,
        "WANDB_BASE_URL": f"http://127.0.0.1:{port}",
        "WANDB_SILENT": "true",
    }


@pytest.mark.long
def test_wandb_that_refuses_connections_stops_nothing(story):
    run = story(STEPS)
    run.survived(
        "wandb's server refuses connections", run.start(environment=wandb_at(free_port())).finish(tells="wandb")
    )


@pytest.mark.long
def test_wandb_that_never_answers_stops_nothing(story):
    run = story(STEPS)
    with black_hole() as port:
        ending = run.start(environment=wandb_at(port)).finish(tells="wandb")
    run.survived("wandb's server takes connections and never answers", ending)


@pytest.mark.long
@pytest.mark.parametrize(("jump_s", "words"), [(86400, "forward by a day"), (-86400, "back by a day")])
def test_a_clock_that_jumps_changes_nothing(story, jump_s, words):
    run = story(STEPS)
    fault = {"rank": 0, "place": "clock", "step": 4, "do": jump_s}
    life = run.start(fault=fault)
    ending = life.finish(tells="$^")
    assert life.struck()
    run.survived(f"the clock of rank 0 jumps {words}", ending)


@pytest.fixture
def own_data(reference_of, tmp_path):
    """A copy of the images that a test may damage."""
    return Path(shutil.copytree(reference_of(STEPS).data, tmp_path / "data"))


def cut(image: Path) -> None:
    """Leave the beginning of a file."""
    image.write_bytes(image.read_bytes()[:500])


@pytest.mark.long
def test_truncated_images_are_named_and_the_run_goes_on_once_they_are_whole(story, own_data):
    run = story(STEPS)
    life = run.start(environment={"DS_SEG_DEMO_ROOT": str(own_data)}, launcher="deepspeed")
    run.wait_for_steps(life, 4)
    life.fault_now()
    for image in (own_data / "images" / "training").iterdir():
        cut(image)
    ending = life.finish(tells="ds-seg: ")
    run.interrupted("images truncated while training", ending, exit_code=2)
    assert "truncated" in ending.output and ending.output.count("ds-seg: ") == 1, ending.output[-4000:]
    run.complete()


@pytest.mark.long
def test_a_truncated_image_is_replaced_where_a_budget_is_given(story, own_data):
    run = story(STEPS)
    budget = ("--cfg-options", "data.max_bad_samples=1")
    life = run.start(*budget, environment={"DS_SEG_DEMO_ROOT": str(own_data)})
    run.wait_for_steps(life, 2)
    life.fault_now()
    image = min((own_data / "images" / "training").iterdir())
    cut(image)
    ending = life.finish(tells=image.name)
    assert ending.exit_code == 0, ending.output[-4000:]
    (bad,) = json.loads((run.work_dir / "summary.json").read_text())["bad_samples"]
    assert image.name in json.dumps(bad)
    equal = "but for that image, listed in summary.json"
    run.record(fault="an image truncated, `data.max_bad_samples=1`", **ending.figures(), lost_steps=0, equal=equal)


@pytest.mark.long
def test_a_work_dir_in_use_is_refused(story):
    run = story(STEPS)
    first = run.start()
    first.wait_for_row(run.work_dir, 1)
    first.signal_all(SIGSTOP)  # or it would be over before the second one has started
    arguments = ["train", run.reference.config, "--work-dir", run.work_dir, "--resume", "auto"]
    environment = run.reference.environment
    second = Life(*arguments, folder=run.folder, environment=environment, launcher="deepspeed")
    refused = second.finish(tells="is in use")
    assert refused.exit_code == 2 and "is in use" in refused.output, refused.output[-4000:]
    first.signal_all(SIGCONT)
    run.ended(first.finish())
    run.record(fault="a second run on the same work dir", **refused.figures(), lost_steps=0, equal=True)
