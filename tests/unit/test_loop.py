import itertools
import math
import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from ds_seg import loop
from ds_seg.checkpoint import TrainingState, checkpoint_name
from ds_seg.checkpoint.manifest import MANIFEST
from ds_seg.config import CheckpointSettings, EvaluationSettings
from ds_seg.engine.step import StepResult
from ds_seg.errors import TrainingDiverged
from ds_seg.supervision import stop
from ds_seg.tracking.tracker import Tracker


class FakeStep:
    """Stands for both engines: skips the steps it is told to and counts its micro-batches."""

    skip: tuple[int, ...] = ()

    def __init__(self, engines, run):
        self.calls, self.schedule = [], []

    def __call__(self, step, micro_batches, *, scheduled_steps):
        self.calls.append((step, micro_batches))
        self.schedule.append(scheduled_steps)
        skipped = step in self.skip
        return StepResult({"loss": math.nan if skipped else 2.0, "loss_ce": 2.0}, 4.0, 0.25, skipped)


class FakeTracker(Tracker):
    """Remembers what it was told."""

    def __init__(self):
        self.rows, self.notes, self.warnings, self.infos, self.evaluations = [], [], [], [], []
        self.rewound = []

    def info(self, text):
        self.infos.append(text)

    def warn(self, text):
        self.warnings.append(text)

    def log_step(self, row, note=""):
        self.rows.append(row)
        self.notes.append(note)

    def rewind(self, step, *, evaluated=True):
        self.rewound.append((step, evaluated))

    def log_evaluation(self, step, metrics, table):
        self.evaluations.append((step, metrics, table))


@pytest.fixture(autouse=True)
def no_stop(monkeypatch):
    """Each test begins without a wish to stop."""
    monkeypatch.setattr(stop, "_request", None)


@pytest.fixture
def build(tmp_path, monkeypatch):
    """Builds a loop on fakes: `loop.saved` holds the saved states, `loop.events` what the saver was asked."""

    def build(state=None, scores=(), skip=(), saved_in=None, eval_every=100, save_every=100, save_best=None, **changes):
        values = dict(max_steps=10, max_skipped_steps=3, max_bad_samples=0, accumulation_steps=2, global_batch=8)
        values |= dict(work_dir=tmp_path, log_interval_steps=10, workers=2) | changes
        run = SimpleNamespace(
            schedule=SimpleNamespace(max_steps=values.pop("max_steps")),
            evaluation=EvaluationSettings(eval_every, window_batch=1, save_best=save_best),
            checkpoints=CheckpointSettings(save_every, keep=2, keep_interval_steps=None, in_background=False),
            **values,
        )
        engines = SimpleNamespace(param_groups=[{"lr": 1e-3}, {"lr": 1e-4}])
        saved, amended, events, remaining = [], [], [], iter(scores)

        class FakeSaver:
            def __init__(self, _engines, _run, _ema, log):
                self.log = log

            def save(self, state):
                saved.append(TrainingState(**vars(state)))
                events.append("save")
                folder = tmp_path / "checkpoints" / checkpoint_name(state.step)
                folder.mkdir(parents=True, exist_ok=True)
                (folder / MANIFEST).write_text("{}")
                self.log(f"saved {folder}")
                return folder

            def amend(self, state):
                amended.append(TrainingState(**vars(state)))
                events.append("amend")
                return True

            def poll(self):
                events.append("poll")

            def wait(self):
                events.append("wait")

        def evaluate(_step):
            score = next(remaining)
            result = SimpleNamespace(
                mIoU=score, mDice=1 - score, metrics=lambda: {"eval/mIoU": score}, table=lambda: "table"
            )
            result.describe_fault = lambda: None if score else "the network's scores are not finite"
            return result

        monkeypatch.setattr(loop, "TwoEngineStep", FakeStep)
        monkeypatch.setattr(FakeStep, "skip", skip)
        monkeypatch.setattr(loop, "CheckpointSaver", FakeSaver)
        training = loop.TrainingLoop(run, engines, state or TrainingState(), FakeTracker(), evaluate, saved_in=saved_in)
        training.saved, training.amended, training.events = saved, amended, events
        return training

    return build


def test_runs_to_the_last_step_on_the_micro_batches_of_each_step(build):
    training = build(max_steps=3, scores=[0.5])
    record = training(range(100))
    assert training._train_step.calls == [(0, [0, 1]), (1, [2, 3]), (2, [4, 5])]
    assert training.state == TrainingState(step=3, scheduled_steps=3)
    assert len(record.step_times_s) == 3 and record.stopped is None


def test_a_resumed_run_makes_only_the_steps_that_are_left(build):
    training = build(state=TrainingState(step=8, scheduled_steps=7, skipped_steps=1), scores=[0.5])
    training(range(100))
    assert [step for step, _ in training._train_step.calls] == [8, 9] and training._train_step.schedule == [7, 8]
    assert training.state == TrainingState(step=10, scheduled_steps=9, skipped_steps=1)


def test_rows_hold_what_was_promised(build):
    training = build(max_steps=1, scores=[0.5])
    (step_time_s,) = training(range(100)).step_times_s
    (row,) = training.tracker.rows
    promised = "step loss loss_ce lr_min lr_max grad_norm grad_norm_clipped images_per_s data_wait_s memory_gib"
    assert set(row) == set(promised.split())
    assert (row["step"], row["loss"], row["lr_min"], row["lr_max"]) == (1, 2.0, 1e-4, 1e-3)
    assert (row["grad_norm"], row["grad_norm_clipped"]) == (4.0, 1.0)
    assert row["images_per_s"] == pytest.approx(8 / step_time_s) and row["memory_gib"] > 0


def test_evaluations_and_checkpoints_come_at_their_intervals_and_at_the_end(build):
    training = build(eval_every=4, save_every=3, scores=itertools.repeat(0.5))
    record = training(range(100))
    assert [step for step, _, _ in training.tracker.evaluations] == [4, 8, 10]
    assert [state.step for state in training.saved] == [3, 6, 9, 10]
    assert record.evaluation.mIoU == 0.5
    assert training.tracker.infos[0].startswith(f"saved {training.run.work_dir}/checkpoints/step_000003")


def test_the_best_evaluation_is_saved_and_remembered(build):
    training = build(eval_every=2, save_best="mIoU", scores=[0.0, 0.0, 0.3, 0.2, 0.3])
    training(range(100))
    # 2 is the first, 6 the best; 4 and 10 are only as good as the best before them, and 10 is saved as the last
    assert [(state.step, state.best_score, state.best_checkpoint) for state in training.saved] == [
        (2, 0.0, "step_000002"),
        (6, 0.3, "step_000006"),
        (10, 0.3, "step_000006"),
    ]


def test_the_best_is_by_the_score_that_the_config_names(build):
    state = TrainingState(best_score=0.9, best_metric="mIoU", best_checkpoint="step_000000")
    training = build(state=state, eval_every=5, save_best="mDice", scores=[0.6, 0.7])
    training(range(100))
    assert (state.best_score, state.best_metric, state.best_checkpoint) == (0.4, "mDice", "step_000005")


def test_without_save_best_no_score_is_remembered(build):
    training = build(eval_every=5, scores=[0.3, 0.4])
    training(range(100))
    assert [(state.step, state.best_score, state.best_checkpoint) for state in training.saved] == [(10, None, None)]


def test_an_evaluation_of_what_is_no_number_is_warned_of(build):
    for score, warnings in ((0.5, []), (0.0, ["the network's scores are not finite"])):
        training = build(scores=[score])
        training(range(100))
        assert training.tracker.warnings == warnings


def test_skipped_steps_are_counted_and_reported_and_do_not_move_the_schedule(build):
    training = build(skip=(1, 2, 4, 6, 7), scores=[0.5])
    training(range(100))
    assert training.state == TrainingState(step=10, scheduled_steps=5, skipped_steps=5)
    assert training._train_step.schedule == [0, 1, 1, 1, 2, 2, 3, 3, 3, 4]
    assert len(training.tracker.rows) == 10
    assert training.tracker.warnings[1] == (
        "step 3 skipped in both engines: loss nan, gradient norm 4 (2 skipped so far)"
    )


def test_too_many_skips_in_a_row_end_the_run_and_name_the_step_and_the_last_checkpoint(build):
    training = build(skip=(3, 5, 6, 7), save_every=2)
    text = (
        r"not finite in 3 steps in a row, the last at step 8\. The last checkpoint before them is .*/step_000004\. "
        r"Lower optimizer\.lr, set optimizer_config\.grad_clip\.max_norm, look for damaged images.*"
        r"let --on-divergence rollback"
    )
    with pytest.raises(TrainingDiverged, match=text):
        training(range(100))
    assert training.state.step == 8 and len(training._train_step.calls) == 8


def test_too_many_skips_before_the_first_checkpoint_say_so(build):
    with pytest.raises(TrainingDiverged, match=r"the last at step 3\. No checkpoint was saved before them\."):
        build(skip=range(10))(range(100))


def test_a_stop_comes_before_the_next_step_with_everything_saved(build):
    def batches():
        for index in range(100):
            if index == 6:
                stop.request("SIGUSR1 on rank 0")
            yield index

    training = build()
    record = training(batches())
    assert [state.step for state in training.saved] == [3]
    assert len(training._train_step.calls) == 3
    assert record.stopped == (
        f"Stopped by SIGUSR1 on rank 0 after step 3 of 10; everything is saved in {training.run.work_dir}/checkpoints/"
        "step_000003. Run the same command with --resume auto to go on."
    )


def test_a_loader_that_hangs_does_not_keep_a_stop_from_saving(build):
    def batches():
        yield from range(4)
        threading.Timer(0.2, stop.request, ["SIGTERM on rank 0"]).start()
        threading.Event().wait()

    training = build()
    training(batches())
    assert [state.step for state in training.saved] == [2]


def test_a_save_in_the_background_is_looked_at_after_every_step_and_waited_for_at_the_end(build):
    training = build(max_steps=3, save_every=2, scores=[0.5])
    training(range(100))
    assert training.events == ["poll", "poll", "save", "poll", "save", "amend", "wait"]


def test_a_run_that_diverges_completes_its_last_save_first(build):
    training = build(skip=(3, 4), save_every=3, max_skipped_steps=2)
    with pytest.raises(TrainingDiverged, match=r"The last checkpoint before them is .*/step_000003\."):
        training(range(100))
    assert training.events == ["poll", "poll", "poll", "save", "poll", "wait"]


def test_a_stop_at_a_checkpoint_does_not_save_twice(build):
    def batches():
        for index in range(100):
            if index == 6:
                stop.request("SIGTERM on rank 0")
            yield index

    training = build(save_every=3)
    training(batches())
    assert [state.step for state in training.saved] == [3]


def test_a_stop_before_the_first_step_after_a_resume_saves_nothing_anew(build, tmp_path):
    stop.request("SIGTERM on rank 0")
    training = build(state=TrainingState(step=6, scheduled_steps=6), saved_in=tmp_path / "step_000006")
    record = training(range(100))
    assert training.saved == [] and f"everything is saved in {tmp_path}/step_000006" in record.stopped


def test_a_stop_before_the_first_step_of_a_new_run_is_saved_too(build):
    stop.request("SIGTERM on rank 0")
    training = build()
    record = training(range(100))
    assert [state.step for state in training.saved] == [0] and "checkpoints/step_000000. Run the" in record.stopped


def test_an_evaluation_that_fails_costs_no_step(build):
    training = build(eval_every=3, save_every=3, scores=())
    with pytest.raises(StopIteration):
        training(range(100))
    assert [(state.step, state.evaluation_due) for state in training.saved] == [(3, True)]


def test_a_result_for_a_checkpoint_that_is_gone_is_saved_with_another(build):
    training = build(eval_every=10, scores=[0.5])
    training._saver.amend = lambda _state: False
    training(range(100))
    assert [(state.step, state.evaluation_due) for state in training.saved] == [(10, True), (10, False)]


def test_an_evaluation_that_was_due_is_made_once_whatever_the_interval_is_now(build, tmp_path):
    due = TrainingState(step=6, scheduled_steps=6, evaluation_due=True)
    training = build(state=due, saved_in=tmp_path / "step_000006", eval_every=100, scores=[0.3, 0.4])
    training(range(100))
    assert [step for step, *_ in training.tracker.evaluations] == [6, 10]
    assert not training.state.evaluation_due


def test_a_step_that_is_made_anew_after_a_rollback_is_saved_anew(build):
    training = build(eval_every=4, save_every=4, max_steps=5, scores=itertools.repeat(0.5))
    training(range(100))
    training.state = TrainingState(step=2, scheduled_steps=2)
    training(range(100))
    assert [state.step for state in training.saved] == [4, 5, 4, 5]


def test_an_evaluation_that_is_stopped_is_made_first_thing_after_the_resume(build):
    def scores():
        yield 0.2
        raise stop.StopRequested
        yield

    stopped = build(eval_every=3, scores=scores(), save_best="mIoU")
    stopped(range(100))
    assert [(state.step, state.evaluation_due, state.best_score) for state in stopped.saved] == [
        (3, False, 0.2),
        (6, True, 0.2),
    ]
    resumed = build(state=stopped.saved[-1], eval_every=3, scores=[0.3, 0.1, 0.4], save_best="mIoU")
    resumed(range(100))
    assert [step for step, _, _ in resumed.tracker.evaluations] == [6, 9, 10]
    assert [row["step"] for row in resumed.tracker.rows] == [7, 8, 9, 10]
    assert [(state.step, state.evaluation_due, state.best_score) for state in resumed.saved] == [
        (6, False, 0.3),
        (10, True, 0.3),
    ]
    assert [(state.step, state.evaluation_due, state.best_score) for state in resumed.amended] == [(10, False, 0.4)]


@pytest.mark.parametrize("max_steps", [6, 5])
def test_a_run_that_is_resumed_at_its_end_is_evaluated_for_its_summary_and_not_saved_anew(build, tmp_path, max_steps):
    state = TrainingState(step=6, scheduled_steps=6, best_score=0.5, best_metric="mIoU", best_checkpoint="step_000006")
    training = build(
        max_steps=max_steps, state=state, scores=[0.5], save_best="mIoU", saved_in=tmp_path / "step_000006"
    )
    record = training(iter(()))
    assert record.evaluation.mIoU == 0.5 and record.stopped is None and record.step_times_s == []
    assert training.tracker.rewound == [(6, False)]  # its row of the first time
    assert [step for step, _, _ in training.tracker.evaluations] == [6]
    assert training.saved == [] and not training.state.evaluation_due


def test_a_run_that_is_resumed_at_its_end_elsewhere_is_saved(build):
    training = build(max_steps=6, state=TrainingState(step=6, scheduled_steps=6), scores=[0.5])
    training(iter(()))
    assert [state.step for state in training.saved] == [6]


def test_a_wait_for_data_is_noted_in_the_progress_and_explained_once(build):
    def batches():
        for index in range(100):
            time.sleep(0.002)
            yield index

    training = build(max_steps=20, scores=[0.5])
    record = training(batches())
    assert training.tracker.notes[:10] == [""] * 10
    assert all(re.match(r"data wait \d+%: ", note) for note in training.tracker.notes[10:])
    (warning,) = training.tracker.warnings
    assert "with data.workers_per_gpu=2 (" in warning
    assert 0.5 < record.data_wait_share < 1


def test_memory_is_measured_in_gib():
    peak_kib = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]
    assert int(peak_kib) / 2**20 <= loop.memory_gib() * 1.01 < 100  # what ran here before an exec counts too
