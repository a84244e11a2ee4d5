"""Files of a Hugging Face folder or hub id."""

import re
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from model.bounded import load_json
from model.config import ConfigError

HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
"""owner/name, and nothing that could be read as a path or an address."""


def find_file(setting: str, path: str, name: str, cache_dir: str = "") -> Path | None:
    """`name` inside the folder or hub id `path`; None when it has none. `setting` is the key that errors name."""
    folder = Path(path)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    if not HUB_ID.fullmatch(path) or ".." in path:
        raise ConfigError(f"{setting} = {path!r} is no folder: give a Hugging Face folder or a hub id like 'org/name'")
    try:
        found = cached_file(path, name, cache_dir=cache_dir or None, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{setting} = {path!r} is neither a folder nor a hub id that can be read: {reason}") from error
    return Path(found) if found else None


def read_json(setting: str, path: str, name: str, cache_dir: str = "") -> dict[str, Any]:
    """The JSON object in `name`; ConfigError when the file is missing or is something else."""
    file = find_file(setting, path, name, cache_dir)
    if file is None:
        there = "" if Path(path).is_dir() else ", or it cannot be reached: give a folder, or a model.cache_dir that holds it"
        raise ConfigError(f"{setting} = {path!r} holds no {name}{there}")
    try:
        value = load_json(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{setting} = {path!r}: {name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{setting} = {path!r}: {name} is not a JSON object")
    return value


def weight_files(setting: str, path: str, cache_dir: str = "") -> list[Path]:
    """The files that hold the weights: safetensors before .bin, one file or the shards of an index."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        if index := find_file(setting, path, f"{stem}.{suffix}.index.json", cache_dir):
            try:
                names = sorted(set(load_json(index)["weight_map"].values()))
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise ConfigError(f"{setting} = {path!r}: {index.name} is no index of weight files: {error}") from error
            if any(not isinstance(name, str) or Path(name).name != name for name in names):
                raise ConfigError(f"{setting} = {path!r}: {index.name} names files outside its folder")
            files = [find_file(setting, path, name, cache_dir) for name in names]
            if None in files:
                raise ConfigError(f"{setting} = {path!r}: {names[files.index(None)]} is missing, but {index.name} names it")
            return [file for file in files if file is not None]
        if single := find_file(setting, path, f"{stem}.{suffix}", cache_dir):
            return [single]
    raise ConfigError(f"{setting} = {path!r} holds no model.safetensors and no pytorch_model.bin")
