"""A small dataset, a small config and a trained work dir for tests of the command line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from command_line import TINY, Cli
from ds_seg.config import CONFIGS_ROOT
from ds_seg.data.demo_scenes import write_demo_dataset


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """A small generated dataset."""
    root = tmp_path_factory.mktemp("scenes") / "data"
    write_demo_dataset(root, train_images=16, val_images=6, size_px=112)
    return root


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory) -> Path:
    """The demo's run at a width that trains a step in a moment."""
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(TINY.format(base=str(CONFIGS_ROOT / "runs" / "demo.py")))
    return path


@pytest.fixture
def cli(tmp_path, scenes) -> Iterator[Cli]:
    """The command line in an empty folder."""
    cli = Cli(tmp_path, scenes)
    yield cli
    cli.kill_started()


@pytest.fixture(scope="session")
def trained(tmp_path_factory, scenes, tiny_config) -> Path:
    """The work dir of a finished run of the tiny config."""
    folder = tmp_path_factory.mktemp("trained")
    done = Cli(folder, scenes)("train", tiny_config, "--work-dir", folder / "run")
    assert done.returncode == 0, done.stderr
    return folder / "run"
