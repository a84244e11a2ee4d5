"""Helpers of tests/long/test_kill_long.py that other tests share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.runs import merged

ALIGN = {"name": "align", "model": {"llm": {"tune": "frozen"}}, "train": {"max_steps": 3}}


ADAPT = {"name": "adapt", "model": {"llm": {"tune": "lora"}}, "lora": {"rank": 2, "dropout": 0.3}, "train": {"max_steps": 4}}


STAGES = {"model": {"vision": {"tune": "frozen"}}, "stage": [ALIGN, ADAPT]}


def sections_of(parts: Path, folder: Path, strategy: str, num_workers: int, changes: dict[str, Any]) -> dict[str, Any]:
    """A run that saves often, forgets old checkpoints, and meets one record whose picture is missing."""
    records = json.loads((parts / "train.json").read_text())
    records[5]["image"] = "gone.png"
    path = folder / "train.json"
    path.write_text(json.dumps(records))
    source = {"path": str(path), "media_root": str(parts / "images")}
    base: dict[str, Any] = {
        "data": {"sources": [source], "workers": num_workers},
        "train": {"max_steps": 7},
        "checkpoint": {"every": 1, "keep": 2},
        "parallel": {"strategy": strategy, **({"shard_size": 2} if strategy == "hsdp" else {})},
    }
    found = merged(base, changes)
    if "validation" in changes:
        held_out = {"path": str(parts / "train.json"), "media_root": str(parts / "images"), "name": "held_out"}
        found = merged(found, {"data": {"validation": [held_out]}})
    return merged(found, {"train": None}) if "stage" in changes else found
