"""The launch scripts: what they start, and what they say when they can't."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from command_line import environment

ROOT = Path(__file__).resolve().parents[2]


def launch(script, *arguments, **env):
    return subprocess.run(
        ["bash", str(ROOT / "launch" / script), *map(str, arguments)],
        env=environment(**{"WANDB_MODE": "disabled", **env}),
        capture_output=True,
        text=True,
        timeout=180,
    )


def test_train_starts_as_many_processes_as_asked_for(tiny_config, scenes, tmp_path):
    env = {"NUM_GPUS": "2", "MASTER_PORT": "29617", "DS_SEG_DEMO_ROOT": str(scenes)}
    done = launch("train.sh", tiny_config, "--work-dir", tmp_path, "--cfg-options", "runner.max_iters=2", **env)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "summary.json").read_text())["world_size"] == 2


def test_usage_and_a_missing_hostfile_are_said_with_code_2(tmp_path):
    assert launch("train.sh").returncode == 2 and "HOSTFILE=hosts" in launch("train.sh").stderr
    missing = launch("train.sh", "demo", HOSTFILE=str(tmp_path / "hosts"))
    assert missing.returncode == 2 and "hosts' does not exist" in missing.stderr
    assert launch("train.sh", "demo", NUM_GPUS="none").returncode == 2
    assert launch("slurm.sh", SLURM_SUBMIT_DIR=str(ROOT)).returncode == 2
    outside = launch("slurm.sh", "demo")
    assert outside.returncode == 2 and outside.stderr.endswith(
        "no Slurm job: start it with  sbatch launch/slurm.sh demo\n"
    )


@pytest.mark.parametrize(
    ("lines", "got"),
    [
        ("node7\n", "node7"),
        ("node7 slots=2\nnode8 slot=2\n", "node8 slot=2"),
        ("node7 slots=2\nnode7 slots=2\n", "node7"),
        ("# none\n\n", ""),
    ],
)
def test_a_hostfile_that_deepspeed_would_refuse_is_said_with_code_2(tmp_path, lines, got):
    (tmp_path / "hosts").write_text(lines)
    done = launch("train.sh", "demo", HOSTFILE=str(tmp_path / "hosts"))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.endswith(f"needs a line 'hostname slots=8' for each machine, once each; got '{got}'\n")


def put(script, text):
    script.write_text(f"#!/bin/bash\n{text}\n")
    script.chmod(0o755)


def test_several_machines_get_the_settings_of_this_shell(tmp_path):
    """DeepSpeed's own front end, with stand-ins for ssh and pdsh: what a remote shell would make of it."""
    put(tmp_path / "ssh", "echo 10.0.0.7")
    put(tmp_path / "pdsh", f'for argument in "$@"; do echo "$argument"; done > {tmp_path}/called')
    hosts = tmp_path / "hosts"
    hosts.write_text("node7 slots=2\nnode8 slots=2\n")
    (tmp_path / ".deepspeed_env").write_text("OWN=1\nWANDB_MODE=offline\n")
    odd = '/data/$HOME `id` "ADE" \\20K\'s'
    shell = {"ADE20K_ROOT": odd, "WANDB_API_KEY": "k3y", "OMP_NUM_THREADS": "12", "TORCH_EXTENSIONS_DIR": "/ext"}
    shell |= {"UNRELATED": "1", "HOME": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = launch("train.sh", "demo", "--seed", "3", HOSTFILE=str(hosts), **shell)
    assert done.returncode == 0, done.stderr
    exports, *command = (tmp_path / "called").read_text().splitlines()[5:]
    told = subprocess.run(
        ["env", "-i", "/bin/bash", "-c", f"{exports} env"], capture_output=True, text=True, check=True
    )
    remote = dict(line.split("=", 1) for line in told.stdout.splitlines())
    assert remote["PATH"].endswith(shell.pop("PATH"))  # behind a .venv's own bin
    assert {name: remote.get(name) for name in shell} == {**shell, "UNRELATED": None, "HOME": None}
    assert (remote["OWN"], remote["WANDB_MODE"], remote["DS_ACCELERATOR"]) == ("1", "offline", "cpu")
    assert command[-4:] == ["train", "demo", "--seed", "3"]


def test_a_home_directory_is_not_needed_to_reach_several_machines(tmp_path):
    put(tmp_path / "deepspeed", 'echo "$@"; cat "$DS_ENV_FILE"')
    hosts = tmp_path / "hosts"
    hosts.write_text("# a comment\n\n  node7 slots=2\n  # another\n")
    env = environment(HOSTFILE=str(hosts), PATH=f"{tmp_path}:{os.environ['PATH']}", ADE20K_ROOT="/data")
    env.pop("HOME", None)
    shutil.copytree(ROOT / "launch", tmp_path / "launch")  # the project's folder may have a .venv with DeepSpeed itself
    script = ["bash", str(tmp_path / "launch/train.sh"), "demo"]
    done = subprocess.run(script, env=env, capture_output=True, text=True, check=True)
    assert "ADE20K_ROOT=/data" in done.stdout.splitlines()


def test_several_machines_need_pdsh(tmp_path):
    for program in ("awk", "bash", "dirname", "grep", "sort", "uniq"):
        (tmp_path / program).symlink_to(shutil.which(program))
    hosts = tmp_path / "hosts"
    hosts.write_text("node7 slots=2\nnode8 slots=2\n")
    done = launch("train.sh", "demo", HOSTFILE=str(hosts), PATH=str(tmp_path))
    assert done.returncode == 2 and "pdsh, which is not installed here" in done.stderr


@pytest.mark.parametrize("option", [("--resume", "step_000100"), ("--resume=best",)])
def test_slurm_refuses_a_resume_that_its_own_would_replace(option):
    job = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "1"}
    done = launch("slurm.sh", "demo", *option, "--seed", "3", **job)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert "leave out --resume: the script adds --resume auto" in done.stderr


@pytest.mark.parametrize("requeue", ["", "exit 1"])
def test_slurm_gives_each_task_its_cores_and_requeues_a_stopped_run(tmp_path, requeue):
    """With stand-ins for Slurm's commands, which write down what they are called with."""
    log = tmp_path / "log"
    nodes = f'if [ "$1" = show ]; then echo node7; sleep 0.1; echo node8; exit; fi\n{requeue}'
    for name, answer in (("srun", "exit 75"), ("scontrol", nodes)):
        script = tmp_path / name
        script.write_text(f'#!/bin/bash\necho "{name} $* | ${{MASTER_ADDR:-}}:${{MASTER_PORT:-}}" >> {log}\n{answer}\n')
        script.chmod(0o755)
    (tmp_path / "folder").mkdir()  # without a .venv, whose own bin would come first
    job = {"SLURM_SUBMIT_DIR": str(tmp_path / "folder"), "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "40021"}
    env = {**job, "SLURM_CPUS_PER_TASK": "12", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = launch("slurm.sh", "demo", "--seed", "3", **env)
    assert done.returncode == 75, done.stderr
    shown, started, requeued = log.read_text().splitlines()
    assert shown.startswith("scontrol show hostnames node[7-8]")
    assert "--cpus-per-task=12 python -m ds_seg train demo --seed 3 --resume auto | node7:20021" in started
    assert requeued.startswith("scontrol requeue 40021")
    assert ("could not be requeued: submit it again" in done.stderr) == bool(requeue)


def test_the_scripts_parse():
    for script in (ROOT / "launch").glob("*.sh"):
        assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
