import os
import subprocess
import sys
import textwrap
import time

from ds_seg.supervision import processes
from ds_seg.supervision.processes import identify, kill_tree, on_this_machine, own_age_s


def start(code="import time; time.sleep(1000)"):
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_a_process_is_gone_once_it_has_ended_reaped_or_not():
    process = start()
    identity = identify(process.pid)
    assert not identity.is_gone()
    process.kill()
    end = time.monotonic() + 10
    while not identity.is_gone():  # still a zombie: nobody has waited for it
        assert time.monotonic() < end
    process.wait()
    assert identity.is_gone()


def test_a_later_process_of_the_same_number_is_another_one():
    own = identify(os.getpid())
    assert own._replace(start_ticks=own.start_ticks - 1).is_gone()
    kill_tree(own._replace(start_ticks=own.start_ticks - 1))  # does nothing, or this test would not end


def test_a_stopped_process_is_killed_with_what_it_started():
    code = (
        "import subprocess, time; p = subprocess.Popen(['sleep', '1000']); print(p.pid, flush=True); time.sleep(1000)"
    )
    process = start(code)
    child = identify(int(process.stdout.readline()))
    process.send_signal(19)
    kill_tree(identify(process.pid))
    assert process.wait(10) == -9
    end = time.monotonic() + 10
    while not child.is_gone():
        assert time.monotonic() < end
    kill_tree(child)


def test_neighbours_are_the_other_processes_of_this_machine():
    own = identify(os.getpid())
    neighbour, stranger = own._replace(pid=own.pid + 1), own._replace(machine="elsewhere", pid=own.pid + 2)
    assert on_this_machine({0: own, 1: neighbour, 2: stranger}) == {1: neighbour}


def test_the_age_counts_from_the_start_of_the_process():
    assert 0 < own_age_s() < 3600


def test_launchers_are_told_from_shells_that_name_them():
    class Process:
        def __init__(self, *arguments):
            self.arguments = list(arguments)

        def cmdline(self):
            return self.arguments

    assert processes._is_launcher(Process("/usr/bin/python3.11", "-m", "torch.distributed.run", "-m", "ds_seg"))
    assert processes._is_launcher(Process("/usr/bin/python", "/venv/bin/deepspeed", "--module", "ds_seg"))
    assert processes._is_launcher(Process("python", "-u", "-m", "deepspeed.launcher.launch", "--world_info=x"))
    assert not processes._is_launcher(Process("timeout", "60", "deepspeed", "--module", "ds_seg"))
    assert not processes._is_launcher(Process("bash", "-c", "deepspeed --module ds_seg"))
    assert not processes._is_launcher(Process("python", "-m", "pytest", "tests/deepspeed"))
    assert not processes._is_launcher(Process())


def test_a_worker_dies_with_its_parent_even_if_it_hangs():
    code = """
        import os, time
        from ds_seg.supervision.processes import end_with_parent
        if os.fork() == 0:
            end_with_parent()
            print(os.getpid(), flush=True)
            time.sleep(1000)
        time.sleep(1000)
    """
    process = start(textwrap.dedent(code))
    worker = identify(int(process.stdout.readline()))
    assert not worker.is_gone()
    process.kill()
    process.wait(10)
    end = time.monotonic() + 10
    while not worker.is_gone():
        assert time.monotonic() < end
