"""What `ds-seg plan` prints for the 6B model: all of it in docs/plans.md, a table and the main lines in the README."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable

RUN = "internvit6b_224_full_linear_ade20k"
PLANS = (("1", "141"), ("1", "80"), ("8", "80"), ("64", "80"))
"""GPUs, and GiB of each."""
_TABLE = ("<!-- plans as a table: scripts/write_plans.py -->\n", "<!-- end of the table -->\n")
_PRINTED = ("<!-- printed by ds-seg plan: scripts/write_plans.py -->\n", "<!-- end of the plans -->\n")
_HEADLINES = ("recommended: ", "| memory ", "| together ", "step ", "schedule: ")
_COLUMNS = ("GPUs", "crops", "checkpointing", "optimizer", "GiB a GPU", "GiB a host", "step", "MFU", "steps", "hours")
_FACTS = (
    r"^(\d+ GPUs? of .*)$",
    r"^recommended: (\d+ )crops?( x \d+) micro-batch.*, checkpointing '(\w+)', optimizer (.*)$",
    r"^\| together +\| +([\d.]+) \| +([\d.]+) \|$",
    r"^step ([\d.]+ s) = .* MFU (\d+%)$",
    r"^schedule: (\d+ )steps of (\d+) crops: ([\d.]+) hours",
)
"""Where the cells of a row of the table stand in a printed plan."""
_INTRODUCTION = f"""# Plans for the 6B model

The output of `ds-seg plan {RUN}` for one GPU of 141 GiB and for 1, 8 and 64
GPUs of 80 GiB, written by `python scripts/write_plans.py`. These are predictions: they were made without a GPU.
"""

PrintPlan = Callable[..., str]
"""Arguments of `ds-seg plan` -> what it prints."""


def run_command(*arguments: str) -> str:
    """Run `ds-seg plan` in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "ds_seg", "plan", *arguments]
        return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


def print_plans(print_plan: PrintPlan) -> dict[str, str]:
    """By the command without its start: what it prints."""
    plans = {}
    for gpus, memory_gib in PLANS:
        arguments = (RUN, "--gpus", gpus, "--gpu-memory", memory_gib)
        plans[" ".join(arguments)] = print_plan(*arguments)
    return plans


def format_page(plans: dict[str, str]) -> str:
    """The whole of docs/plans.md."""
    sections = [f"## ds-seg plan {arguments}\n\n{_indent(printed)}" for arguments, printed in plans.items()]
    return "\n".join([_INTRODUCTION, *sections])


def put_plans(readme: str, plans: dict[str, str]) -> str:
    """The README with the plans between its marks."""
    return _put(_put(readme, _TABLE, _format_table(plans)), _PRINTED, _format_headlines(plans))


def _format_table(plans: dict[str, str]) -> str:
    lines = [f"| {' | '.join(_COLUMNS)} |", f"|{'---|' * len(_COLUMNS)}"]
    for printed in plans.values():
        hardware, crops, times, policy, place, *figures, steps, batch, hours = _read_facts(printed)
        cells = (hardware, crops + times.strip(), policy, place, *figures, f"{steps}x {batch}", hours)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _format_headlines(plans: dict[str, str]) -> str:
    """The lines of each plan that say most."""
    chosen = []
    for printed in plans.values():
        lines = printed.splitlines()
        title = next(line for line in lines if re.match(r"\d+ GPUs? of ", line))
        chosen.append("\n".join([title, *(line for line in lines if line.startswith(_HEADLINES))]) + "\n")
    return _indent("\n".join(chosen))


def _put(readme: str, marks: tuple[str, str], text: str) -> str:
    start, end = marks
    before, _, rest = readme.partition(start)
    _, mark, after = rest.partition(end)
    assert mark, f"README.md lacks the marks {start.strip()} and {end.strip()}"
    return f"{before}{start}\n{text}\n{end}{after}"


def _read_facts(printed: str) -> list[str]:
    facts: list[str] = []
    for pattern in _FACTS:
        found = re.search(pattern, printed, re.MULTILINE)
        assert found, f"ds-seg plan prints no line like {pattern}"
        facts += found.groups()
    return facts


def _indent(text: str) -> str:
    return "".join(f"    {line}".rstrip() + "\n" for line in text.strip("\n").splitlines())
