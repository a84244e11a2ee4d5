"""Run files and overrides read as plain tables, within limits, because they are copied from elsewhere; tables written as TOML."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

from model.errors import ConfigError
from model.files.untrusted import Json, is_deeper, shown

RECIPE = "recipe:"
"""Start of a --cfg that names a shipped run file instead of a path."""
MAX_BYTES = 1_000_000
MAX_DEPTH = 32
"""Largest depth of nested tables and arrays; settings are five deep."""
MAX_OVERRIDE = 100_000
"""Largest number of characters of one override."""
TOML_INTEGERS = range(-(2**63), 2**63)
"""Integers of TOML; Python's parser accepts any integer."""
DASHED = re.compile(r"--(output_dir=|seed=|[a-z_]+\.)")
"""Start of a setting that is written as an option on a command line, as other trainers have them."""
BARE = re.compile(r"[A-Za-z0-9_-]+")


def read_toml(path: str) -> Json:
    """Read the tables of a TOML file, or of the recipe that `recipe:NAME` names.

    Raises `ConfigError` when the file is missing, too large, malformed or nested too deep.
    """
    file = recipe_file(path.removeprefix(RECIPE)) if path.startswith(RECIPE) else Path(path)
    return read_tables(file, f"--cfg {path}")


def read_tables(file: Path, where: str) -> Json:
    """Read the tables of a TOML file; `where` names the setting in errors.

    Raises `ConfigError` when the file is missing, too large, malformed or nested too deep.
    """
    if not file.is_file():
        raise ConfigError(f"{where}: no such file")
    if file.stat().st_size > MAX_BYTES:
        raise ConfigError(f"{where}: larger than {MAX_BYTES} bytes, which no run file is")
    try:
        tables = tomllib.loads(file.read_bytes().decode("utf-8"))
    except ValueError as error:  # broken syntax, broken UTF-8, a number of thousands of digits
        raise ConfigError(f"{where}: not TOML: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{where}: nested deeper than {MAX_DEPTH}") from error
    check_depth(tables, where)
    return tables


def recipe_file(name: str) -> Path:
    """Return the run file that is shipped as `name`. Raises `ConfigError` when there is none."""
    trainer = Path(__file__).parents[1]
    # Inside the package where it was installed from a wheel, beside it in a source tree.
    known = {file.stem: file for folder in (trainer / "recipes", trainer.parent / "recipes") for file in folder.glob("*.toml")}
    if name not in known:
        raise ConfigError(f"--cfg {RECIPE}{shown(name)}: no such recipe; there are {', '.join(sorted(known)) or 'none'}")
    return known[name]


def check_depth(value: object, where: str) -> None:
    """Raise `ConfigError` when tables and arrays are nested deeper than MAX_DEPTH: the code that reads them recurses."""
    if is_deeper(value, MAX_DEPTH):
        raise ConfigError(f"{where}: nested deeper than {MAX_DEPTH}")


def apply_override(tables: Json, text: str) -> None:
    """Put `section.key=value` into `tables`. The value is TOML; text that is no TOML is a string; no text takes the key out.

    Raises `ConfigError` when the override is malformed, too long or too deep, or names no key of a table.
    """
    if len(text) > MAX_OVERRIDE:
        raise ConfigError(f"override {shown(text)} has {len(text)} characters, and an override has at most {MAX_OVERRIDE}")
    key, equals, value = text.partition("=")
    where = f"override {shown(text)}"
    if not equals or not key.strip():
        raise ConfigError(f"{where} is no override: write section.key=value")
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise ConfigError(f"{where} is no UTF-8: it cannot be written down in the run's own run.toml")
    *path, last = key.strip().split(".")
    if len(path) >= MAX_DEPTH:
        raise ConfigError(f"{where}: nested deeper than {MAX_DEPTH}")
    here: object = tables
    for word in path:
        if isinstance(here, list):
            here = here[_index(here, word, where)]
        elif isinstance(here, dict) and not value.strip() and word not in here:
            return  # nothing to take out
        elif isinstance(here, dict) and isinstance(here.setdefault(word, {}), dict | list):
            here = here[word]
        else:
            raise ConfigError(f"{where}: {shown(word)} is a value, not a table")
    if isinstance(here, list) and not value.strip():
        here.pop(_index(here, last, where))
        return
    if not isinstance(here, dict):
        raise ConfigError(f"{where} names no key of a table")
    if not value.strip():
        here.pop(last, None)
        return
    here[last] = _override_value(value)
    check_depth(tables, where)


def _index(items: list[object], word: str, where: str) -> int:
    """Return the index in `items` that a word of a key is. Raises `ConfigError` where it is none."""
    if not (word.isascii() and word.isdigit() and len(word) < 10) or int(word) >= len(items):
        raise ConfigError(f"{where}: {shown(word)} is no index of a list of {len(items)}")
    return int(word)


def without_dashes(words: list[str] | None) -> list[str]:
    """Return the words of a command line; a setting written as an option, `--section.key=value`, becomes `section.key=value`.

    `words`: None for those of this process. No option has a dot in its name, so a dot marks a setting.
    """
    return [word[2:] if DASHED.match(word) else word for word in (sys.argv[1:] if words is None else words)]


def _override_value(text: str) -> object:
    try:
        tables = tomllib.loads(f"value = {text}")
    except RecursionError as error:
        raise ConfigError(f"{shown(text)}: nested deeper than {MAX_DEPTH}") from error
    except ValueError:
        return text
    # A line break in the text would begin another key, which would be lost silently: take such text as a string.
    return tables["value"] if tables.keys() == {"value"} else text


def as_toml(value: object) -> str:
    """Return one value as a run file writes it."""
    return to_toml({"v": value}).removeprefix("v = ").strip()


def to_toml(tables: Json) -> str:
    """Return TOML text that reads back as `tables`."""
    lines: list[str] = []
    _write(tables, "", lines.append)
    return "\n".join(lines).lstrip("\n") + "\n"


def _write(table: Json, path: str, line: Callable[[str], None]) -> None:
    nested = {k: v for k, v in table.items() if isinstance(v, dict)}
    arrays = {k: v for k, v in table.items() if isinstance(v, list) and v and all(isinstance(i, dict) for i in v)}
    for key, value in table.items():
        if key not in nested and key not in arrays:
            line(f"{_key(key)} = {_literal(value)}")
    for key, value in nested.items():
        line(f"\n[{path}{_key(key)}]")
        _write(value, f"{path}{_key(key)}.", line)
    for key, items in arrays.items():
        for item in items:
            line(f"\n[[{path}{_key(key)}]]")
            _write(item, f"{path}{_key(key)}.", line)


def _key(key: str) -> str:
    return key if BARE.fullmatch(key) else _literal(key)


def _literal(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(c if c.isprintable() or ord(c) > 127 else f"\\u{ord(c):04x}" for c in escaped) + '"'
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return repr(value)
