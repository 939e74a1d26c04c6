"""DeepSpeed's CPU optimizer is compiled at its first use, under a lock that a killed build leaves behind for ever."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ds_seg.errors import ConfigError

CPU_ADAM = "cpu_adam"
_STALE_S = 1800.0


@dataclass(frozen=True)
class BuildLock:
    """A file that tells other processes to wait for a build."""

    path: Path
    age_s: float

    @property
    def stale(self) -> bool:
        """Whether it is older than any build takes."""
        return self.age_s > _STALE_S

    @property
    def remedy(self) -> str:
        """For who waits for it."""
        return f"If no process is compiling, remove it, or runs that need the operator wait without end: rm {self.path}"

    def __str__(self) -> str:
        return f"{self.path}, {self.age_s / 60:.0f} min old"


def extensions_folder() -> Path:
    """Where torch puts operators that are compiled at run time."""
    from torch.utils.cpp_extension import get_default_build_root

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


def find_build_locks(folder: Path) -> Iterator[BuildLock]:
    """The locks below a folder of operators."""
    for path in sorted([*folder.glob("lock"), *folder.glob("*/lock"), *folder.glob("*/*/lock")]):
        try:
            yield BuildLock(path, time.time() - path.stat().st_mtime)
        except FileNotFoundError:  # its build has just ended
            continue


def missing_build_tools() -> list[str]:
    """What of the compiler and ninja is not to be found."""
    return [tool for tool in (os.environ.get("CXX", "c++"), "ninja") if shutil.which(tool) is None]


def expect_cpu_adam(log: Callable[[str], None]) -> None:
    """Look for what would keep DeepSpeed's CPU optimizer from being compiled or loaded, before it is asked for.

    Args:
        log: told that it is going to be compiled, and of a lock that it will wait for.

    Raises:
        ConfigError: there is no compiler or no ninja, which looks at a finished build too, the folder of operators
            can't be written, or has a lock that is too old to be that of a build that goes on.
    """
    from deepspeed.git_version_info import installed_ops
    from torch.utils.cpp_extension import _get_build_directory

    if installed_ops.get(CPU_ADAM):
        return
    needed = "offload_optimizer needs DeepSpeed's CPU optimizer"
    try:
        folder = Path(_get_build_directory(CPU_ADAM, verbose=False))
    except OSError as error:
        raise ConfigError(
            f"{needed}, whose folder can't be made: {error}. Name one that can: TORCH_EXTENSIONS_DIR=/folder"
        ) from error
    for lock in find_build_locks(folder):
        if lock.stale:
            raise ConfigError(f"{needed}, and a build of it that was killed left a lock: {lock}. {lock.remedy}")
        log(f"{needed}: waiting for a build of it, {lock}. {lock.remedy}")
    built = (folder / f"{CPU_ADAM}.so").exists()
    if missing := [tool for tool in missing_build_tools() if tool == "ninja" or not built]:
        raise ConfigError(
            f"{needed}, which is compiled at its first use and checked with ninja at every later one: no "
            f"{' and no '.join(missing)} found on PATH. "
            "Install g++ and ninja, or use a DeepSpeed JSON without offload_optimizer."
        )
    if not built:
        log(f"{needed}: it is compiled now, once for this environment, which takes about a minute")
