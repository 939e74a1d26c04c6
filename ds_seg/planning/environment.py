"""What this machine and its packages offer a run, and what would break one."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from prettytable import PrettyTable

from ds_seg import distributed
from ds_seg.engine.operator_builds import extensions_folder, find_build_locks, missing_build_tools
from ds_seg.planning.hardware import GIB

OK, NOTE, BROKEN = "ok", "note", "BROKEN"
SHARED_MEMORY = Path("/dev/shm")
_MODULES = {"mmcv-full": "mmcv", "mmsegmentation": "mmseg", "opencv-python": "cv2", "pillow": "PIL"}
_SETUP = "Install what pyproject.toml asks for: make setup."


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    found: str
    verdict: str
    """OK, NOTE for what limits a run, or BROKEN for what prevents one."""
    remedy: str = ""


def inspect_environment(work_dir: Path) -> list[Check]:
    """Look at packages, devices, memory and folders; packages first, as the rest needs them.

    Args:
        work_dir: a folder that a run would write into.
    """
    checks = [check_python(), *check_packages()]
    importable = {check.name for check in checks if check.verdict != BROKEN}
    if {"torch", "torchvision", "mmcv-full", "mmsegmentation"} <= importable:
        checks += [_guard("mmcv operators", check_operators), _guard("torchvision operators", check_torchvision)]
    if {"torch", "deepspeed"} <= importable:
        checks += [_guard("accelerator", check_accelerator), _guard("collectives", check_collectives)]
        checks += [check_compiler(), *check_locks(extensions_folder())]
    return [*checks, check_shared_memory(), check_machine(), check_work_dir(work_dir)]


def format_checks(checks: list[Check]) -> str:
    """A table of all checks, with the remedies of those that are not well below it."""
    table = PrettyTable(["check", "found", "verdict"], align="l", max_width=80)
    for check in checks:
        table.add_row([check.name, check.found, check.verdict])
    remedies = [f"{check.name}: {check.remedy}" for check in checks if check.remedy and check.verdict == NOTE]
    return "\n".join([str(table), *remedies])


def check_python() -> Check:
    """Whether this Python is one that ds_seg is for."""
    found = platform.python_version()
    try:
        wanted = metadata("ds_seg")["Requires-Python"] or ""
    except PackageNotFoundError:
        return Check("Python", found, NOTE, "ds_seg is not installed, so versions can't be compared: make setup.")
    if SpecifierSet(wanted).contains(found, prereleases=True):
        return Check("Python", found, OK)
    return Check("Python", f"{found}, want {wanted}", BROKEN, "Make .venv with another: make setup PYTHON=python3.11.")


def check_packages() -> Iterator[Check]:
    """Whether each package that ds_seg needs is there in a supported version, and imports."""
    try:
        lines = requires("ds_seg") or []
    except PackageNotFoundError:
        lines = ["torch", "torchvision", "deepspeed", "mmcv-full", "mmsegmentation", "opencv-python", "numpy"]
    for requirement in map(Requirement, lines):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield check_package(requirement)


def check_package(requirement: Requirement) -> Check:
    """Whether one package is installed in a wanted version, and imports."""
    name = requirement.name
    try:
        found = version(name)
    except PackageNotFoundError:
        found = ""
    if found and not requirement.specifier.contains(found, prereleases=True):
        return Check(name, f"{found}, want {requirement.specifier}", BROKEN, _SETUP)
    try:
        if name in ("torchvision", "mmcv-full", "mmsegmentation"):
            importlib.import_module("ds_seg.openmmlab")
        importlib.import_module(_MODULES.get(name, name))
    except Exception as error:  # a package's own code: it can raise anything
        state = f"{found} can't be imported" if found else "not installed"
        return Check(name, f"{state}: {type(error).__name__}: {error}", BROKEN, _SETUP)
    return Check(name, found or "imports, but pip does not know it", OK if found else NOTE)


def check_operators() -> Check:
    """Whether mmcv has its compiled operators."""
    from ds_seg.openmmlab import BUILD_OPS_COMMAND, has_compiled_ops

    if has_compiled_ops():
        return Check("mmcv operators", "compiled", OK)
    remedy = (
        "whatever calls one (PSAHead, deformable convolutions) refuses to run; nothing else needs them. To build them "
        f"(about 15 minutes): {BUILD_OPS_COMMAND}"
    )
    return Check("mmcv operators", "not compiled", NOTE, remedy)


def check_torchvision() -> Check:
    """Whether torchvision's operators were built for this torch."""
    from ds_seg.openmmlab import torchvision_is_mended

    if not torchvision_is_mended():
        return Check("torchvision operators", "work with this torch", OK)
    return Check("torchvision operators", "built for another torch; declared, not usable (nothing here calls one)", OK)


def check_accelerator() -> Check:
    """The devices DeepSpeed would use, and whether GPUs of this machine are left out."""
    import torch
    from deepspeed.accelerator import get_accelerator

    name = get_accelerator().device_name()
    if name != "cpu":
        gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        if not gpus:
            remedy = "Without GPUs set DS_ACCELERATOR=cpu; with GPUs look at nvidia-smi and CUDA_VISIBLE_DEVICES."
            return Check("accelerator", f"{name}, but torch sees no device", BROKEN, remedy)
        listed = f"{len(gpus)} x {gpus[0].name}, {gpus[0].total_memory / GIB:.0f} GiB, CUDA {torch.version.cuda}"
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Check("accelerator", listed, OK)
        remedy = "Use --deepspeed-config ds_configs/deepspeed/zero3_fp32.json, or a GPU from Ampere on."
        return Check("accelerator", f"{listed}, no bf16", NOTE, remedy)
    if not _gpu_devices():
        remedy = "Small models and tests run; a recipe of 6 billion parameters needs GPUs."
        return Check("accelerator", "cpu; this machine shows no GPU", NOTE, remedy)
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        remedy = "Unset DS_ACCELERATOR to use them."
        return Check("accelerator", "cpu by DS_ACCELERATOR, beside GPUs", NOTE, remedy)
    remedy = (
        f"torch {torch.__version__} (CUDA {torch.version.cuda}) can't use the GPUs: install a CUDA build of torch that "
        "the driver supports (nvidia-smi shows its CUDA version)."
    )
    return Check("accelerator", "cpu, though this machine has GPUs", BROKEN, remedy)


def check_collectives() -> Check:
    """Whether a process group can be made and used, in a world of one."""
    import torch
    import torch.distributed as dist

    from ds_seg.distributed import backend, device

    name = backend()
    if not dist.is_available() or not (dist.is_nccl_available() if name == "nccl" else dist.is_gloo_available()):
        return Check("collectives", f"this torch has no {name}", BROKEN, "Install a build of torch that has it.")
    try:
        dist.init_process_group(name, store=dist.HashStore(), rank=0, world_size=1)
        total = torch.ones(1, device=device())
        dist.all_reduce(total)
        dist.destroy_process_group()
    except (RuntimeError, ValueError) as error:
        remedy = (
            f"Set {'NCCL' if name == 'nccl' else 'GLOO'}_SOCKET_IFNAME to the network interface that is to be used."
        )
        return Check("collectives", f"{name} fails: {error}", BROKEN, remedy)
    release = ".".join(map(str, torch.cuda.nccl.version())) if name == "nccl" else ""
    return Check("collectives", f"{name} {release}".strip(), OK)


def check_compiler() -> Check:
    """Whether DeepSpeed could compile an operator; only the CPU optimizer of offloading needs one."""
    missing = missing_build_tools()
    if not missing:
        return Check("compiler", "c++ and ninja", OK)
    remedy = "only offload_optimizer needs them, to compile DeepSpeed's CPU optimizer: install g++ and ninja."
    return Check("compiler", f"no {' and no '.join(missing)}", NOTE, remedy)


def check_locks(folder: Path) -> list[Check]:
    """Locks that a killed build of an operator left, on which every later build waits without end."""
    locks = find_build_locks(folder)
    checks = [Check("build lock", str(lock), BROKEN if lock.stale else NOTE, lock.remedy) for lock in locks]
    return checks or [Check("build lock", f"none in {folder}", OK)]


def check_shared_memory(folder: Path = SHARED_MEMORY) -> Check:
    """Whether data loading workers can hand over their batches."""
    if not folder.is_dir():
        return Check("shared memory", f"no {folder}", NOTE, "Loading workers may fail: set data.workers_per_gpu=0.")
    free_gib = shutil.disk_usage(folder).free / GIB
    remedy = (
        "batches pass through it: enlarge it (docker run --shm-size=16g, or --ipc=host), or load in the main process: "
        "--cfg-options data.workers_per_gpu=0."
    )
    verdict = OK if free_gib >= 1 else NOTE if free_gib >= 1 / 32 else BROKEN
    return Check("shared memory", f"{free_gib:.2f} GiB free in {folder}", verdict, "" if verdict == OK else remedy)


def check_machine() -> Check:
    """Cores and memory, and what of them a job may use."""
    import psutil

    from ds_seg.host_memory import measure_free_bytes

    cores = f"{os.cpu_count()} cores ({distributed.usable_cores()} usable)"
    memory = f"{psutil.virtual_memory().total / GIB:.0f} GiB memory ({measure_free_bytes() / GIB:.0f} free to this job)"
    return Check("machine", f"{cores}, {memory}", OK)


def check_work_dir(work_dir: Path) -> Check:
    """Whether a run could write its outputs, and how much room there is."""
    existing = next(folder for folder in (work_dir.absolute(), *work_dir.absolute().parents) if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        remedy = "Choose another --work-dir, or make it writable."
        return Check("work dir", f"{work_dir.absolute()} can't be written: {error}", BROKEN, remedy)
    free_gib = shutil.disk_usage(existing).free / GIB
    return Check("work dir", f"{work_dir.absolute()}, {free_gib:.0f} GiB free", OK)


def _guard(name: str, check: Callable[[], Check]) -> Check:
    """A check that calls into drivers and libraries: whatever they raise is its result."""
    try:
        return check()
    except Exception as error:  # the doctor's report must not end at the first sick organ
        return Check(name, f"{type(error).__name__}: {error}", BROKEN, _SETUP)


def _gpu_devices() -> list[Path]:
    return [*Path("/dev").glob("nvidia[0-9]*"), *Path("/dev").glob("kfd")]
