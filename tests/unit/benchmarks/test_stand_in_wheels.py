"""pip takes the empty wheels for what a machine has, without a network, and takes no other version for them."""

import json
import subprocess
import sys

from ds_seg.config import CONFIGS_ROOT

SCRIPT = CONFIGS_ROOT.parent / "benchmarks" / "stand_in_wheels.py"


def resolve(folder, *arguments):
    """What pip would install from a folder alone."""
    report = folder / "report.json"
    command = [sys.executable, "-m", "pip", "install", "-qq", "--isolated", "--no-index", "--find-links", str(folder)]
    command += ["--ignore-installed", "--dry-run", "--report", str(report), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode:
        return done.stderr
    return {item["metadata"]["name"]: item["metadata"]["version"] for item in json.loads(report.read_text())["install"]}


def test_a_machines_packages_are_taken_as_they_are(tmp_path):
    lines = "torch==2.11.0+cu130\nTyping_Extensions==4.1\nnumpy\n"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path)], input=lines, capture_output=True, text=True, timeout=60
    )
    constraints = tmp_path / "constraints.txt"
    constraints.write_text(done.stdout)
    assert done.stdout.split() == ["torch==2.11.0+cu130.present", "Typing_Extensions==4.1+present"]
    names = {"torch": "2.11.0+cu130.present", "Typing_Extensions": "4.1+present"}
    assert resolve(tmp_path, "-c", constraints, "torch==2.11.0", "typing-extensions>=4") == names
    assert "No matching distribution found for torch" in resolve(tmp_path, "torch==2.13.0")
