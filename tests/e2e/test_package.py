"""A plain install of the wheel has the runs, and its entry point answers."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that holds what the wheel holds, and nothing of the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(ROOT),
    ]
    done = subprocess.run(build, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("ds_seg-*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def run_installed(installed, *arguments):
    env = {**os.environ, "PYTHONPATH": str(installed), "DS_ACCELERATOR": "cpu", "WANDB_MODE": "disabled"}
    return subprocess.run(
        [sys.executable, "-m", "ds_seg", *arguments],
        cwd=installed,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_every_config_is_in_the_wheel(installed):
    shipped = {path.relative_to(ROOT) for path in (ROOT / "ds_configs").rglob("*") if path.suffix in (".py", ".json")}
    assert shipped and all((installed / path).is_file() for path in shipped)
    assert (installed / "ds_seg" / "py.typed").is_file()


def test_run_names_resolve_after_a_plain_install(installed):
    code = "import ds_seg, sys; from ds_seg.config import resolve_config_path; print(resolve_config_path('demo'))"
    env = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=installed, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == str(installed / "ds_configs" / "runs" / "demo.py"), done.stderr


@pytest.mark.parametrize("command", [[], ["train"], ["evaluate"], ["predict"], ["demo"]])
def test_help_teaches(installed, command):
    done = run_installed(installed, *command, "--help")
    assert done.returncode == 0 and "usage: ds-seg" in done.stdout
    if command in (["train"], ["evaluate"], ["predict"]):
        assert "ds_configs/runs" in done.stdout and "--cfg-options" in done.stdout


def test_a_missing_command_is_a_usage_error(installed):
    assert run_installed(installed).returncode == 2
