from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections import namedtuple
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from packaging.requirements import Requirement

import ds_seg.planning.environment as environment
from ds_seg import distributed
from ds_seg.commands import doctor
from ds_seg.errors import UserError
from ds_seg.planning.environment import BROKEN, NOTE, OK, Check, check_package, format_checks

Usage = namedtuple("Usage", "total used free")


def run_doctor(*options: object) -> int:
    parser = argparse.ArgumentParser()
    doctor.add_parser(parser.add_subparsers())
    args = parser.parse_args(["doctor", *map(str, options)])
    return args.run(args)


@pytest.fixture
def extensions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "extensions"
    folder.mkdir()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
    return folder


def lose(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let a function of importlib.metadata find nothing."""

    def absent(package: str) -> None:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(environment, name, absent)


@pytest.mark.skipif(dist.is_initialized(), reason="makes a process group of its own")
def test_this_machine_is_fit_and_a_stale_lock_is_an_error(
    extensions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_doctor("--json", tmp_path / "found.json", "--work-dir", tmp_path / "runs") == 0
    found = json.loads((tmp_path / "found.json").read_text())
    verdicts = {check["name"]: check["verdict"] for check in found["checks"]}
    assert found["ok"] and BROKEN not in verdicts.values()
    assert {verdicts[name] for name in ("Python", "torch", "deepspeed", "collectives", "build lock", "work dir")} == {
        OK
    }
    table = capsys.readouterr().out
    assert all(name in table for name in verdicts)
    assert not dist.is_initialized() and not (tmp_path / "runs").exists()
    lock = extensions / "py311_cpu/cpu_adam/lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (time.time() - 7200,) * 2)
    with pytest.raises(UserError, match=rf"1 of \d+ checks failed:\n  build lock: {lock}, 120 min old\. .*: rm {lock}"):
        run_doctor("--json", tmp_path / "found.json")
    assert json.loads((tmp_path / "found.json").read_text())["ok"] is False


def test_a_fresh_lock_may_be_a_build_that_goes_on(tmp_path: Path) -> None:
    (tmp_path / "cpu_adam").mkdir()
    (tmp_path / "cpu_adam/lock").touch()
    (check,) = environment.check_locks(tmp_path)
    assert check.verdict == NOTE and "If no process is compiling, remove it" in check.remedy


def test_packages_of_another_version_absent_or_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert check_package(Requirement("numpy>=2.0")).verdict == OK
    other = check_package(Requirement("numpy>=99"))
    assert other.verdict == BROKEN and other.found.endswith("want >=99") and "make setup" in other.remedy
    absent = check_package(Requirement("no-such-package"))
    assert absent.verdict == BROKEN and absent.found.startswith("not installed: ModuleNotFoundError")
    (tmp_path / "broken_package.py").write_text("raise OSError('libcudart.so.12: no such file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(environment, "version", lambda _name: "1.0")
    broken = check_package(Requirement("broken_package"))
    assert broken.verdict == BROKEN and "1.0 can't be imported: OSError: libcudart.so.12" in broken.found
    lose(monkeypatch, "version")
    (tmp_path / "headless_twin.py").touch()
    assert check_package(Requirement("headless_twin")).verdict == NOTE


def test_versions_are_those_that_the_package_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(environment, "check_package", lambda requirement: asked.append(requirement.name))
    list(environment.check_packages())
    assert {"torch", "deepspeed", "mmcv-full", "mmsegmentation"} <= set(asked) and "pytest" not in asked
    lose(monkeypatch, "requires")
    assert len(list(environment.check_packages())) == 7
    lose(monkeypatch, "metadata")
    assert "ds_seg is not installed" in environment.check_python().remedy


def test_a_python_that_is_not_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.platform, "python_version", lambda: "3.9.1")
    check = environment.check_python()
    assert check.verdict == BROKEN and check.found.startswith("3.9.1, want") and "PYTHON=" in check.remedy


@pytest.mark.parametrize(("free_gib", "verdict"), [(8.0, OK), (0.06, NOTE), (0.01, BROKEN)])
def test_shared_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free_gib: float, verdict: str) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(0, 0, free_gib * 2**30))
    check = environment.check_shared_memory(tmp_path)
    assert check.verdict == verdict and ("workers_per_gpu=0" in check.remedy) == (verdict != OK)
    assert environment.check_shared_memory(tmp_path / "absent").verdict == NOTE


def test_a_work_dir_that_can_not_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(dir: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(environment.tempfile, "TemporaryFile", refuse)
    check = environment.check_work_dir(tmp_path / "runs/first")
    assert check.verdict == BROKEN and "can't be written" in check.found and "--work-dir" in check.remedy


def pretend_gpus(monkeypatch: pytest.MonkeyPatch, count: int, bf16: bool = True) -> None:
    import deepspeed.accelerator

    monkeypatch.setattr(deepspeed.accelerator, "get_accelerator", lambda: SimpleNamespace(device_name=lambda: "cuda"))
    properties = SimpleNamespace(name="GPU X", total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _index: properties)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, 8)
    check = environment.check_accelerator()
    assert check.verdict == OK and check.found.startswith("8 x GPU X, 80 GiB")
    pretend_gpus(monkeypatch, 8, bf16=False)
    check = environment.check_accelerator()
    assert check.verdict == NOTE and "zero3_fp32.json" in check.remedy
    pretend_gpus(monkeypatch, 0)
    check = environment.check_accelerator()
    assert check.verdict == BROKEN and "CUDA_VISIBLE_DEVICES" in check.remedy


def test_gpus_that_torch_does_not_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import deepspeed.accelerator

    monkeypatch.setattr(deepspeed.accelerator, "get_accelerator", lambda: SimpleNamespace(device_name=lambda: "cpu"))
    monkeypatch.setattr(environment, "_gpu_devices", lambda: [tmp_path])
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert environment.check_accelerator().remedy == "Unset DS_ACCELERATOR to use them."
    monkeypatch.delenv("DS_ACCELERATOR")
    check = environment.check_accelerator()
    assert check.verdict == BROKEN and "install a CUDA build of torch" in check.remedy
    monkeypatch.setattr(environment, "_gpu_devices", list)
    assert environment.check_accelerator().verdict == NOTE


def test_collectives_that_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError("unable to resolve hostname to a (local) address")

    monkeypatch.setattr(distributed, "backend", lambda: "gloo")
    monkeypatch.setattr(dist, "init_process_group", fail)
    check = environment.check_collectives()
    assert check.verdict == BROKEN and "unable to resolve" in check.found and "GLOO_SOCKET_IFNAME" in check.remedy
    monkeypatch.setattr(dist, "is_gloo_available", lambda: False)
    assert environment.check_collectives().found == "this torch has no gloo"


def test_operators_and_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    import ds_seg.openmmlab as openmmlab

    monkeypatch.setattr(openmmlab, "has_compiled_ops", lambda: False)
    assert "MMCV_WITH_OPS=1" in environment.check_operators().remedy
    monkeypatch.setattr(openmmlab, "has_compiled_ops", lambda: True)
    assert environment.check_operators() == Check("mmcv operators", "compiled", OK)
    monkeypatch.setattr(openmmlab, "torchvision_is_mended", lambda: False)
    assert environment.check_torchvision().found == "work with this torch"
    monkeypatch.setattr(openmmlab, "torchvision_is_mended", lambda: True)
    assert environment.check_torchvision().found.startswith("built for another torch")
    monkeypatch.setattr(shutil, "which", lambda _tool: None)
    assert environment.check_compiler().found == f"no {os.environ.get('CXX', 'c++')} and no ninja"
    monkeypatch.setattr(shutil, "which", lambda tool: tool)
    assert environment.check_compiler().verdict == OK


def test_a_check_that_raises_is_reported_beside_the_others() -> None:
    def sick() -> Check:
        raise OSError("driver gone")

    check = environment._guard("accelerator", sick)
    assert check.verdict == BROKEN and check.found == "OSError: driver gone"
    assert "accelerator: Unset it." in format_checks([Check("accelerator", "cpu", NOTE, "Unset it.")])
