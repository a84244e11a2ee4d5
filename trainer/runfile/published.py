"""Resolution of what run files name, before they are checked: a published model into the settings that follow from it, and a
`revision` into the path beside it, as org/name@revision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from model.card import NAME
from model.errors import ConfigError
from model.files.hub import HUB_ID
from model.files.untrusted import Json, shown
from model.published.table import published_settings
from model.published.vita_audio import SETTINGS
from trainer.runfile.merge_tables import has_key, levels_of, merge_into, nested, value_of, without_key
from trainer.runfile.schema import flatten_tables
from trainer.runfile.toml_files import as_toml

KEY = "model.init_from"
KNOWN_BY = ("config.json", SETTINGS)
"""Files by which a published folder is known; the second is that of VITA's sound encoder."""


def resolve_published(tables: Json) -> tuple[Json, list[str]]:
    """Return the tables with a published model in model.init_from taken apart, and one line per setting that contradicts it.

    The parts' paths, and what follows from the model, are filled in where they are not written; model.init_from is removed. Tables
    whose model.init_from is a run of ours, or absent, are returned as they are. Raises `ConfigError` for a model that is not
    supported.
    """
    if problems := _in_stages(tables):
        return tables, problems
    path, cache_dir = value_of(tables, KEY), value_of(tables, "model.cache_dir") or ""
    if not isinstance(path, str) or not isinstance(cache_dir, str) or not is_published(path):
        return tables, _unknown(path, tables)
    name, settings = published_settings(path, cache_dir, written_settings(tables))
    problems = []
    tables = without_key(tables, KEY)
    for key, given in settings.items():
        if given.when and value_of(tables, given.when[0]) != given.when[1]:
            continue
        if not has_key(tables, key):
            tables = merge_into(tables, nested(key, given.value))
        elif not given.allows(written := value_of(tables, key)):
            problems.append(
                f"{key} = {as_toml(written)}, but {path!r}, {name}, has {as_toml(given.value)}: remove the line, it follows "
                f"from {KEY}"
            )
    return tables, problems


def _in_stages(tables: Json) -> list[str]:
    """Return one line per [[stage]] that names a published model: it gives the parts of the whole run."""
    return [
        f"stage {i}: {KEY} = {path!r} is a published model, which gives the parts of the whole run: write it in [model]"
        for i, stage in enumerate(levels_of(tables)[1:], 1)
        if isinstance(path := value_of(stage, KEY), str) and is_published(path)
    ]


def _unknown(path: object, tables: Json) -> list[str]:
    """Return what is wrong with a model.init_from that no parts are written beside, and that gives none."""
    if not isinstance(path, str) or not path or has_key(tables, "model.llm"):
        return []
    folder = Path(path)
    if (folder / NAME).is_file():
        return [
            f"{KEY} = {path!r} is a run of ours, which gives weights: write its [model] tables and [data] too, as in its run.toml"
        ]
    if (folder / "adapter_config.json").is_file():
        return [f"{KEY} = {path!r} is an adapter: name the model that it belongs to, and the adapter as lora.path"]
    if (folder / "final").is_dir():
        return [f"{KEY} = {path!r} is the folder of a run: name its final/ or a checkpoint-N, and write [model] as it has it"]
    return [f"{KEY} = {path!r} is no published model: neither a folder with config.json nor a hub id"]


def written_settings(tables: Json) -> Json:
    """Return the settings that a run file writes, by dotted key; of a curriculum, those of its first stage."""
    base, first, *_ = *levels_of(tables), {}
    return flatten_tables(merge_into({key: value for key, value in base.items() if key != "stage"}, first))


def is_published(path: str) -> bool:
    """Tell whether a value of model.init_from names a published model, which may be a hub id, and no run of ours."""
    folder = Path(path)
    if folder.is_dir():
        return not (folder / NAME).is_file() and any((folder / name).is_file() for name in KNOWN_BY)
    is_run = folder.name == "final" or folder.name.startswith("checkpoint-")  # the run that writes it may not have been started
    return not is_run and not folder.exists() and HUB_ID.fullmatch(path) is not None


NAMED_BY = ("path", "init_from")
"""Keys that name a folder or a hub id; a `revision` in their table is that of the hub id."""
TABLES = ("model", "lora", "stage")


def with_revisions(tables: Json) -> Json:
    """Return the tables with every `revision` written into its path. Raises `ConfigError` for one without a hub id."""
    return {key: _folded(value, key) if key in TABLES else value for key, value in tables.items()}


def _folded(value: Any, where: str) -> Any:
    """Return the table or list `value`, whose dotted key is `where`, with the revisions in it written into their paths."""
    if isinstance(value, list):
        return [_folded(item, f"{where}.{i}") for i, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    found = {key: _folded(item, f"{where}.{key}") for key, item in value.items() if key != "revision"}
    if (revision := value.get("revision", "")) == "":
        return found
    if not isinstance(revision, str):
        raise ConfigError(f"{where}.revision = {shown(revision)} is no string")
    name = next((key for key in NAMED_BY if value.get(key)), None)
    if name is None:
        raise ConfigError(f"{where}.revision = {shown(revision)} is of no path: name the hub id that it belongs to as {where}.path")
    path, setting = value[name], f"{where}.{name} = {shown(value[name])}"
    if not isinstance(path, str) or Path(path).is_dir() or "@" in path or not HUB_ID.fullmatch(f"{path}@{revision}"):
        raise ConfigError(
            f"{where}.revision = {shown(revision)} with {setting}: a revision is a branch, a tag or a commit of a hub id, as "
            f'path = "org/name" with revision = "main"; a folder has none'
        )
    return {**found, name: f"{path}@{revision}"}
