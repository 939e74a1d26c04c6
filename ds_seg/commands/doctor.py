"""`ds-seg doctor`: what is wrong with a dataset, or with the environment."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ds_seg import distributed
from ds_seg.collector import resume_collector
from ds_seg.errors import EXIT_OK, ConfigError, DataError, UserError, count
from ds_seg.files import validate_output_file

# What needs torch or mmseg is imported inside the functions, so that --help answers at once.
_ROLES = ("train", "val", "test")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Describe the command."""
    parser = subparsers.add_parser(
        "doctor",
        help="check a dataset, or the environment",
        description="With CONFIG: read every image and annotation of its dataset and name what is wrong. Without: "
        "check versions, devices and folders. Exit code 2 if something must be fixed.",
    )
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="path of an MMSeg 0.x config, or the name of a run")
    parser.add_argument("--cfg-options", nargs="+", metavar="K=V", default=[], help="change config values, as in MMSeg")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all findings to this file")
    cores = distributed.usable_cores()
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        default=cores,
        help=f"processes that read files (default: {cores}, the cores)",
    )
    parser.add_argument(
        "--work-dir", metavar="D", type=Path, default=Path("work_dirs"), help="folder that a run would write to"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command in this process."""
    if distributed.world_size() > 1:
        raise UserError("ds-seg doctor uses all cores by itself: start it alone, without a launcher.")
    if args.workers < 1:
        raise UserError(f"--workers: got {args.workers}, want at least 1.")
    if args.json:
        validate_output_file("--json", args.json)
    return check_dataset(args) if args.config else check_environment(args)


def check_dataset(args: argparse.Namespace) -> int:
    """Survey the datasets of a config and print what was found.

    Raises:
        ConfigError: the config or one of its datasets can't be built.
        DataError: the dataset has faults; names the files.
    """
    from ds_seg.config import read_config_file, resolve_config_path
    from ds_seg.config.overrides import parse_overrides
    from ds_seg.data.diagnosis import diagnose
    from ds_seg.data.survey import survey_datasets
    from ds_seg.tracking.files import write_json_output

    resume_collector()
    config = read_config_file(resolve_config_path(args.config), parse_overrides(args.cfg_options))
    datasets = _open_datasets(config)
    survey = survey_datasets(datasets, workers=args.workers, progress=True)
    diagnosis = diagnose(survey, datasets, config.get("model"))
    print(diagnosis.tables())
    rate = survey.pairs_read / survey.seconds
    print(f"read {count(survey.pairs_read, 'image')} in {survey.seconds:.1f} s ({rate:.0f} images/s)")
    if args.json:
        write_json_output("--json", args.json, {"config": args.config, **diagnosis.to_dict()})
    if diagnosis.warnings:
        print(f"\n{count(len(diagnosis.warnings), 'warning')}\n{diagnosis.format_findings(diagnosis.warnings)}")
    if diagnosis.faults:
        faults, cures = diagnosis.format_findings(diagnosis.faults), "\n".join(diagnosis.cures)
        found = count(len(diagnosis.faults), "fault")
        raise DataError(f"{found} in the dataset of {args.config}\n{faults}\n{cures}".rstrip())
    print("\nno fault found")
    return EXIT_OK


def _open_datasets(config: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted field -> dataset of each role that the config has."""
    from ds_seg.data.build import build_datasets

    sections = {role: section for role, section in (config.get("data") or {}).items() if role in _ROLES and section}
    if not sections:
        raise ConfigError(f"the config has none of {', '.join(f'data.{role}' for role in _ROLES)}: nothing to check.")
    return build_datasets(sections, tolerant=sections)


def check_environment(args: argparse.Namespace) -> int:
    """Check versions, devices and folders, and print what was found.

    Raises:
        UserError: something that is needed is broken; names the remedies.
    """
    from ds_seg.planning.environment import BROKEN, format_checks, inspect_environment
    from ds_seg.tracking.files import write_json_output

    checks = inspect_environment(args.work_dir)
    resume_collector()
    print(format_checks(checks))
    broken = [check for check in checks if check.verdict == BROKEN]
    if args.json:
        write_json_output("--json", args.json, {"ok": not broken, "checks": [asdict(check) for check in checks]})
    if broken:
        lines = "\n".join(f"  {check.name}: {check.found}. {check.remedy}" for check in broken)
        raise UserError(f"{len(broken)} of {len(checks)} checks failed:\n{lines}")
    return EXIT_OK
