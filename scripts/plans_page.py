"""docs/plans.md and the README's part about it: what `ds-seg plan` prints for the 6B model, word for word."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable

RUN = "internvit6b_224_full_linear_ade20k"
PLANS = (("1", "141"), ("1", "80"), ("8", "80"), ("64", "80"))
"""GPUs, and GiB of each."""
START, END = "<!-- printed by ds-seg plan: scripts/write_plans.py -->\n", "<!-- end of the plans -->\n"
_HEADLINES = ("recommended: ", "| memory ", "| together ", "step ", "schedule: ")
_INTRODUCTION = f"""# Plans for the 6B model

What `ds-seg plan {RUN}` prints for one GPU of 141 GiB and for 1, 8 and 64 of
80 GiB. Predictions: no GPU was at hand when they were made. Written by `python scripts/write_plans.py`.
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


def format_headlines(plans: dict[str, str]) -> str:
    """The lines of each plan that say most."""
    chosen = []
    for printed in plans.values():
        lines = printed.splitlines()
        title = next(line for line in lines if re.match(r"\d+ GPUs? of ", line))
        chosen.append("\n".join([title, *(line for line in lines if line.startswith(_HEADLINES))]) + "\n")
    return _indent("\n".join(chosen))


def put_headlines(readme: str, headlines: str) -> str:
    """The README with these between its marks."""
    before, _, rest = readme.partition(START)
    _, mark, after = rest.partition(END)
    assert mark, f"README.md lacks the marks {START.strip()} and {END.strip()}"
    return f"{before}{START}\n{headlines}\n{END}{after}"


def _indent(text: str) -> str:
    return "".join(f"    {line}".rstrip() + "\n" for line in text.strip("\n").splitlines())
