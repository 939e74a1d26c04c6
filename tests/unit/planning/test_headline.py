"""The line in the head of each run file is what the plan says today."""

import re

import pytest

from ds_seg.config import RunOptions, build_run_config
from ds_seg.config.files import RUNS_FOLDER
from ds_seg.planning.headline import START, describe_cost
from ds_seg.planning.search import Planner

RECIPES = sorted(RUNS_FOLDER.glob("internvit*.py"))
COMPARED = (
    "internvit6b_224_linear_ade20k",
    "internvit6b_v2_5_full_linear_ade20k",
    "internvit6b_224_full_upernet_ade20k",
)


def planned_line(path):
    (line,) = [line for line in path.read_text().splitlines() if line.startswith(START)]
    return line


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_says_what_it_takes(path):
    assert re.match(START + r"\d+ GPUs of 80 GiB, \d+ GiB used on each, [\d.]+ hours ", planned_line(path))


@pytest.mark.parametrize("name", COMPARED)
def test_the_line_is_what_the_plan_computes(name):
    path = RUNS_FOLDER / f"{name}.py"
    assert planned_line(path) == describe_cost(Planner(build_run_config(RunOptions(str(path)), 1)))
