import os
import socket
import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace

import pytest
import torch

from ds_seg import distributed
from ds_seg.distributed import collectives, ending, group, launching, world
from ds_seg.distributed.world import complete_environment
from ds_seg.errors import ConfigError, UserError

LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SLURM = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")
ON_THIS_NODE = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_STEP_TASKS_PER_NODE")


@pytest.fixture
def environment(monkeypatch):
    """An environment in which nothing was launched; whatever the test leaves there is undone."""
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k not in LAUNCH + SLURM + ON_THIS_NODE})
    return os.environ


def run_python(code, *launches):
    """Run the code once for each launcher environment, all at the same time."""
    common = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**common, **launch},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for launch in launches
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [
        SimpleNamespace(returncode=p.returncode, stdout=o, stderr=e)
        for p, (o, e) in zip(processes, outputs, strict=True)
    ]


@pytest.fixture
def store(monkeypatch):
    """The rendezvous store of a world of one."""
    store = torch.distributed.HashStore()
    monkeypatch.setattr(ending, "_store", store)
    return store


def test_a_plain_process_is_a_world_of_one(environment):
    assert (distributed.rank(), distributed.local_rank(), distributed.world_size()) == (0, 0, 1)
    assert distributed.is_main()
    complete_environment()
    assert [environment[name] for name in LAUNCH[:4]] == ["0", "0", "1", "127.0.0.1"]
    assert 1024 <= int(environment["MASTER_PORT"]) < 65536


def test_torchrun_and_deepspeed_are_read(environment):
    environment |= dict(RANK="5", LOCAL_RANK="1", WORLD_SIZE="8", SLURM_PROCID="3", SLURM_LOCALID="3")
    assert (distributed.rank(), distributed.local_rank(), distributed.world_size()) == (5, 1, 8)
    assert not distributed.is_main()


def test_srun_is_translated(environment):
    environment |= dict(SLURM_PROCID="5", SLURM_LOCALID="1", SLURM_STEP_NUM_TASKS="8")
    environment |= dict(MASTER_ADDR="node0", MASTER_PORT="29500")
    complete_environment()
    assert [environment[name] for name in LAUNCH] == ["5", "1", "8", "node0", "29500"]


@pytest.mark.parametrize(
    ("told", "count"),
    [
        ({"LOCAL_WORLD_SIZE": "4"}, 4),
        ({"LOCAL_SIZE": "8"}, 8),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x4)"}, 2),
        ({}, 1),
    ],
)
def test_processes_of_a_node_share_its_cores(environment, monkeypatch, told, count):
    monkeypatch.setattr(world, "usable_cores", lambda: 24)
    assert distributed.cores_per_process() == 24
    environment.update({"WORLD_SIZE": "8", **told})
    assert distributed.cores_per_process() == 24 // count
    environment.update({"SLURM_CPUS_PER_TASK": "24"})  # of a batch script's task, which started the launcher
    assert distributed.cores_per_process() == 24 // count


def test_srun_gives_each_process_cores_of_its_own(environment, monkeypatch):
    environment |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "16"}
    environment |= {"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_CPUS_PER_TASK": "8"}
    for usable in (8, 64):  # bound to them, or told of them
        monkeypatch.setattr(world, "usable_cores", lambda usable=usable: usable)
        assert distributed.cores_per_process() == 8
    environment |= {"LOCAL_WORLD_SIZE": "4"}  # torchrun is the task, and its processes share
    assert distributed.cores_per_process() == 16


def test_more_processes_than_cores_have_one_each(environment, monkeypatch):
    monkeypatch.setattr(world, "usable_cores", lambda: 2)
    environment |= {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}
    assert distributed.cores_per_process() == 1


def test_cores_are_those_that_may_be_used():
    assert 1 <= distributed.usable_cores() <= os.cpu_count()


@pytest.mark.parametrize(("allowed", "cores"), [(float("inf"), 24), (4.5, 4), (0.5, 1)])
def test_a_containers_quota_bounds_the_cores(monkeypatch, allowed, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(24))
    monkeypatch.setattr(world, "count_allowed_cores", lambda: allowed)
    assert distributed.usable_cores() == cores


def test_the_room_offers_what_it_names():
    assert {name for name in distributed.__all__ if not hasattr(distributed, name)} == set()
    with pytest.raises(AttributeError, match=r"module 'ds_seg\.distributed' has no attribute 'scatter'"):
        _ = distributed.scatter


def test_a_batch_script_is_no_srun(environment):
    environment |= dict(SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NTASKS="8")
    assert (distributed.rank(), distributed.world_size()) == (0, 1)


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({}, "MASTER_ADDR and MASTER_PORT is not set"),
        ({"MASTER_ADDR": "node0"}, "but MASTER_PORT is not set"),
        ({"MASTER_PORT": "29500"}, "but MASTER_ADDR is not set"),
    ],
)
def test_srun_without_a_meeting_point_is_refused(environment, given, missing):
    environment |= dict(SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_STEP_NUM_TASKS="2") | given
    with pytest.raises(
        UserError, match=rf"srun started 2 processes but .*{missing.split('but ')[-1]}.*Export MASTER_A"
    ):
        complete_environment()


def test_a_single_srun_task_needs_no_meeting_point(environment):
    environment |= dict(SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_STEP_NUM_TASKS="1")
    complete_environment()
    assert environment["MASTER_ADDR"] == "127.0.0.1"


def test_collectives_of_a_world_of_one_give_back_what_they_get(environment):
    values = torch.tensor([1.0, 2.0])
    assert distributed.reduce_sum(values) is values
    assert distributed.reduce_max(values) is values
    assert distributed.any_rank(True) is True and distributed.any_rank(False) is False
    assert distributed.broadcast_object("x") == "x"
    assert distributed.gather_objects("x") == ["x"]
    distributed.barrier()


@pytest.mark.parametrize(("own", "named"), [("cuda:3", [3]), ("cpu", None)])
def test_a_barrier_names_the_gpu_of_its_process(monkeypatch, own, named):
    """NCCL's guess is the global rank, counted over the GPUs that the process sees."""
    calls = []
    monkeypatch.setattr(collectives, "world_size", lambda: 8)
    monkeypatch.setattr(collectives, "device", lambda: torch.device(own))
    monkeypatch.setattr(torch.distributed, "barrier", lambda **options: calls.append(options))
    distributed.barrier()
    assert calls == [{"device_ids": named}]


def test_agree_returns_the_result_or_raises_the_users_error(environment):
    assert distributed.agree(lambda: 3) == 3
    assert distributed.agree(lambda: None) is None

    def fail():
        raise ConfigError("optimizer.lr: got 'x', want a number.")

    with pytest.raises(ConfigError, match=r"optimizer\.lr: got 'x'"):
        distributed.agree(fail)


def test_agree_on_main_returns_what_the_main_rank_read_or_raises_the_users_error(environment):
    assert distributed.agree_on_main(lambda: 3) == 3

    def fail():
        raise ConfigError("no such file")

    with pytest.raises(ConfigError, match="no such file"):
        distributed.agree_on_main(fail)


def test_agree_does_not_swallow_a_fault(environment):
    with pytest.raises(ZeroDivisionError):
        distributed.agree(lambda: 1 // 0)


def test_the_first_to_ask_reports_a_failure_and_the_others_do_not(store, environment):
    assert [distributed.claim_failure_report() for _ in range(3)] == [True, False, False]


def test_every_rank_reports_once_the_store_is_gone(monkeypatch, environment):
    class Gone:
        def add(self, key, value):
            raise torch.distributed.DistNetworkError("connection closed")

    monkeypatch.setattr(ending, "_store", Gone())
    assert distributed.claim_failure_report()


def test_before_the_rendezvous_only_the_main_rank_reports(monkeypatch, environment):
    monkeypatch.setattr(ending, "_store", None)
    assert distributed.claim_failure_report()
    environment |= dict(RANK="1", WORLD_SIZE="2")
    assert not distributed.claim_failure_report()


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_ends_a_rank_that_waits_in_a_collective_with_the_same_code(environment, failing):
    code = textwrap.dedent(
        f"""
        import time
        from ds_seg import distributed as d
        d.initialize()
        d.barrier()
        if d.rank() == {failing}:
            d.end_all_ranks(75)
        try:
            d.barrier()
        except RuntimeError:  # the other rank's connection broke first; the command waits too
            time.sleep(30)
        print("went on")
        """
    )
    launch = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(distributed.free_port())}
    assert [done.returncode for done in run_python(code, *({**launch, "RANK": str(rank)} for rank in (0, 1)))] == [
        75
    ] * 2


def test_a_restart_by_torchrun_does_not_see_the_failure_before_it(environment):
    """With --max-restarts the store stays the same."""
    port = distributed.free_port()
    kept = torch.distributed.TCPStore("127.0.0.1", port, 1, is_master=True)
    environment.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    environment["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    for attempt in ("0", "1"):
        environment["TORCHELASTIC_RESTART_COUNT"] = attempt
        assert group._open_rendezvous().add("ds_seg/failures", 1) == 1
    assert not kept.check(["ds_seg/failures"])


def test_a_port_that_another_job_has_is_named_with_the_remedy(environment):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        environment.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        wanted = rf"Rank 0 of 1 .* MASTER_PORT {port}: .*address already in use.* choose a free one"
        with pytest.raises(UserError, match=wanted):
            group._open_rendezvous()


def test_ranks_that_wait_long_for_each_other_say_so_once_a_node(environment, monkeypatch, capsys):
    monkeypatch.setattr(group, "_TOLD_AFTER_S", 0.05)
    environment.update(RANK="8", WORLD_SIZE="16", LOCAL_RANK="0", MASTER_ADDR="node1", MASTER_PORT="29500")
    with group._telling_of_a_long_wait():
        time.sleep(0.3)
    environment["LOCAL_RANK"] = "1"
    with group._telling_of_a_long_wait():
        time.sleep(0.1)
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "rank 8 has waited" in told and "MASTER_ADDR node1, MASTER_PORT 29500" in told


def test_a_rank_outside_the_world_is_refused_and_told(environment):
    environment["RANK"] = "1"
    with pytest.raises(UserError, match=r"RANK is 1, but WORLD_SIZE is 1: .* Unset both for one process"):
        complete_environment()
    assert distributed.claim_failure_report()


def test_a_free_port_can_be_bound():
    with socket.socket() as server:
        server.bind(("127.0.0.1", distributed.free_port()))


def test_initialize_and_shutdown_of_a_world_of_one_may_be_repeated(environment):
    code = (
        "from ds_seg import distributed as d; import torch.distributed as dist; d.initialize(); d.initialize();"
        "assert dist.get_world_size() == 1 and dist.get_backend() == d.backend() == 'gloo';"
        "assert d.device().type == 'cpu'; d.shutdown(); d.shutdown(); assert not dist.is_initialized()"
    )
    (done,) = run_python(code, {})
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == ""


@pytest.mark.parametrize(("told", "threads"), [(None, 3), ("2", 2)])
def test_a_process_computes_on_its_share_of_the_cores_unless_it_is_told(environment, told, threads):
    code = f"""
        import os
        os.environ.pop("OMP_NUM_THREADS")
        if {told}:
            os.environ["OMP_NUM_THREADS"] = str({told})
        import torch
        from ds_seg import distributed
        distributed.world.usable_cores = lambda: 3
        distributed.initialize()
        assert torch.get_num_threads() == {threads}, torch.get_num_threads()
        distributed.shutdown()
    """
    (done,) = run_python(textwrap.dedent(code), {})
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_process_without_a_gpu_of_its_own_ends_all_with_one_message(environment):
    code = """
        import torch
        from ds_seg.__main__ import main
        from ds_seg.distributed import group
        group.device = lambda: torch.device("cuda", group.local_rank())
        torch.cuda.device_count = lambda: 1
        torch.cuda.set_device = lambda device: None
        main(["train", "demo"])
    """
    port = str(distributed.free_port())
    launch = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    first, second = run_python(
        textwrap.dedent(code), *({**launch, "RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1"))
    )
    assert (first.returncode, second.returncode) == (2, 2)
    assert "UserError: Rank 1 is process 1 of its node (from 0) and sees 1 GPUs" in second.stderr
    assert "srun without --gpus-per-task" in second.stderr and "GPUs" not in first.stderr


@pytest.mark.parametrize(("watched", "wanted"), [(True, "365 days, 0:00:00"), (False, "0:30:00")])
def test_no_collective_is_cut_before_the_watchdog_judges(watched, wanted):
    """Those of DeepSpeed's groups either, whose timeout is torch's default."""
    code = f"""
        from ds_seg import distributed
        distributed.initialize(watched={watched})
        import torch
        from deepspeed.utils import groups
        from torch.distributed import distributed_c10d as c10d
        for group in torch.distributed.group.WORLD, groups._get_data_parallel_group():
            print(group._get_backend(torch.device("cpu")).options._timeout)
        print(c10d._get_default_timeout("nccl"))
        distributed.shutdown()
    """
    (done,) = run_python(textwrap.dedent(code), {})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-3:] == [wanted] * 3


def test_deepspeeds_shared_memory_op_is_left_out():
    """It would compile at run time and leave a buffer a rank in /dev/shm for ever."""
    code = """
        import os
        from pathlib import Path
        from ds_seg import distributed
        distributed.initialize()
        import deepspeed.comm
        assert deepspeed.comm.comm.cdb.shm_comm_op is None
        assert not list(Path("/dev/shm").glob(f"deepspeed_*_{os.environ['MASTER_PORT']}_*"))
        distributed.shutdown()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("chosen", "found", "gpus"),
    [
        (None, 3, ["0", "1", "2"]),
        ("4,5", 2, ["4", "5"]),
        ("GPU-8932f937-d72c,MIG-a6d0c1f2", 2, ["GPU-8932f937-d72c", "MIG-a6d0c1f2"]),
        ("1,-1,2", 1, ["1"]),
        ("", 0, []),
    ],
)
def test_the_gpus_of_this_machine_are_those_that_the_shell_chose(environment, monkeypatch, chosen, found, gpus):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found)
    environment.pop("DS_ACCELERATOR", None)
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    environment.update({} if chosen is None else {"CUDA_VISIBLE_DEVICES": chosen})
    assert launching.list_gpus() == gpus
    environment["DS_ACCELERATOR"] = "cpu"
    assert launching.list_gpus() == []


@pytest.mark.parametrize(("asked", "gpus", "count"), [(None, 4, 4), ("", 0, 1), ("2", 4, 2), ("6", 0, 6)])
def test_as_many_processes_are_started_as_asked_for(environment, asked, gpus, count):
    environment.pop("NUM_GPUS", None)
    environment.update({} if asked is None else {"NUM_GPUS": asked})
    assert launching.count_processes(["0"] * gpus) == count


@pytest.mark.parametrize(("asked", "gpus"), [("5", 4), ("0", 0), ("two", 2)])
def test_a_number_of_gpus_that_can_not_be_is_refused(environment, asked, gpus):
    environment["NUM_GPUS"] = asked
    with pytest.raises(UserError, match=rf"NUM_GPUS={asked}: want a number of processes"):
        launching.count_processes(["0"] * gpus)


def test_ranks_see_the_gpus_that_the_shell_chose_and_hand_their_exit_code_on(tmp_path):
    """A stand-in for ds_seg, under DeepSpeed's real launcher."""
    (tmp_path / "ds_seg.py").write_text(
        "import os, pathlib, sys, time\n"
        "seen = ' '.join([os.environ['CUDA_VISIBLE_DEVICES'], *sys.argv[2:]])\n"
        "pathlib.Path(os.environ['RANK']).write_text(seen)\n"
        "while not pathlib.Path('1').exists(): time.sleep(0.1)\n"
        "sys.exit(75 if os.environ['RANK'] == '0' else 0)\n"
    )
    command = [*launching.build_launcher(2, ["4", "GPU-8932f937", "MIG-a6d0"]), "train", "a run"]
    env = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 75, done.stderr
    assert {(tmp_path / rank).read_text() for rank in "01"} == {"4,GPU-8932f937 train a run"}
