"""Helpers of tests/trainer/test_stages.py that other tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ALIGN: dict[str, Any] = {
    "name": "align",
    "model": {"llm": {"tune": "frozen"}, "vision": {"tune": "frozen"}},
    "train": {"max_steps": 2},
}


ADAPT: dict[str, Any] = {"name": "adapt", "model": {"llm": {"tune": "lora"}, "vision": {"tune": "lora"}}, "train": {"max_steps": 2}}


WHOLE: dict[str, Any] = {"name": "whole", "model": {"vision_projector": {"tune": "frozen"}}, "seed": 7}


def finals(run: Path) -> dict[str, dict[str, bytes]]:
    """Bytes of every final/ by stage, and of the run's."""
    folders = {path.parent.name: path for path in run.glob("stages/*/final")} | {"run": run / "final"}
    return {n: {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "provenance.json"} for n, folder in folders.items()}
