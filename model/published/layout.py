"""The description of a layout of published models: how it is recognised, its parts and their names, the settings it implies."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from model.errors import ConfigError
from model.files.hub import find_file, folder_tensors, hugging_face_config, read_json, weight_files
from model.files.tensor_files import Tensors, read_weights
from model.files.untrusted import Json, listed

MAX_TEXT_BYTES = 1 << 20
"""Largest size of a chat template."""
PARTS = ("llm", "vision", "vision_projector", "audio", "audio_projector", "state_head")
"""Parts of a model that a published folder may hold, by the names of run.toml."""


@dataclass(frozen=True)
class Published:
    """A published folder or hub id, and its config.json. `setting` is the key of run.toml that messages name."""

    setting: str
    path: str
    cache_dir: str
    config: Json
    written: Json = field(default_factory=dict)  # settings that the run file writes itself, by dotted key

    @cached_property
    def whole(self) -> PretrainedConfig:
        """Return config.json as the object of transformers' class, which has a default for every key."""
        return hugging_face_config(f"{self.setting} = {self.path!r}", self.config)

    def json(self, name: str) -> Json:
        """Return the JSON object in the file `name`; {} when there is no such file."""
        if find_file(self.setting, self.path, name, self.cache_dir) is None:
            return {}
        return read_json(self.setting, self.path, name, self.cache_dir)

    def text(self, name: str) -> str:
        """Return the text of the file `name`; "" when there is no such file. Raises `ConfigError` when it is no UTF-8."""
        file = find_file(self.setting, self.path, name, self.cache_dir)
        try:
            return file.read_text(encoding="utf-8") if file and file.stat().st_size <= MAX_TEXT_BYTES else ""
        except (OSError, UnicodeDecodeError) as error:
            raise self.refused(f"{name} cannot be read: {error}") from error

    def has(self, name: str) -> bool:
        """Tell whether there is a file `name`."""
        return find_file(self.setting, self.path, name, self.cache_dir) is not None

    def refused(self, reason: str) -> ConfigError:
        """Return the error that this source cannot be used, with the reason."""
        return ConfigError(f"{self.setting} = {self.path!r}: {reason}")


@dataclass(frozen=True)
class PartView:
    """One part of a published model: its own config.json inside the model's, and its tensors by the names they have here."""

    names: tuple[tuple[str, str], ...]  # pattern of a name in the files, and what replaces it; the first that matches holds
    config: Callable[[Published], Json] = lambda source: {}
    convert: Callable[[Tensors], Tensors] | None = None  # computes tensors of the part from those of the files, after renaming
    processor: Callable[[Published], Json] | None = None  # image processor's settings, where they are not in the folder's own files

    def name_of(self, name: str) -> str | None:
        """Return the part's own name of a tensor; None for a tensor of another part."""
        for pattern, new in self.names:
            if match := re.match(pattern, name):
                return match.expand(new) + name[match.end() :]
        return None

    def tensors(self, found: Tensors) -> Tensors:
        """Return the tensors of this part among all tensors of the files."""
        mine = {own: rows for name, rows in found.items() if (own := self.name_of(name)) is not None}
        return self.convert(mine) if self.convert else mine


@dataclass(frozen=True)
class Given:
    """The value of a setting that follows from a published model."""

    value: Any
    also: tuple[Any, ...] = ()  # other values that a run file may write instead
    free: bool = False  # a run file may write any other value
    when: tuple[str, Any] | None = None  # the setting exists only where another one has this value

    def allows(self, written: object) -> bool:
        """Tell whether a run file may write this value."""
        return self.free or written == self.value or written in self.also


Settings = dict[str, Given]
"""Settings of run.toml by dotted key."""


@dataclass(frozen=True)
class Layout:
    """One layout of published models."""

    name: str  # for messages: "LLaVA (transformers)"
    matches: Callable[[Published], bool]
    parts: Mapping[str, PartView]  # by the names of PARTS
    settings: Callable[[Published], Settings]  # beside the paths of the parts; raises ConfigError for what cannot be expressed
    reference: str = ""  # class of transformers that opens the folder; "" where it has none
    nothing: tuple[str, ...] = ()  # patterns of tensors that carry nothing
    files: Callable[[Published], list[Path]] | None = None  # of the tensors, where they are not a Hugging Face folder's

    def weight_files(self, source: Published) -> list[Path]:
        """Return the files that hold the tensors."""
        return self.files(source) if self.files else weight_files(source.setting, source.path, source.cache_dir)

    def tensors(self, source: Published) -> Tensors:
        """Return every tensor of the files by its name there. Only names and shapes are read."""
        if self.files is None:
            return folder_tensors(source.setting, source.path, source.cache_dir)
        return {name: rows for file in self.files(source) for name, rows in read_weights(file).items()}

    def check_accounted(self, source: Published, tensors: Tensors) -> None:
        """Refuse a tensor that no part reads and that is not on the list of what carries nothing. Looks at names alone."""
        ignored = [re.compile(pattern) for pattern in self.nothing]
        unread = [
            name
            for name in tensors
            if all(view.name_of(name) is None for view in self.parts.values()) and not any(p.search(name) for p in ignored)
        ]
        if unread:
            raise source.refused(
                f"{self.name} has no place for {listed(unread)}, which would be lost: restore the files as published"
            )
