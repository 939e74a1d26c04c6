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
