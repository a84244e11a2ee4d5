"""Prove on the GPU at hand that training computes what it should, and measure how fast; run it before you trust a machine.

    python -m tools.check_device                            # on a GPU, under eight minutes
    python -m tools.check_device --only packed --only syncs
    python -m tools.check_device --device cpu --tiny        # what can be checked without a GPU, about a minute

Weights are made up, no file is needed. Checks run in a process of their own, which another replaces where a check breaks it.
The table goes to stdout and the same as JSON to --json; docs/gpu.md says what each check proves. Exit code 0: nothing failed;
1: something did; 2: the command line is wrong.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
import time
from typing import TextIO

import torch
from transformers.utils.logging import disable_progress_bar

from model.errors import ConfigError
from tools.cli import check_named, command_parser, printable_lines, run_command, write_named
from tools.devicechecks.outcome import Check, ReportRow
from tools.devicechecks.registry import all_checks
from tools.devicechecks.report import report_json, row_lines, summary
from tools.devicechecks.runner import run_apart, worker

FAILED = 1
CPU_PATIENCE = 6.0
"""Factor on what a check may take on a CPU, which others may share and where compiling is slow."""


def chosen_checks(options: argparse.Namespace) -> dict[str, Check]:
    """Return the checks that were asked for, in their order. Raises `ConfigError` for a name that no check has."""
    known = all_checks(with_peer=options.peer or "peer" in options.only)
    if unknown := sorted(set(options.only) - known.keys()):
        raise ConfigError(f"--only {unknown[0]!r} is none of the checks: {', '.join(all_checks(with_peer=True))}")
    return {name: check for name, check in known.items() if not options.only or name in options.only}


def check_device(options: argparse.Namespace) -> list[ReportRow]:
    """Run the checks, print each row when it is there, write the JSON, and return the rows."""
    checks = chosen_checks(options)
    if not (options.minutes > 0 and math.isfinite(options.minutes)):
        raise ConfigError(f"--minutes {options.minutes} is not a positive number")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU here; --device cpu --tiny runs what can be checked without one")
    check_named("--json", options.json)
    outcomes: list[ReportRow] = []

    def on_outcome(outcome: ReportRow) -> None:
        outcomes.append(outcome)
        print(printable_lines("\n".join(row_lines(outcome))), flush=True)

    began = time.time()
    command = [sys.executable, "-m", "tools.check_device", "--device", options.device]
    command += ["--until", str(began + 60 * options.minutes), *(["--tiny"] if options.tiny else [])]
    run_apart(checks, command, on_outcome, 1.0 if options.device == "cuda" else CPU_PATIENCE)
    value = report_json(outcomes, options.device, time.time() - began, tiny=options.tiny)
    write_named("--json", options.json, json.dumps(value, indent=1) + "\n")
    print(f"{summary(outcomes)}; {time.time() - began:.0f} s; {options.json}")
    return outcomes


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("check_device", __doc__)
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if cuda else "cpu", help="what is checked")
    parser.add_argument("--tiny", action="store_true", help="small shapes and few steps")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="this check alone; may be given again")
    parser.add_argument("--peer", action="store_true", help="measure Hugging Face's Trainer too")
    parser.add_argument("--minutes", type=float, default=8.0, help="no check begins later than this (8)")
    parser.add_argument("--json", default="check_device.json", metavar="FILE", help="where the report goes (check_device.json)")
    parser.add_argument("--list", action="store_true", help="print the names of the checks and what they expect")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=0.0, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if options.list:
        print("\n".join(f"{check.name:<22}{check.expected}" for check in all_checks(with_peer=True).values()))
        return 0
    if options.worker is not None:
        with os.fdopen(options.worker, "w") as out:
            return run_command("check_device", lambda: run_worker(options, out))
    outcomes: list[ReportRow] = []
    code = run_command("check_device", lambda: outcomes.extend(check_device(options)))
    return code or (FAILED if any(outcome.status == "failed" for outcome in outcomes) else 0)


def run_worker(options: argparse.Namespace, out: TextIO) -> None:
    """Run checks for another process of this command."""
    disable_progress_bar()
    worker([*chosen_checks(options).values()], options.device, options.tiny, options.until, out)


if __name__ == "__main__":
    raise SystemExit(main())
