"""Token lengths by which a run is planned: exact where the data were checked, else estimated, and frozen for the run's whole life.

The order of the data follows from these lengths, so they may not change under a run: not even when the data are checked later on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.config import SourceConfig
from data.dataset import MultimodalDataset
from data.index.record_index import source_files
from data.index.sidecar import read_arrays, safe_name, text_array, write_arrays
from model.media_spec import spec_to_json

FROZEN = "planned_lengths.npz"
EXACT, PARTLY, ESTIMATED = "exact", "partly exact", "estimated"
_VERSION = 3  # version of the rules by which records are measured and checked: raise it when a rule changes
_FAULTS = ("on_bad_sample", "on_change", "max_bad_fraction", "max_too_long_fraction")
_IRRELEVANT = ("workers", "order", "packing", *_FAULTS, "sources", "validation")
"""Settings of [data] that change neither a record's length nor whether it is valid."""


@dataclass(frozen=True)
class Measurement:
    """Lengths and bad rows of one source, as a check of all of its records found them."""

    lengths: np.ndarray  # (N,) int32 tokens; 0 where there is no sample to measure
    bad: np.ndarray  # (B,) int64 rows that break the rules


def source_identities(dataset: MultimodalDataset) -> list[str]:
    """Return one identity per source. It changes with all that decides lengths and validity of the source's records, except media.

    That is its files, the template, the tokenizer and the settings.
    """
    shared = {"version": _VERSION, **identity_parts(dataset)}
    return [_digest(shared | _of_source(source)) for source in dataset.sources]


def identity_parts(dataset: MultimodalDataset) -> dict[str, object]:
    """Return what decides the ids and pixels of every record beside its own file and media, as JSON, by its name."""
    template, config = dataset.template, dataset.config
    return {
        "template": [template.name, template.source, template.placeholders, template.media_wrap, template.allowed, template.lead],
        "tokenizer": hashlib.sha256(template.tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "specs": {modality: spec_to_json(spec) for modality, spec in dataset.specs.items()},
        "config": {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in _IRRELEVANT},
        **({} if dataset.answers == "one" else {"answers": dataset.answers}),
    }


def identities_of_files(dataset: MultimodalDataset) -> list[dict[str, object]]:
    """Return what the files and media folders of each source are known by, as JSON."""
    return [_of_source(source) for source in dataset.sources]


def _of_source(source: SourceConfig) -> dict[str, object]:
    files = [(str(path), path.stat()) for path in source_files(source)]
    return {
        "files": [(path, stat.st_size, stat.st_mtime_ns) for path, stat in files],
        "media_root": {key: os.path.abspath(folder) for key, folder in source.roots.items()},
    }


def _digest(said: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def write_measurement(index_folder: Path, key: str, identity: str, found: Measurement) -> None:
    """Write what a check found of the source `key`, for the runs that plan by it."""
    arrays: dict[str, np.ndarray] = {"lengths": found.lengths.astype(np.int32), "bad": found.bad.astype(np.int64)}
    write_arrays(measurement_path(index_folder, key, identity), arrays)


def read_measurements(dataset: MultimodalDataset, index_folder: Path) -> list[Measurement | None]:
    """Read what checks found of each source as it is now; None where no check was made since it changed."""
    return [
        _read(measurement_path(index_folder, source.key, identity), len(index))
        for source, identity, index in zip(dataset.sources, source_identities(dataset), dataset.indexes)
    ]


def _read(path: Path, num_records: int) -> Measurement | None:
    found = read_arrays(path) or {}
    if not _is_column(found.get("lengths"), np.int32, num_records) or not _is_column(found.get("bad"), np.int64):
        return None
    return Measurement(found["lengths"], found["bad"])


def _is_column(array: np.ndarray | None, dtype: type, length: int | None = None) -> bool:
    return array is not None and array.dtype == dtype and array.ndim == 1 and length in (None, len(array))


def measurement_path(index_folder: Path, key: str, identity: str) -> Path:
    return index_folder / f"exact-{safe_name(key)}-{identity}.npz"


def best_lengths(dataset: MultimodalDataset, index_folder: Path) -> tuple[np.ndarray, str]:
    """Return the best lengths (N,) int32 that are known today, and whether they are exact, partly exact or estimated.

    A record that cannot be measured keeps its estimate: it will be rejected, or was mended since.
    """
    estimated = [index.lengths for index in dataset.indexes]
    measured = read_measurements(dataset, index_folder)
    chosen = [
        estimate if found is None else np.where(found.lengths > 0, found.lengths, estimate)
        for found, estimate in zip(measured, estimated)
    ]
    num_exact = sum(found is not None for found in measured)
    kind = EXACT if num_exact == len(measured) else PARTLY if num_exact else ESTIMATED
    return np.minimum(np.concatenate(chosen), dataset.config.max_length).astype(np.int32), kind


def freeze_lengths(datasets: dict[str, MultimodalDataset], run_folder: Path, index_folder: Path | None = None) -> None:
    """Write the lengths by which a run that starts at step 0 is planned; `datasets` by split. One process does this.

    `index_folder`: where checks keep what they measured, if not in `run_folder`/index.
    """
    arrays: dict[str, np.ndarray] = {}
    for split, dataset in datasets.items():
        lengths, kind = best_lengths(dataset, index_folder or run_folder / "index")
        arrays |= {split: lengths, f"{split}_kind": text_array(kind)}
    write_arrays(run_folder / FROZEN, arrays)


def planned_lengths(
    dataset: MultimodalDataset, run_folder: Path, split: str, index_folder: Path | None = None
) -> tuple[np.ndarray, str]:
    """Return the planned lengths (N,) int32 of `split`, and "exact", "partly exact" or "estimated".

    They are the lengths with which the run was frozen, as long as the number of records is the same; without any, the best lengths
    that are known today.
    """
    frozen = read_arrays(run_folder / FROZEN) or {}
    kind = frozen.get(f"{split}_kind")
    if _is_column(frozen.get(split), np.int32, len(dataset)) and kind is not None and kind.dtype == np.uint8:
        return frozen[split], kind.tobytes().decode("utf-8", "replace")
    return best_lengths(dataset, index_folder or run_folder / "index")
