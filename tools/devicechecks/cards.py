"""Peaks of known GPUs: what a share of the hardware's limit is counted by."""

from __future__ import annotations

import tomllib
from importlib.resources import files

PEAKS: dict[str, float] = tomllib.loads(files(__package__).joinpath("cards.toml").read_text(encoding="utf-8"))
"""TFLOP/s by a part of a card's name; the first that fits counts."""


def peak_of(name: str) -> float | None:
    """Return the TFLOP/s of a card by the name that its driver gives it; None for one that is not known."""
    words = name.upper().replace("-", " ")
    for part, peak in PEAKS.items():
        if f" {part.replace('-', ' ')} " in f" {words.replace('_', ' ')} ":
            return peak
    return None
