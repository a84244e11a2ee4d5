"""`revision` keys of run files: each is written into the path beside it, as org/name@revision, before the tables are checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from model.errors import ConfigError
from model.files.hub import HUB_ID
from model.files.untrusted import Json, shown

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
