"""Real pretrained weights for tests, where the tool that builds them is at hand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[3] / "shared" / "tools" / "dinov2_small.py"


def find_dinov2_small(config: pytest.Config) -> Path:
    """A DINOv2-S/14 file in HuggingFace's dialect, built once and kept in pytest's cache; skips without the tool."""
    if not TOOL.is_file():
        pytest.skip(f"needs the tool that builds pretrained weights ({TOOL})")
    assert config.cache is not None
    path = Path(config.cache.mkdir("dinov2_small")) / "model.safetensors"
    if not path.is_file():
        unfinished = path.with_suffix(f".{os.getpid()}")
        done = subprocess.run([sys.executable, str(TOOL), str(unfinished)], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        unfinished.replace(path)
    return path
