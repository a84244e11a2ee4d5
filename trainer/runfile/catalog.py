"""Shared files of named data sets: sources that have a name and no path are completed from the file that data.catalog names."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from data.config import SourceConfig
from model.files.untrusted import SHOWN, Json, shown
from trainer.runfile.merge_tables import levels_of, value_of, without_key
from trainer.runfile.schema import SchemaReader
from trainer.runfile.toml_files import read_tables

KEY = "data.catalog"


def with_catalog(tables: Json) -> tuple[Json, list[str]]:
    """Return the tables with every source that a catalogue names written out and without data.catalog, and what is wrong with it.

    A stage without a catalogue of its own has that of the run. Raises `ConfigError` for a catalogue that cannot be read.
    """
    levels = levels_of(tables)
    paths = [value_of(level, KEY) for level in levels]
    if not any(isinstance(path, str) and path for path in paths):
        return tables, []
    catalogs: dict[str, Catalog] = {}
    problems: list[str] = []
    found = []
    for level, own in zip(levels, paths):
        path = own if own is not None else paths[0]
        if not isinstance(path, str) or not path:  # of another type: the schema says so
            found.append(level)
            continue
        catalog = catalogs[path] = catalogs.get(path) or Catalog.read(path)
        completed, lines = catalog.completed(level)
        found.append(without_key(completed, KEY))
        problems += lines
    problems += [
        f"{KEY} = {catalog.path!r} has no effect: every source has a path of its own"
        for catalog in catalogs.values()
        if not catalog.used
    ]
    if levels[1:]:
        replaced = iter(found[1:])
        found[0] = {**found[0], "stage": [next(replaced) if isinstance(stage, dict) else stage for stage in tables["stage"]]}
    return found[0], problems


@dataclass
class Catalog:
    """Named data sets of one file, and those that were asked for."""

    path: str
    sets: Json
    used: set[str] = field(default_factory=set)

    @staticmethod
    def read(path: str) -> Catalog:
        """Read a catalogue. Raises `ConfigError` where it is missing or is no TOML."""
        return Catalog(path, read_tables(Path(path), f"{KEY} = {shown(path)}"))

    def completed(self, tables: Json) -> tuple[Json, list[str]]:
        """Return the tables of a run or stage with its named sources completed, and what is wrong with these."""
        data = tables.get("data")
        problems: list[str] = []
        changes = {}
        for split in ("sources", "validation"):
            sources = data.get(split) if isinstance(data, dict) else None
            if isinstance(sources, list):
                changes[split] = [self._source(source, f"data.{split}.{i}", problems) for i, source in enumerate(sources)]
        return ({**tables, "data": {**tables["data"], **changes}} if changes else tables), problems

    def _source(self, source: object, where: str, problems: list[str]) -> object:
        """Return a source with the settings of its data set, its own above them; lines are added to `problems`."""
        name = source.get("name") if isinstance(source, dict) else None
        if not isinstance(source, dict) or "path" in source or not isinstance(name, str):
            return source
        self.used.add(name)
        if name not in self.sets:
            near = get_close_matches(name[:SHOWN], self.sets, 3, 0.5)
            known = f"did you mean {' or '.join(map(repr, near))}?" if near else f"it has {', '.join(sorted(self.sets)) or 'none'}"
            problems.append(f"{where}: name = {shown(name)} is no data set of {self.path!r}, and no path is named; {known}")
            return {**source, "path": ""}
        lines = list(self._entry_problems(name))
        problems += [line for line in lines if line not in problems]
        given = {} if lines else dict(self.sets[name])
        if where.startswith("data.validation"):
            given.pop("weight", None)  # of training alone
        located = {key: self._located(value) for key, value in given.items() if key in ("path", "media_root")}
        return {"path": "", **given, **located, **source}

    def _entry_problems(self, name: str) -> Iterator[str]:
        """Yield what is wrong with a data set, as the file and the key say it."""
        reader, entry = SchemaReader(), self.sets[name]
        reader.table(SourceConfig, entry, name)
        yield from (f"{self.path}: {line}" for line in reader.problems)
        if isinstance(entry, dict) and "name" in entry:
            yield f"{self.path}: {name}.name: a data set is called as its table is; remove the line"

    def _located(self, value: object) -> object:
        """Return a path, or a table of paths, with the folder of the catalogue before those that are relative."""
        if isinstance(value, dict):
            return {key: self._located(path) for key, path in value.items()}
        folder = os.path.dirname(self.path)
        if not isinstance(value, str) or not value or not folder:
            return value
        return os.path.join(glob.escape(folder) if glob.has_magic(value) else folder, value)
