"""Write empty wheels that tell pip which packages a machine has, so that it collects only what is missing there."""

from __future__ import annotations

import argparse
import re
import sys
import zipfile
from pathlib import Path

MARK = "present"
"""Local part of every version, so that no index has the same one."""


def write_stand_in(name: str, version: str, folder: Path) -> str:
    """Write a wheel without content and dependencies.

    Args:
        name: of the package.
        version: as the machine has it; it counts as equal for whoever asks for it.
        folder: where the wheel goes.

    Returns:
        The requirement that only this wheel meets.
    """
    marked = f"{version}.{MARK}" if "+" in version else f"{version}+{MARK}"
    stem = f"{re.sub('[-_.]+', '_', name).lower()}-{marked}"
    info = f"{stem}.dist-info"
    files = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {marked}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: ds_seg\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        for path, text in {**files, f"{info}/RECORD": record}.items():
            wheel.writestr(path, text)
    return f"{name}=={marked}"


def main() -> int:
    """Read `name==version` lines, write the wheels, print the requirements that name them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    for line in sys.stdin.read().splitlines():
        name, _, version = line.strip().partition("==")
        if version:
            print(write_stand_in(name, version, args.folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
