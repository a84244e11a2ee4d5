"""A copy of checked sources without the records that break a rule, with a report and a catalogue that names the copies."""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import numpy as np

from data.check.check_dataset import SourceFound
from data.check.check_record import BAD
from data.check.report import field_of
from data.config import SourceConfig
from data.dataset import MultimodalDataset
from data.index.record_index import RecordIndex
from data.index.sidecar import safe_name
from model.errors import ConfigError
from model.files.untrusted import Json
from trainer.runfile.toml_files import to_toml

CATALOG, REPORT = "catalog.toml", "report.json"


def check_target(folder: Path) -> None:
    """Raise `ConfigError` unless `folder` can be filled: nothing is ever written over."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--write-clean {folder} is there already and not an empty folder: name a new one")


def write_clean(datasets: Mapping[str, MultimodalDataset], found: Mapping[str, list[SourceFound]], folder: Path) -> Iterator[str]:
    """Write every source without its bad records to FOLDER/SPLIT/SOURCE, the report and the catalogue; yield lines for people.

    Records that are too long, and duplicates, stay: a run leaves out the first by itself.
    """
    catalog: Json = {}
    report: Json = {}
    for split, dataset in datasets.items():
        for source, index, one in zip(dataset.sources, dataset.indexes, found[split]):
            place = Path(
                split, _unused(safe_name(source.key).lstrip(".") or "_", {path.name for path in (folder / split).glob("*")})
            )
            copied = report.setdefault(split, {})[source.key] = _copy_source(index, one, folder / place)
            yield f"clean     {split} {source.key}: {copied['kept']:,} of {copied['records']:,} records in {folder / place}"
            if copied["kept"]:
                catalog[_unused(source.key, catalog)] = _entry(
                    source, place, [file["name"] for file in copied["files"] if file["kept"]]
                )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n")
    (folder / CATALOG).write_text(to_toml(catalog))
    yield f"clean     the copies by name, for data.catalog: {folder / CATALOG}; counts: {folder / REPORT}"


def _unused(name: str, used: Collection[str]) -> str:
    """Return `name`, or `name` with the first number that no one in `used` has."""
    return next(one for one in itertools.chain([name], (f"{name}-{k}" for k in itertools.count(2))) if one not in used)


def _copy_source(index: RecordIndex, one: SourceFound, folder: Path) -> Json:
    """Write the files of a source without its bad records, none that would be empty; return what became of them, as JSON."""
    bad = {(row, field_of(problem)) for row, problem in one.found.problems if problem.kind == BAD}
    kept = np.ones(len(index), dtype=bool)
    kept[[row for row, _ in bad]] = False
    files = []
    for place, (name, rows) in enumerate(index.files()):
        own = kept[rows.start : rows.stop]
        if own.any():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            index.write_subset(place, own, target)
        files.append({"name": name, "kept": int(own.sum()), "removed": int((~own).sum())})
    return {
        "records": len(index),
        "kept": int(kept.sum()),
        "removed": int((~kept).sum()),
        "removed_by_field": dict(sorted(Counter(field for _, field in bad).items())),
        "files": files,
    }


def _entry(source: SourceConfig, place: Path, names: list[str]) -> Json:
    """Return a copied source as a data set of a catalogue."""
    pattern = names[0] if len(names) == 1 else f"{'**/' if any('/' in name for name in names) else ''}*{Path(names[0]).suffix}"
    root = source.media_root
    roots = (
        {kind: os.path.abspath(path) for kind, path in root.items()} if isinstance(root, dict) else root and os.path.abspath(root)
    )
    settings = {"media_root": (roots, ""), "weight": (source.weight, 1), "take": (source.take, "all")}
    return {"path": str(place / pattern), **{key: value for key, (value, default) in settings.items() if value != default}}
