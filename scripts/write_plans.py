"""Write what `ds-seg plan` predicts: into the head of every InternViT run file, docs/plans.md and the README."""

from __future__ import annotations

import sys
from pathlib import Path

from plans_page import format_page, print_plans, put_plans, run_command

from ds_seg.config import RunOptions, build_run_config
from ds_seg.config.files import RUNS_FOLDER
from ds_seg.planning.headline import START, describe_cost
from ds_seg.planning.search import Planner
from ds_seg.planning.step_costs import Known

_ROOT = Path(__file__).resolve().parents[1]


def put_line(text: str, line: str) -> str:
    """The file with the line at the end of its head, in place of an earlier one."""
    lines = [own for own in text.splitlines() if not own.startswith(START)]
    head = next(index for index, own in enumerate(lines) if not own.startswith("#"))
    return "\n".join([*lines[:head], line, *lines[head:]]) + "\n"


def list_run_files() -> list[Path]:
    """The recipes that have a plan in their head."""
    return sorted(RUNS_FOLDER.glob("internvit*.py"))


def main() -> int:
    """Update every file."""
    plans, readme = print_plans(run_command), _ROOT / "README.md"
    (_ROOT / "docs" / "plans.md").write_text(format_page(plans), encoding="utf-8")
    readme.write_text(put_plans(readme.read_text(encoding="utf-8"), plans), encoding="utf-8")
    known: Known = {}
    for path in list_run_files():
        line = describe_cost(Planner(build_run_config(RunOptions(str(path)), 1), known))
        path.write_text(put_line(path.read_text(encoding="utf-8"), line), encoding="utf-8")
        print(path.stem, line.removeprefix(START), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
