"""Helpers of tests/laws/test_resume.py that other tests share."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

LORA: dict[str, Any] = {
    "model": {"llm": {"tune": "lora"}, "vision": {"tune": "frozen"}},
    "lora": {"rank": 2, "dropout": 0.3},
}


def weights(output_dir: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (output_dir / "final").iterdir() if p.name != "provenance.json"}


def cut(output_dir: Path, target: Path, step: int) -> Path:
    """The run as it stood when it was killed after `step` was saved."""
    shutil.copytree(output_dir, target)
    shutil.rmtree(target / "final")
    for path in target.glob("checkpoint-*"):
        if int(path.name.partition("-")[2]) > step:
            shutil.rmtree(path)
    return target


def metrics(output_dir: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["train/loss"]) for line in lines]
