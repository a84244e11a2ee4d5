"""Curves of a run: metrics.jsonl read as it grows, and as few points of it as a screen can show."""

from __future__ import annotations

import json
import os
from array import array
from pathlib import Path

import numpy as np

from model.files.untrusted import Json

DIGITS = 6
"""Significant digits of a number on the page."""


class MetricsTail:
    """Columns of metrics.jsonl. `read` takes what was appended; a file that a new start has cut is read from its beginning."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.forget()

    def forget(self) -> None:
        """Forget all that was read."""
        self.at, self.inode = 0, 0
        self.steps: dict[str, array[int]] = {}
        self.values: dict[str, array[float]] = {}
        self.stages: list[tuple[int, str]] = []  # the first step of each, and its name
        self.last_step, self.written_at = 0, 0.0

    def read(self) -> bool:
        """Read new lines; tell whether there were any. A last line that is not finished waits for the next call."""
        try:
            with self.path.open("rb") as file:
                facts = os.fstat(file.fileno())
                if facts.st_size < self.at or facts.st_ino != self.inode:
                    self.forget()
                self.inode, self.written_at = facts.st_ino, facts.st_mtime
                file.seek(self.at)
                *lines, rest = file.read().split(b"\n")
                self.at = file.tell() - len(rest)
        except OSError:
            self.forget()
            return False
        for line in lines:
            self._add(line)
        return bool(lines)

    def _add(self, line: bytes) -> None:
        """Add one line; what is no line of metrics, as after a crash, is left out."""
        try:
            row = json.loads(line)
            step = int(row["step"])
        except (ValueError, KeyError, TypeError, RecursionError):
            return
        self.last_step = max(self.last_step, step)
        if (stage := row.get("stage")) and isinstance(stage, str) and (not self.stages or self.stages[-1][1] != stage):
            self.stages.append((step, stage))
        for key, value in row.items():
            if isinstance(value, int | float) and key != "step":
                if key not in self.steps:
                    self.steps[key], self.values[key] = array("q"), array("d")
                self.steps[key].append(step)
                self.values[key].append(value)

    def curves(self, most: int) -> dict[str, Json]:
        """Return each curve in at most `most` points: s steps, m means, and, of buckets, lo and hi, their least and most."""
        return {key: thinned(np.array(self.steps[key]), np.array(self.values[key]), most) for key in self.steps}


def thinned(steps: np.ndarray, values: np.ndarray, most: int) -> Json:
    """Return a curve (N,), (N,) as at most `most` buckets of as many points each; the step of a bucket is its last."""
    finite = np.isfinite(values)
    steps, values = steps[finite], values[finite]
    if len(steps) <= most:
        return {"s": steps.tolist(), "m": _short(values)}
    starts = np.unique(np.linspace(0, len(steps), most, endpoint=False).astype(np.int64))
    ends = np.append(starts[1:], len(steps))
    means = np.add.reduceat(values, starts) / (ends - starts)
    low, high = np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)
    return {"s": steps[ends - 1].tolist(), "m": _short(means), "lo": _short(low), "hi": _short(high)}


def _short(values: np.ndarray) -> list[float]:
    short = (float(f"{value:.{DIGITS}g}") for value in values.tolist())
    return [int(value) if value.is_integer() and abs(value) < 1e15 else value for value in short]
