"""Parts that a run file names and that cannot be reached: folders with their published shapes take their place."""

from __future__ import annotations

import json
from pathlib import Path

from transformers.utils import cached_file

from model.errors import ConfigError
from model.files.hub import HUB_ID, find_file, split_revision
from model.files.untrusted import Json
from trainer.runfile.merge_tables import levels_of, value_of
from trainer.runfile.published import is_published
from trainer.trial.published_shapes import published_shape

PARTS = ("llm", "vision", "audio")


def with_reachable(tables: Json, folder: Path, places: dict[str, str]) -> Json:
    """Return the tables with every part that cannot be reached replaced by a folder of its shape.

    `places`: these folders by the paths that they replace; new ones are added. Raises `ConfigError` that names the files needed
    where a shape is not in the built-in table.
    """
    for level in levels_of(tables):
        cache_dir = value_of(tables, "model.cache_dir")
        for key in ("model.init_from", *(f"model.{part}.path" for part in PARTS)):
            path = value_of(level, key)
            if isinstance(path, str) and path and path not in places and HUB_ID.fullmatch(path) and not Path(path).is_dir():
                if key == "model.init_from" and not is_published(path):
                    continue
                if not _is_reached(key, path, cache_dir if isinstance(cache_dir, str) else ""):
                    places[path] = str(_write_shape(key, path, folder))
                    _write_tower(places[path], cache_dir if isinstance(cache_dir, str) else "", folder, places)
    return renamed_paths(tables, places)


def renamed_paths(tables: Json, places: dict[str, str]) -> Json:
    """Return the tables with the values of every `path` and `init_from` replaced where `places` has another one."""

    def moved(value: object, key: str = "") -> object:
        if isinstance(value, dict):
            return {
                name: moved(item, name) for name, item in value.items() if name != "revision" or value.get("path") not in places
            }
        if isinstance(value, list):
            return [moved(item) for item in value]
        return places.get(value, value) if key in ("path", "init_from") and isinstance(value, str) else value

    return {key: moved(value, key) if key in ("model", "stage") else value for key, value in tables.items()}


def _write_tower(place: str, cache_dir: str, folder: Path, places: dict[str, str]) -> None:
    """Write the shape of the tower that the config.json in `place` names beside its own parts (LLaVA's) unless it is reached."""
    file = Path(place, "config.json")
    config = json.loads(file.read_text())
    tower = config.get("mm_vision_tower")
    if tower and not _is_reached("model.vision.path", tower, cache_dir):
        places[tower] = str(_write_shape("model.vision.path", tower, folder))
        file.write_text(json.dumps({**config, "mm_vision_tower": places[tower]}))


def _is_reached(key: str, path: str, cache_dir: str) -> bool:
    """Tell whether config.json of a hub id can be read. One whose shape is known here is looked for on this machine alone."""
    name, revision = split_revision(path)
    if published_shape(path) is not None:  # a hub that does not answer is asked again and again, for a minute
        known = cached_file(
            name,
            "config.json",
            revision=revision,
            cache_dir=cache_dir or None,
            local_files_only=True,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return known is not None
    try:
        return find_file(key, path, "config.json", cache_dir) is not None
    except ConfigError:
        return False


def _write_shape(key: str, path: str, folder: Path) -> Path:
    """Write the published shape of a hub id into a folder below `folder`. Raises `ConfigError` where it is not known here."""
    files = published_shape(path)
    if files is None:
        more = {
            "model.vision.path": " and preprocessor_config.json",
            "model.init_from": ", preprocessor_config.json and the tokenizer",
        }
        raise ConfigError(
            f"{key} = {path!r} is no folder, cannot be reached, and its shape is not in the built-in table: a dry run needs its "
            f"config.json{more.get(key, '')} in a folder (no weights), named as {key}=FOLDER"
        )
    place = folder / path.replace("/", "--").replace("@", "--")
    place.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (place / name).write_text(json.dumps(value))
    return place
