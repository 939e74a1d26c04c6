"""A work dir is damaged between two lives: `--resume auto` takes the newest checkpoint that is whole."""

import shutil
from pathlib import Path

import pytest

from ds_seg.checkpoint.store import list_checkpoints
from story import SAVE_INTERVAL_STEPS, Story

STEPS = 12


def shards(work_dir: Path) -> list[Path]:
    """The optimizer states of both ranks in the newest checkpoint."""
    found = sorted(list_checkpoints(work_dir)[-1].rglob("*optim_states.pt"))
    assert len(found) == 2, found
    return found


def flip_a_bit(work_dir: Path) -> None:
    content = bytearray(shards(work_dir)[1].read_bytes())
    content[len(content) // 2] ^= 1
    shards(work_dir)[1].write_bytes(content)


def truncate(work_dir: Path) -> None:
    content = shards(work_dir)[1].read_bytes()
    shards(work_dir)[1].write_bytes(content[: len(content) // 2])


def remove(work_dir: Path) -> None:
    shards(work_dir)[1].unlink()


def swap(work_dir: Path) -> None:
    first, second = shards(work_dir)
    aside = first.with_name("aside")
    first.rename(aside)
    second.rename(first)
    aside.rename(second)


def point_latest_nowhere(work_dir: Path) -> None:
    latest = work_dir / "checkpoints" / "latest"
    assert latest.read_text().strip() == "step_000006"
    latest.write_text("step_000009\n")


def leave_a_temporary_folder(work_dir: Path) -> None:
    newest = list_checkpoints(work_dir)[-1]
    stale = newest.with_name(".step_000009.tmp")
    shutil.copytree(newest, stale)
    (stale / "manifest.json").unlink()


def cut_the_config(work_dir: Path) -> None:
    text = (work_dir / "config.py").read_text()
    (work_dir / "config.py").write_text(text[: len(text) // 2])
    (work_dir / "deepspeed.json").write_text("{")


SHARDS = {
    flip_a_bit: "one bit flipped in a shard",
    truncate: "a shard cut to its half",
    remove: "a shard missing",
    swap: "the shards of two ranks swapped",
}
OTHERS = {
    point_latest_nowhere: "`latest` names a checkpoint that is not there",
    leave_a_temporary_folder: "a temporary folder left behind",
    cut_the_config: "config.py and deepspeed.json of the work dir cut off",
}
SHORT = (flip_a_bit,)


def cases(damages: dict) -> list:
    """One test a damage; all but SHORT only in `make test-faults`."""
    return [
        pytest.param(damage, words, id=damage.__name__, marks=[] if damage in SHORT else [pytest.mark.long])
        for damage, words in damages.items()
    ]


@pytest.fixture(scope="module")
def half_done(reference_of, tmp_path_factory):
    """The work dir of a run that was killed in step 8, with checkpoints of steps 3 and 6."""
    story = Story(reference_of(STEPS), tmp_path_factory.mktemp("half_done"), lambda **_: None)
    ending = story.start(fault={"rank": 1, "place": "backward", "step": 7, "do": "kill"}).finish()
    assert ending.exit_code != 0 and story.last_step == 7, ending.output[-4000:]
    return story.work_dir


@pytest.fixture
def run(half_done, story):
    """The run again, in a copy that may be damaged."""
    shutil.copytree(half_done, story(STEPS).work_dir)
    return story(STEPS)


@pytest.mark.parametrize(("damage", "words"), cases(SHARDS))
def test_a_damaged_shard_is_found_before_it_is_loaded(run, damage, words):
    damage(run.work_dir)
    ending = run.start().finish(tells="passes over a damaged checkpoint")
    assert "passes over a damaged checkpoint" in ending.output and "step_000006" in ending.output
    assert run.lost_steps(ending) == 7 - SAVE_INTERVAL_STEPS
    run.survived(f"{words}, `--resume auto`", ending)


@pytest.mark.long
def test_a_damaged_shard_of_the_checkpoint_that_was_asked_for_is_an_error(run):
    flip_a_bit(run.work_dir)
    life = run.start("--resume", "step_000006", launcher="deepspeed")
    ending = life.finish(tells="CheckpointError")
    flip_a_bit(run.work_dir)
    run.interrupted("one bit flipped in a shard, `--resume step_000006`; then flipped back", ending, exit_code=2)
    run.complete()


@pytest.mark.parametrize(("damage", "words"), cases(OTHERS))
def test_other_leftovers_of_a_crash_do_no_harm(run, damage, words):
    damage(run.work_dir)
    ending = run.start().finish()
    assert run.lost_steps(ending) == 1
    run.survived(words, ending)
    assert not list((run.work_dir / "checkpoints").glob(".step_*"))
