"""Several commands in one process, which imports torch once; what each printed is left to the test.

Usage: commands_worker.py COMMANDS.json, a list of command lines.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ds_seg.commands import add_commands


def main() -> None:
    parser = argparse.ArgumentParser()
    add_commands(parser)
    for number, arguments in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        print(f"== {number}", flush=True)
        args = parser.parse_args(arguments)
        assert args.run(args) == 0
        print("deepspeed" in sys.modules, flush=True)


if __name__ == "__main__":
    main()
