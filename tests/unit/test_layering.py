"""Imports point upward only: a room imports from the rooms above it, never from one below or beside it."""

import ast
from pathlib import Path

import pytest

import ds_seg

ROOMS = (
    "errors files collector versions cgroups host_memory openmmlab distributed supervision config data models engine"
    " evaluation checkpoint inference tracking planning session predictions loop rollback summary workdir_lock workdir "
    "resumption commands __main__"
).split()
PACKAGE = Path(ds_seg.__file__).parent
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def rooms_imported(source):
    """Rooms of ds_seg that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "ds_seg":
            yield from (alias.name for alias in node.names if alias.name in ROOMS)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ds_seg."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("ds_seg."))


def faults_of(path, source):
    own = room_of(path)
    return [room for room in rooms_imported(source) if room != own and ROOMS.index(room) > ROOMS.index(own)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_upward(path):
    assert room_of(path) in ROOMS
    assert faults_of(path, path.read_text()) == []


def test_the_rule_finds_an_import_from_below():
    assert faults_of(PACKAGE / "engine" / "step.py", "from ds_seg.loop import TrainingLoop") == ["loop"]
