"""What the scripts share that run tests and write a page of docs/ from what these measured."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]


def read_or_measure(page: str, *pytest_arguments: str) -> list[Row]:
    """The rows of a page: of the file that the command line names, or of tests that are run now.

    Ends the script if a test fails, so that the page only ever tells of a whole run.

    Args:
        page: the name that tests/support/measured_rows.py keeps the rows under.
        pytest_arguments: which tests to run, and how.
    """
    if len(sys.argv) > 1:
        return json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "pytest", *pytest_arguments, "-o", f"cache_dir={cache}"]
        if subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode:
            sys.exit("The page was not written: tests failed.")
        return json.loads((Path(cache) / "v" / "ds_seg" / page).read_text(encoding="utf-8"))


def describe_place(packages: Sequence[str]) -> str:
    """The versions that a page's figures belong to."""
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"{versions}, Python {platform.python_version()}, CPU"
