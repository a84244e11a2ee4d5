"""Helpers of tests/trainer/test_loop.py that other tests share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def lines_of(output_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
