"""Overrides of a run file by the command line: what they unset, and what of the file they set aside."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from model.errors import ConfigError
from model.files.untrusted import Json, shown
from trainer.runfile.merge_tables import PAIRS, has_key, value_of, without_key
from trainer.runfile.settings import list_settings
from trainer.runfile.toml_files import apply_override, as_toml

IDLE = re.compile(r"(?:every stage: |stage (?P<stage>[a-z0-9_-]+): )?\[?(?P<key>[a-z_]+(?:\.[a-z_]+)*)\]?(?: = .*?)? has no effect")
"""Beginning of a problem with a setting that has no effect beside the others."""
NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def override_key(text: str) -> str:
    return text.partition("=")[0].strip()


def apply_overrides(tables: Json, overrides: Sequence[str]) -> tuple[Json, list[str]]:
    """Return the tables with the overrides in them, and one line per setting of the file that they set aside.

    An override replaces its rival, as train.max_steps does train.epochs, and what stages say of its key. Raises `ConfigError` for
    an override that is malformed, or unsets what is no setting.
    """
    for text in overrides:
        if not text.partition("=")[2].strip() and not has_key(tables, override_key(text)):
            check_known(text)
        apply_override(tables, text)
    notes: list[str] = []
    given = {override_key(text): text for text in overrides}
    for key, text in given.items():
        for other in rivals(key):
            if other not in given:
                tables = _without(tables, other, text, notes)
        stages = tables.get("stage") if not key.startswith("stage") else None
        for i, stage in enumerate(stages if isinstance(stages, list) else ()):
            for other in (key, *rivals(key)):
                if f"stage.{i}.{other}" not in given and isinstance(stage, dict):  # what is no table is told later
                    stage = _without(stage, other, text, notes)
            tables = {**tables, "stage": [stage if k == i else own for k, own in enumerate(tables["stage"])]}
    return tables, notes


def without_idle(
    tables: Json, overrides: Sequence[str], problems: Callable[[Json], list[str]], alone: Json
) -> tuple[Json, list[str]]:
    """Return the tables without the settings of the file that have no effect beside the overrides, and one line for each.

    `problems` lists those of some tables. `alone`: the file without overrides; what has no effect there stays, as an error.
    """
    notes: list[str] = []
    given = [override_key(text) for text in overrides]
    own: list[str] | None = None
    while overrides and (found := [(line, match) for line in problems(tables) if (match := IDLE.match(line))]):
        own = _problems_of(alone, problems) if own is None else own
        left = tables
        for line, match in found:
            key, stage = match["key"], match["stage"]
            named = any(key == other or other.startswith(f"{key}.") for other in given)
            if not named and line not in own and line not in notes:
                tables = _without_in_stage(tables, stage, key) if stage else without_key(tables, key)
                notes.append(line)
        if tables == left:
            break
    return tables, notes


def _problems_of(tables: Json, problems: Callable[[Json], list[str]]) -> list[str]:
    """Return the problems of a file without its overrides; none where it cannot be judged without them."""
    try:
        return problems(tables)
    except ConfigError:
        return []


def _without_in_stage(tables: Json, name: str, key: str) -> Json:
    return {**tables, "stage": [without_key(s, key) if s.get("name") == name else s for s in tables["stage"]]}


def rivals(key: str) -> list[str]:
    """Return the keys that exclude `key`, in the same tables."""
    section, _, name = key.rpartition(".")
    pairs = [pair for table, *pair in PAIRS if name in pair and section.rpartition(".")[2] == table]
    return [f"{section}.{other}" for pair in pairs for other in pair if other != name]


def _without(tables: Json, key: str, text: str, notes: list[str]) -> Json:
    """Return the tables without `key`; a line is added to `notes` where it was there."""
    if has_key(tables, key):
        stage = f"stage {tables['name']}: " if "name" in tables else ""
        notes.append(f"{stage}{_line(tables, key)} of the file: override {shown(text)} holds")
    return without_key(tables, key)


def _line(tables: Json, key: str) -> str:
    value = value_of(tables, key)
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return f"[[{key}]]"
    return f"[{key}]" if isinstance(value, dict) else f"{key} = {as_toml(value)}"


def check_known(text: str) -> None:
    """Raise `ConfigError` where an override unsets what is neither in the file nor a setting."""
    key = re.sub(r"^stage\.\d+\.", "", override_key(text))
    plain = NUMBER.sub("N", key).removesuffix(".N")
    known = [setting.key for setting in list_settings()]
    if not any(f"{name}.".startswith(f"{plain}.") for name in known):
        raise ConfigError(f"override {shown(text)}: {plain} is not a setting: python -m trainer.main --settings lists them")


def with_override(line: str, overrides: Sequence[str]) -> str:
    """Return the problem with the override in front that it is about, if there is one."""
    about = line.partition(";")[0]  # without what is suggested
    for text in reversed(overrides):
        if re.search(rf"(?<![\w.]){re.escape(override_key(text))}(?!\w)", about):
            return f"override {shown(text)}: {line}"
    return line
