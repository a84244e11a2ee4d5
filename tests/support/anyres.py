"""Helpers of tests/data/test_anyres.py that other tests share."""

from __future__ import annotations

NEXT = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]


ONEVISION = [(across, down) for down in range(1, 5) for across in range(1, 5)]


SIZES = {
    "wide": (90, 31),
    "tall": (25, 77),
    "tiny": (5, 4),
    "square": (64, 64),
    "exact": (40, 20),
    "narrow": (3, 160),
    "dot": (1, 1),
}


def pinpoints(grid: list[tuple[int, int]], side: int) -> list[list[int]]:
    """As transformers has them: height first."""
    return [[down * side, across * side] for across, down in grid]
