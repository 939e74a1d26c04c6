"""The Makefile and scripts/setup.sh, in a folder of their own: what they make, keep and delete."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OF_THE_CALLER = ("PYTHON", "TORCH", "WHEELS", "MAKEFLAGS", "MAKELEVEL")
"""Variables that `make test` may have been started with."""
PYTHON = """#!/bin/bash
case "$*" in
  --version) echo {name} ;;
  "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python && cp "$0" .venv/bin/python3 ;;
  *" -r "*) cat "${{@: -1}}" >>{folder}/log ;;
  "-m pip "*) echo "$*" >>{folder}/log ;;
esac
"""


class Checkout:
    """The files that `make` reads of the project, in another folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("Makefile", "constraints.txt", "pyproject.toml"):
            shutil.copy(ROOT / name, folder)
        shutil.copytree(ROOT / "scripts", folder / "scripts")

    def make(self, *arguments: str, **variables: str) -> str:
        """What the command prints; it must succeed."""
        env = {name: value for name, value in os.environ.items() if name not in OF_THE_CALLER}
        done = subprocess.run(
            ["make", "--no-print-directory", *arguments],
            cwd=self.folder,
            env={**env, **variables},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def setup(self, **choices: str) -> tuple[str, list[str]]:
        """What `make setup NAME=value ...` prints, and the packages that it hands to pip by name."""
        log = self.folder / "log"
        log.write_text("")
        path = f"{self.folder}/.venv/bin:{self.folder}/bin:{os.environ['PATH']}"  # as where .venv is activated
        printed = self.make("setup", *(f"{name}={value}" for name, value in choices.items()), PATH=path)
        return printed, re.findall(r"(?:torch|mmcv-full)==\S+|/\S+/mmcv_full\S+", log.read_text())

    def add_python(self, name: str) -> str:
        """A stand-in for an interpreter without torch, which makes copies of itself and installs nothing."""
        python = self.folder / "bin" / name
        python.parent.mkdir(exist_ok=True)
        python.write_text(PYTHON.format(folder=self.folder, name=name))
        python.chmod(0o755)
        return str(python)


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def test_help_lists_every_target(checkout):
    targets = re.findall(r"^(\S+):(?! JOBS)", (ROOT / "Makefile").read_text(), re.M)
    listed = re.findall(r"^make (\S+)", checkout.make("help"), re.M)
    assert set(listed) == {*targets} - {".PHONY", "help"}


def test_clean_keeps_checkpoints(checkout):
    for folder in ("work_dirs/demo/checkpoints", ".venv/bin", "build", "ds_seg.egg-info"):
        (checkout.folder / folder).mkdir(parents=True)
    checkout.make("clean")
    assert (checkout.folder / "work_dirs/demo/checkpoints").is_dir()
    assert not any((checkout.folder / name).exists() for name in (".venv", "build", "ds_seg.egg-info"))


def test_setup_does_nothing_twice(checkout):
    checkout.add_python("python3")
    printed, installed = checkout.setup()
    assert "making .venv with python3\n" in printed
    assert [requirement.partition("==")[0] for requirement in installed] == ["torch", "mmcv-full"]
    assert checkout.setup() == ("", [])


def test_setup_makes_anew_what_was_made_with_another_choice_and_keeps_the_choices(checkout):
    checkout.add_python("python3")
    other = checkout.add_python("other")
    checkout.setup()
    printed, (torch, _) = checkout.setup(TORCH="torch==2.11.0")
    assert "with python3, anew: what it was made with has changed" in printed and torch == "torch==2.11.0"
    assert checkout.setup() == checkout.setup(TORCH="torch==2.11.0") == ("", [])
    printed, (torch, _) = checkout.setup(PYTHON=other)
    assert "with other, anew" in printed and torch == "torch==2.11.0"
    with (checkout.folder / "constraints.txt").open("a") as constraints:
        constraints.write("# another version\n")
    printed, (torch, _) = checkout.setup()
    assert "with other, anew" in printed and torch == "torch==2.11.0"


def test_setup_from_wheels_stays_one_and_tells_of_a_torch_that_has_no_say(checkout):
    checkout.add_python("python3")
    wheels = checkout.folder / "wheels"
    wheels.mkdir()
    for name in ("mmcv_full-1.7.2-py2.py3-none-any.whl", "torch-2.13.0-cp311-cp311-linux_x86_64.whl"):
        (wheels / name).touch()
    checkout.setup()
    assert f"installing the wheels in {wheels}" in checkout.setup(WHEELS="wheels")[0]
    assert checkout.setup() == checkout.setup(WHEELS=str(wheels)) == ("", [])
    printed, installed = checkout.setup(TORCH="torch==2.11.0")
    assert f"TORCH=torch==2.11.0 has no say here: torch comes from {wheels}" in printed
    assert installed == [str(wheels / "mmcv_full-1.7.2-py2.py3-none-any.whl")]
