"""Signals to ranks and launchers, a launcher that is killed, and what hangs."""

import signal
from signal import SIGHUP, SIGKILL, SIGSTOP, SIGTERM, SIGUSR1

import pytest

STEPS = 4
WATCHDOG = ("--watchdog-timeout", 10)
ENDS = "the watchdog ends the run"


def strike(
    run, pid_of, number: signal.Signals, *options: object, launcher: str = "deepspeed", tells: str | None = None
):
    """A life in which a process gets a signal after a few steps; see Life.finish for `tells`."""
    life = run.start(*options, launcher=launcher)
    run.wait_for_steps(life, STEPS)
    life.strike(number, pid_of(life))
    return life.finish(tells=tells)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_signals_save_and_what_hangs_or_loses_its_launcher_ends(story, heeded_hangups):
    run = story(60)
    for launcher in ("torchrun", "deepspeed"):
        ending = strike(run, lambda life: life.popen.pid, SIGKILL, launcher=launcher)
        run.interrupted(f"SIGKILL of the launcher ({launcher})", ending, exit_code=-SIGKILL)
    for number, rank in ((SIGTERM, 1), (SIGUSR1, 0), (SIGHUP, 1)):
        ending = strike(run, lambda life, rank=rank: life.rank(rank), number)
        run.interrupted(f"{number.name} to rank {rank}", ending, exit_code=75, lost_at_most_steps=0)
    ending = strike(run, lambda life: life.popen.pid, SIGTERM)
    run.interrupted("SIGTERM to the launcher", ending, lost_at_most_steps=0)
    for rank in (0, 1):
        ending = strike(run, lambda life, rank=rank: life.rank(rank), SIGSTOP, *WATCHDOG, tells=ENDS)
        run.interrupted(f"SIGSTOP of rank {rank} (watchdog: 10 s)", ending)
        assert f"rank {rank}" in ending.output, ending.output[-4000:]
    ending = strike(run, lambda life: life.data_worker(1), SIGSTOP, *WATCHDOG, tells=ENDS)
    run.interrupted("SIGSTOP of a data worker of rank 1 (watchdog: 10 s)", ending)
    assert "rank 1: no progress" in ending.output and "waiting for the data" in ending.output, ending.output[-4000:]
    run.complete()
