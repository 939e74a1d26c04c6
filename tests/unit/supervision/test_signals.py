import os
import signal
import subprocess
import sys
import time

import pytest

from ds_seg.supervision import signals, stop


@pytest.fixture(autouse=True)
def no_stop(monkeypatch, heeded_hangups):
    """Each test begins without a wish to stop and leaves the handlers as they were."""
    monkeypatch.setattr(stop, "_request", None)
    before = {number: signal.getsignal(number) for number in signals.STOPPING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def wait_for_stop():
    end = time.monotonic() + 5
    while stop.requested() is None:
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("number", signals.STOPPING)
def test_a_signal_asks_for_a_stop_and_says_what_will_happen(number, capfd):
    woken = []
    with signals.listening(lambda: woken.append(True)), signals.saving():
        os.kill(os.getpid(), number)
        wait_for_stop()
        time.sleep(0.1)
    assert stop.requested() == f"{number.name} on rank 0" and woken == [True]
    assert f"ends them at once with {128 + number} and saves nothing more" in capfd.readouterr().err
    # a scheduler that signals once more can't change the exit code of a run that has saved
    assert [signal.getsignal(each) for each in signals.STOPPING] == [signal.SIG_IGN] * 4


def test_without_a_signal_the_handlers_come_back():
    before = [signal.getsignal(number) for number in signals.STOPPING]
    with signals.listening(lambda: None):
        assert [signal.getsignal(number) for number in signals.STOPPING] != before
    assert [signal.getsignal(number) for number in signals.STOPPING] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_nohup_is_heeded():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with signals.listening(lambda: None):
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_signals_of_a_forked_worker_are_not_this_process_s():
    with signals.listening(lambda: None), signals.saving():
        worker = os.fork()
        if worker == 0:
            time.sleep(0.2)
            os._exit(0)
        time.sleep(0.05)
        os.kill(worker, signal.SIGTERM)
        os.waitpid(worker, 0)
        time.sleep(0.2)
        assert stop.requested() is None


def test_before_training_a_signal_ends_the_run_at_once():
    code = (
        "import os, signal, time; from ds_seg.supervision.signals import listening\n"
        "with listening(print): os.kill(os.getpid(), signal.SIGUSR1); time.sleep(20)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 128 + signal.SIGUSR1
    assert "there is nothing to save before training has begun" in done.stderr
