import ast
import gc
import subprocess
import sys

import pytest

from ds_seg.config import CONFIGS_ROOT

COMMANDS = CONFIGS_ROOT.parent / "ds_seg" / "commands"
LIFE = """
import gc
from ds_seg.collector import pause_collector, resume_collector
pause_collector()
assert not gc.isenabled()
import json, http.client
resume_collector()
assert gc.isenabled() and gc.get_freeze_count() > 10_000 and gc.get_count()[0] < 700
"""


def test_what_was_imported_is_left_alone_and_the_rest_collected():
    assert subprocess.run([sys.executable, "-c", LIFE], timeout=60).returncode == 0
    assert gc.isenabled()


@pytest.mark.parametrize("command", "train evaluate predict export plan doctor demo".split())
def test_every_command_lets_the_collector_go_on(command):
    tree = ast.parse((COMMANDS / f"{command}.py").read_text())
    called = [node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    assert called.count("resume_collector") == (2 if command == "doctor" else 1)
