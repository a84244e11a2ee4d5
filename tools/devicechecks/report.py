"""The report of a device: a table for people, and one JSON object."""

from __future__ import annotations

import os
import platform
import textwrap
from collections.abc import Sequence

import torch
import transformers

from model.files.untrusted import Json
from tools.devicechecks.cards import peak_of
from tools.devicechecks.outcome import ReportRow

SCHEMA = 1
NAME_WIDTH, WIDTH = 22, 120


def row_lines(outcome: ReportRow) -> list[str]:
    """Return the lines of a row: check, whether it passed, its seconds, what was seen, and what was expected."""
    head = f"{outcome.name:<{NAME_WIDTH}}{outcome.status:<9}{outcome.seconds:>7.1f} s  "
    seen = textwrap.wrap(outcome.seen, WIDTH - len(head)) or [""]
    lines = [head + seen[0], *(" " * len(head) + line for line in seen[1:])]
    if outcome.expected != "-":
        lines.append(f"{'':<{len(head)}}expected: {outcome.expected}")
    return lines


def summary(outcomes: Sequence[ReportRow]) -> str:
    """Return the last line: how many passed, failed and were skipped."""
    counts = {status: sum(o.status == status for o in outcomes) for status in ("passed", "failed", "skipped")}
    failed = [o.name for o in outcomes if o.status == "failed"]
    words = ", ".join(f"{count} {status}" for status, count in counts.items())
    return f"{words}{': ' + ', '.join(failed) if failed else ''}"


def machine_facts(device: str) -> Json:
    """Return what the numbers were measured on."""
    found: Json = {
        "device": device,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }
    if device == "cuda":
        facts = torch.cuda.get_device_properties(0)
        found |= {
            "card": facts.name,
            "cards": torch.cuda.device_count(),
            "capability": [facts.major, facts.minor],
            "memory_bytes": facts.total_memory,
            "peak_tflops": peak_of(facts.name),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def report_json(outcomes: Sequence[ReportRow], device: str, seconds: float, *, tiny: bool) -> Json:
    """Return the whole report as one object; docs/gpu.md describes it."""
    return {
        "schema": SCHEMA,
        "machine": machine_facts(device),
        "tiny": tiny,
        "seconds": round(seconds, 1),
        "failed": [outcome.name for outcome in outcomes if outcome.status == "failed"],
        "checks": [outcome.to_json() for outcome in outcomes],
    }
