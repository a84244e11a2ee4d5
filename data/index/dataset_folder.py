"""Folders that `save_to_disk` of Hugging Face's datasets wrote: a list of .arrow files in state.json."""

from __future__ import annotations

import os
from pathlib import Path

from model.errors import ConfigError
from model.files.untrusted import load_json

_STATE, _SPLITS = "state.json", "dataset_dict.json"


def arrow_files(folder: str) -> list[str]:
    """Return the .arrow files of a dataset's folder, in its order. Raises `ConfigError` for a folder that is none."""
    where = f"data.sources path {folder!r}"
    if (Path(folder) / _SPLITS).is_file():
        splits = sorted(path.name for path in Path(folder).iterdir() if (path / _STATE).is_file())
        raise ConfigError(f"{where} holds several splits: name one of {', '.join(os.path.join(folder, name) for name in splits)}")
    if not (Path(folder) / _STATE).is_file():
        raise ConfigError(f"{where} is a folder: name a file, a pattern of files, or a folder that datasets' save_to_disk wrote")
    try:
        files = [entry["filename"] for entry in load_json(Path(folder) / _STATE)["_data_files"]]
        if not files or any(not isinstance(name, str) or os.path.basename(name) != name for name in files):
            raise ValueError("names no file of the folder, or one outside it")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{where}: {_STATE} is not as save_to_disk writes it: {error}") from error
    if missing := next((name for name in files if not (Path(folder) / name).is_file()), None):
        raise ConfigError(f"{where}: {_STATE} names {missing!r}, which is not there")
    return [os.path.join(folder, name) for name in files]
