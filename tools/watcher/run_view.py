"""Values that a run folder tells, as plain values for the page. Files that are missing or damaged leave their place empty."""

from __future__ import annotations

import json
import os
import re
import time
import tomllib
from collections import Counter
from contextlib import suppress
from pathlib import Path

from model.errors import ConfigError
from model.files.untrusted import Json
from tools.watcher.curves import MetricsTail
from trainer.health.loss_monitor import NAME as FAULTS
from trainer.machine.atomic_files import places
from trainer.machine.json_lines import read_lines
from trainer.records.ledger import NAME as LEDGER
from trainer.records.quarantine import NAME as QUARANTINE
from trainer.records.sample_log import read_step
from trainer.report import NAME as START
from trainer.runfile.schema import flatten_tables

MOST_ROWS = 100
"""Rows of a list that the page shows at most; how many there are is told."""
MOST_STEPS = 40
"""Steps whose samples stand in a page that is a file."""
MOST_BYTES = 64 << 20
"""Bytes of a list in a run folder that are read; a larger one is not shown."""
GENERATIONS = "generations.jsonl"
MOST_VALIDATIONS, MOST_ANSWERS, ANSWER, TAIL = 6, 40, 300, 4 << 20
"""Validations and records whose answers are shown, characters of an answer, and bytes at the end of the file that are read."""
TEXT = 2000


class RunView:
    """One run folder, read again and again while the run goes."""

    def __init__(self, folder: Path) -> None:
        """Raises `ConfigError` when it is no folder of a run."""
        if not folder.is_dir():
            raise ConfigError(f"{folder}: no such folder; name the output_dir of a run")
        if not any((folder / name).is_file() for name in ("metrics.jsonl", "run.toml", START)):
            raise ConfigError(f"{folder} holds neither metrics.jsonl nor run.toml: name the output_dir of a run that has begun")
        self.folder, self.tail = folder, MetricsTail(folder / "metrics.jsonl")
        self.stamp: object = None

    def has_changed(self) -> bool:
        """Read what is new; tell whether anything is."""
        changed = self.tail.read()
        stamp = [_stamp(self.folder / name) for name in ("run.toml", "exit.json", START, FAULTS, QUARANTINE, GENERATIONS)]
        stamp += [_stamp(place / LEDGER) for place in places(self.folder)]
        changed, self.stamp = changed or stamp != self.stamp, stamp
        return changed

    def values(self, most: int, *, with_samples: bool) -> Json:
        """Return everything that the page shows, with at most `most` points of a curve.

        `with_samples`: the samples of the last steps too, for a page that cannot ask.
        """
        start, exit_ = _object(self.folder / "start.json"), _object(self.folder / "exit.json")
        faults = _rows(self.folder / FAULTS)
        return {
            "name": self.folder.resolve().name,
            "progress": self._progress(start, exit_),
            "curves": self.tail.curves(most),
            "stages": self.tail.stages,
            "exit": exit_,
            "start": {
                key: value for key, value in start.items() if key in ("parts", "machine", "plan", "stage", "number", "count")
            },
            "settings": self._settings(),
            "faults": {"count": len(faults), "rows": [_fault(row) for row in faults[-MOST_ROWS:]]},
            "quarantine": _quarantine(_rows(self.folder / QUARANTINE)),
            "ledger": self._ledger(),
            "generations": answers_over_time(_last_rows(self.folder / GENERATIONS)),
            "samples": self._samples(faults) if with_samples else {},
        }

    def _progress(self, start: Json, exit_: Json) -> Json:
        """Return steps done and to do, and the seconds since the last line and to the end as far as they can be told."""
        done, last = self.tail.last_step, _number(start.get("last_step"))
        begun, step = _number(start.get("at")), _number(start.get("step")) or 0
        found: Json = {"done": done, "last": last, "ended": bool(exit_), "written": self.tail.written_at or None}
        if begun is not None and done > step and self.tail.written_at > begun:
            found["rate"] = (done - step) / (self.tail.written_at - begun)
            if last is not None and not exit_:
                found["left"] = max(0.0, (last - done) / found["rate"] - max(0.0, time.time() - self.tail.written_at))
        return found

    def _settings(self) -> Json:
        try:
            tables = tomllib.loads((self.folder / "run.toml").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return {key: value if isinstance(value, str) else json.dumps(value) for key, value in flatten_tables(tables).items()}

    def _ledger(self) -> list[Json]:
        """Return the rows of every ledger, those of stages with their name."""
        found = []
        for place in places(self.folder):
            sources = _object(place / LEDGER).get("sources")
            stage = "" if place == self.folder else place.name
            found += [{"stage": stage, **row} for row in sources if isinstance(row, dict)] if isinstance(sources, list) else []
        return found

    def _samples(self, faults: list[Json]) -> Json:
        """Return the samples of the last steps, and of those with a fault, by step."""
        last = range(max(1, self.tail.last_step - MOST_STEPS + 1), self.tail.last_step + 1)
        steps = {*last, *(row["step"] for row in faults[-MOST_STEPS:] if isinstance(row.get("step"), int))}
        found = {step: self.samples_of(step) for step in sorted(steps)}
        return {str(step): rows for step, rows in found.items() if rows}

    def samples_of(self, step: int) -> list[Json]:
        """Return sample, source and number in its source of what brought the run to `step` completed steps; [] if unknown."""
        place = self.place_of(step)
        return _with_sources(read_step(place, step - 1).tolist(), _object(place / LEDGER).get("sources")) if place else []

    def place_of(self, step: int) -> Path | None:
        """Return the folder of the run, or of its stage, that recorded what brought the run to `step` completed steps."""
        for place in reversed(places(self.folder)):
            try:
                read_step(place, step - 1)
            except ConfigError:
                continue
            return place
        return None


def answers_over_time(rows: list[Json]) -> Json:
    """Return the last validations' steps, and for each of MOST_ANSWERS records what was expected and the answer at each step."""
    rows = [row for row in rows if isinstance(row.get("step"), int)]
    steps = sorted({row["step"] for row in rows})[-MOST_VALIDATIONS:]
    records: dict[str, Json] = {}
    for row in rows:
        if row["step"] not in steps:
            continue
        key = f"{row.get('stage', '')} {row.get('sample', row.get('id', ''))}"
        if key not in records and len(records) >= MOST_ANSWERS:
            continue
        told = {name: str(row.get(name, ""))[:ANSWER] for name in ("source", "id", "prompt", "expected")}
        record = records.setdefault(key, {**told, "answers": [None] * len(steps)})
        record["answers"][steps.index(row["step"])] = str(row.get("answer", ""))[:ANSWER]
    return {"steps": steps, "rows": list(records.values())}


def _with_sources(ids: list[int], sources: object) -> list[Json]:
    """Name the source of each sample: samples are numbered through the sources in their order."""
    bounds, total = [], 0
    for row in sources if isinstance(sources, list) else []:
        if isinstance(row, dict) and isinstance(row.get("size"), int):
            bounds.append((total, total + row["size"], str(row.get("source", ""))))
            total += row["size"]
    found = []
    for i in ids:
        place = next(((name, i - first) for first, end, name in bounds if first <= i < end), ("", i))
        found.append({"id": i, "source": place[0], "row": place[1]})
    return found


def _fault(row: Json) -> Json:
    """Return a row of faults.jsonl without its long lists."""
    kept = {key: value for key, value in row.items() if isinstance(value, str | int | float | bool)}
    records = row.get("records")
    return {**kept, "records": [str(text)[:TEXT] for text in records[:8]] if isinstance(records, list) else []}


def _quarantine(rows: list[Json]) -> Json:
    """Count records by source and reason; names and numbers in a reason do not make it another one."""
    counts: Counter[tuple[str, str, str]] = Counter()
    example: dict[tuple[str, str, str], Json] = {}
    for row in rows:
        reason = re.sub(r"'[^']*'|\"[^\"]*\"|\S*/\S*", "…", str(row.get("reason", "")))
        key = (str(row.get("split", "")), str(row.get("source", "")), re.sub(r"\d[\d.,]*", "N", reason)[:TEXT])
        counts[key] += 1
        example.setdefault(key, row)
    shown = [
        {
            "split": key[0],
            "source": key[1],
            "count": count,
            "reason": str(example[key].get("reason", ""))[:TEXT],
            "where": f"{example[key].get('where', '')} {example[key].get('id', '')}"[:TEXT],
        }
        for key, count in counts.most_common(MOST_ROWS)
    ]
    return {"count": len(rows), "kinds": len(counts), "rows": shown}


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        facts = path.stat()
        return facts.st_size, facts.st_mtime_ns
    except OSError:
        return None


def _object(path: Path) -> Json:
    """Read a JSON object; an empty one where there is none."""
    try:
        found = json.loads(path.read_bytes()) if _is_small(path) else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _rows(path: Path) -> list[Json]:
    try:
        return read_lines(path, {})[0] if _is_small(path) else []
    except OSError:
        return []


def _last_rows(path: Path) -> list[Json]:
    """Return the rows at the end of a file that may be long."""
    try:
        if path.is_symlink() or not path.is_file():
            return []
        with path.open("rb") as file:
            file.seek(max(0, os.path.getsize(path) - TAIL))
            lines = file.read().split(b"\n")
    except OSError:
        return []
    rows = []
    for line in lines[:-1]:
        with suppress(ValueError, RecursionError):  # the first may be half a line
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def _is_small(path: Path) -> bool:
    """Tell whether a file of the run folder is a plain one that the page can take in; a link could lead out of the folder."""
    return path.is_file() and not path.is_symlink() and os.path.getsize(path) <= MOST_BYTES


def _number(value: object) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
