"""What is said and refused before DeepSpeed compiles its CPU optimizer, or waits for a build that was killed."""

import os
import time
from pathlib import Path

import pytest

from ds_seg.engine.operator_builds import expect_cpu_adam
from ds_seg.errors import ConfigError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this environment's CPU optimizer is compiled; nothing is there yet."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    return tmp_path / "cpu_adam"


def lock(folder: Path, age_s: float) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "lock").touch()
    os.utime(folder / "lock", (time.time() - age_s,) * 2)


def test_a_first_build_is_told_of_and_a_finished_one_is_not(folder: Path) -> None:
    told: list[str] = []
    expect_cpu_adam(told.append)
    assert len(told) == 1 and "it is compiled now, once" in told[0]
    (folder / "cpu_adam.so").touch()
    expect_cpu_adam(told.append)
    assert len(told) == 1


def test_an_old_lock_is_refused_also_beside_a_finished_build(folder: Path) -> None:
    lock(folder, age_s=7200)
    (folder / "cpu_adam.so").touch()
    with pytest.raises(ConfigError, match=rf"left a lock: {folder}/lock, 120 min old\. .*: rm {folder}/lock"):
        expect_cpu_adam(print)


def test_a_young_lock_is_waited_for_with_a_word(folder: Path) -> None:
    lock(folder, age_s=120)
    told: list[str] = []
    expect_cpu_adam(told.append)
    assert "waiting for a build of it" in told[0] and f"rm {folder}/lock" in told[0]


def test_a_lock_of_another_operator_is_no_matter(folder: Path) -> None:
    folder.mkdir()
    (folder / "cpu_adam.so").touch()
    lock(folder.with_name("another"), age_s=7200)
    told: list[str] = []
    expect_cpu_adam(told.append)
    assert told == []


def test_no_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(folder))
    with pytest.raises(
        ConfigError, match=r"no .* and no ninja found on PATH\. Install g\+\+ and ninja, or use .* without offl"
    ):
        expect_cpu_adam(print)


def test_a_finished_build_needs_ninja_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    (folder / "cpu_adam.so").touch()
    monkeypatch.setenv("PATH", str(folder))
    with pytest.raises(ConfigError, match=r"no ninja found on PATH"):
        expect_cpu_adam(print)
    (folder / "ninja").touch(mode=0o755)
    expect_cpu_adam(print)


def test_a_folder_that_can_not_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"can't be made: .*Not a directory.* TORCH_EXTENSIONS_DIR=/folder"):
        expect_cpu_adam(print)
