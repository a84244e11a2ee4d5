"""Results of a check, part by part of a source and on disk: a check continues where it was stopped and is not done twice.

A part stays valid as long as the files of its media are those that were checked, by size and time. Its folder's name says that its
records, template and settings are the same (`data.check.measured_lengths.source_identities`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np

from data.check.check_medium import CheckedMedium
from data.check.check_record import Checked, Problem
from data.index.sidecar import read_arrays, text_array, write_arrays
from data.index.table import KINDS
from model.files.untrusted import parse_json

PART = 1024  # records
_RECORD = {
    **{"lengths": np.int32, "supervised": np.int32, "media_tokens": np.int32, "texts": np.uint64, "words": np.uint64},
    **{"unlearned": np.int32, "removed": np.int32},
}
_MEDIUM = {
    **{"kinds": np.int8, "tokens": np.int32, "rows": np.int32, "widths": np.int32, "heights": np.int32},
    **{"milliseconds": np.int64, "contents": np.uint64, "pictures": np.uint64, "unsized": np.int8},
}
_LAYOUT = {name: (np.dtype(kind), 1) for name, kind in {**_RECORD, **_MEDIUM, "owners": np.int64, "said": np.uint8}.items()}
_MISSING = (-1, -1)
_FLAGS = ("decode", "near")


@dataclass(frozen=True)
class Found:
    """Results for consecutive records of one source, as columns: N records, M media."""

    columns: dict[
        str, np.ndarray
    ]  # (N,) lengths, supervised, media_tokens, texts, words, unlearned, removed; (M,) owners (row of the record), kinds ...
    problems: list[tuple[int, Problem]]  # with the row of the record
    files: dict[str, tuple[int, int]]  # size and time of media that are files of their own; (-1, -1): missing

    def __getitem__(self, column: str) -> np.ndarray:
        return self.columns[column]

    @property
    def missing(self) -> dict[str, tuple[int, int]]:
        """Return the entries of `files` that records name and that do not exist."""
        return {path: state for path, state in self.files.items() if state == _MISSING}


def collect_results(checked: Sequence[Checked]) -> Found:
    """Collect the results of records that were checked one after the other into columns."""
    media = [(row, medium) for row, one in enumerate(checked) for medium in one.media]
    paths = sorted({medium.watched for _, medium in media if medium.watched})
    columns = _columns(_RECORD, [_record_row(one) for one in checked])
    columns |= _columns(_MEDIUM, [_medium_row(medium) for _, medium in media])
    columns["owners"] = np.array([row for row, _ in media], dtype=np.int64)
    problems = [(row, problem) for row, one in enumerate(checked) for problem in one.problems]
    return Found(columns, problems, {path: file_state(path) for path in paths})


def _record_row(one: Checked) -> tuple[int, ...]:
    size = (0, 0, 0) if one.size is None else (one.size.length, one.size.supervised, one.size.media)
    return *size, one.text, one.words, one.unlearned, one.removed


def _medium_row(medium: CheckedMedium) -> tuple[int, ...]:
    sizes = (medium.tokens, medium.rows, medium.width, medium.height, medium.milliseconds)
    return KINDS.index(medium.kind), *sizes, medium.content, medium.picture, medium.unsized


def _columns(types: Mapping[str, np.typing.DTypeLike], rows: list[tuple[int, ...]]) -> dict[str, np.ndarray]:
    values = zip(*rows) if rows else ((),) * len(types)
    return {name: np.array(column, dtype=kind) for (name, kind), column in zip(types.items(), values)}


def file_state(path: str) -> tuple[int, int]:
    """Return the size and time of a file, by which it is known to be the same; (-1, -1) if it is missing."""
    try:
        state = os.stat(path)
    except (OSError, ValueError):  # ValueError: it is no path at all
        return _MISSING
    return state.st_size, state.st_mtime_ns


def write_check_part(path: Path, found: Found, *, decode: bool, near: bool) -> None:
    """Write the results of a check of that depth."""
    said = {
        "flags": [name for name, wanted in zip(_FLAGS, (decode, near)) if wanted],
        "problems": [(row, *astuple(problem)) for row, problem in found.problems],
        "files": found.files,
    }
    write_arrays(path, {**found.columns, "said": text_array(json.dumps(said))})


def read_part(path: Path, *, decode: bool = False, near: bool = False) -> Found | None:
    """Read the results of a part if a check as deep as that wrote them; return None if none did."""
    arrays = read_arrays(path)
    if arrays is None or {name: (array.dtype, array.ndim) for name, array in arrays.items()} != _LAYOUT:
        return None
    try:
        said = parse_json(arrays.pop("said").tobytes())
        if (decode and "decode" not in said["flags"]) or (near and "near" not in said["flags"]):
            return None
        problems = [(int(row), Problem(*rest)) for row, *rest in said["problems"]]
        files = {path: (size, time) for path, (size, time) in said["files"].items()}
    except (ValueError, TypeError, KeyError, AttributeError):  # damaged, or of another version
        return None
    return Found(arrays, problems, files)


def is_current(found: Found) -> bool:
    """Return whether every medium's file is still the one that was checked."""
    return all(file_state(path) == state for path, state in found.files.items())


def join_parts(parts: Sequence[Found], sizes: Sequence[int]) -> Found:
    """Join the parts of one source; `sizes` are their numbers of records.

    Only missing files are kept: all files may be millions.
    """
    starts = np.cumsum([0, *sizes[:-1]])
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0].columns}
    columns["owners"] = np.concatenate([part["owners"] + start for part, start in zip(parts, starts)])
    problems = [(row + int(start), problem) for part, start in zip(parts, starts) for row, problem in part.problems]
    return Found(columns, problems, {path: state for part in parts for path, state in part.missing.items()})
