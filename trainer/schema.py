"""From TOML to frozen dataclasses and back: strict, and with every problem in one message."""

from __future__ import annotations

import dataclasses
import difflib
import re
import tomllib
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from model.config import ConfigError

MAX_BYTES = 1_000_000
MAX_DEPTH = 32
"""Tables and arrays in each other; settings stand five deep."""
MAX_OVERRIDE = 100_000
"""Characters of one override."""
INTEGERS = range(-(2**63), 2**63)
"""TOML's; Python's parser takes any."""
_SHOWN = 200
BARE = re.compile(r"[A-Za-z0-9_-]+")


def read_toml(path: str) -> dict[str, Any]:
    """The tables of a TOML file; ConfigError when it is missing, too large or malformed."""
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"--cfg {path}: no such file")
    if file.stat().st_size > MAX_BYTES:
        raise ConfigError(f"--cfg {path}: larger than {MAX_BYTES} bytes, which no run file is")
    try:
        tables = tomllib.loads(file.read_bytes().decode("utf-8"))
    except ValueError as error:  # broken syntax, broken UTF-8, a number of thousands of digits
        raise ConfigError(f"--cfg {path}: not TOML: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"--cfg {path}: nested deeper than {MAX_DEPTH}") from error
    check_depth(tables, f"--cfg {path}")
    return tables


def check_depth(value: Any, where: str) -> None:
    """ConfigError when tables and arrays stand more than MAX_DEPTH deep in each other: what reads them recurses."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        children = (item for held in level for item in (held.values() if isinstance(held, dict) else held))
        level = [item for item in children if isinstance(item, dict | list)]
        if not level:
            return
    raise ConfigError(f"{where}: nested deeper than {MAX_DEPTH}")


def apply_override(tables: dict[str, Any], text: str) -> None:
    """Put `section.key=value` into `tables`. The value is TOML; what is no TOML is taken as a string."""
    if len(text) > MAX_OVERRIDE:
        raise ConfigError(f"{shown(text)} has {len(text)} characters; an override has at most {MAX_OVERRIDE}")
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{shown(text)} is no override: write section.key=value")
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise ConfigError(f"{shown(text)} is no UTF-8: it cannot be written down in the run's own run.toml")
    *path, last = key.strip().split(".")
    if len(path) >= MAX_DEPTH:
        raise ConfigError(f"{shown(text)}: nested deeper than {MAX_DEPTH}")
    here: Any = tables
    for word in path:
        if isinstance(here, list):
            if not (word.isascii() and word.isdigit() and len(word) < 10) or int(word) >= len(here):
                raise ConfigError(f"{shown(text)}: {shown(word)} is no index of a list of {len(here)}")
            here = here[int(word)]
        elif isinstance(here.setdefault(word, {}), dict | list):
            here = here[word]
        else:
            raise ConfigError(f"{shown(text)}: {shown(word)} is a value, not a table")
    if not isinstance(here, dict):
        raise ConfigError(f"{shown(text)} names no key of a table")
    here[last] = _override_value(value)
    check_depth(tables, shown(text))


def _override_value(text: str) -> Any:
    try:
        tables = tomllib.loads(f"value = {text}")
    except RecursionError as error:
        raise ConfigError(f"{shown(text)}: nested deeper than {MAX_DEPTH}") from error
    except ValueError:
        return text
    # A line break in it would begin another key, which nobody would see again.
    return tables["value"] if tables.keys() == {"value"} else text


def shown(value: Any) -> str:
    """A value as messages show it: they stay readable whatever it holds."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text)} characters)"


class Reader:
    """Collects problems while it turns tables into dataclasses. `planned` explains keys and values that are not built yet."""

    def __init__(self, planned: dict[str, str]) -> None:
        self.planned = planned
        self.problems: list[str] = []

    def table(self, cls: Any, value: Any, path: str) -> Any:
        """An instance of dataclass `cls`, or None when something in it is wrong."""
        if not isinstance(value, dict):
            self.problems.append(f"{path or 'the file'} = {shown(value)} is not a table")
            return None
        hints, fields = get_type_hints(cls), {f.name: f for f in dataclasses.fields(cls)}
        before, given = len(self.problems), {}
        for key, item in value.items():
            name = f"{path}.{key}" if path else key
            if key not in fields:
                self.problems.append(self._unknown(name, key, list(fields)))
            else:
                given[key] = self.value(hints[key], item, name)
        for key, f in fields.items():
            if key not in value and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
                self.problems.append(f"{path + '.' if path else ''}{key} is required")
        return cls(**given) if len(self.problems) == before else None

    def value(self, hint: Any, value: Any, path: str) -> Any:
        """`value` as type `hint`; a problem and None when it is of another type."""
        if f"{path} = {value!r}" in self.planned:
            self.problems.append(f"{path} = {value!r} {self.planned[f'{path} = {value!r}']}")
            return None
        if dataclasses.is_dataclass(hint):
            return self.table(hint, value, path)
        origin, args = get_origin(hint), get_args(hint)
        if origin in (Union, types.UnionType):
            return self._union(args, value, path)
        if origin is tuple:
            return self._tuple(args, value, path)
        if self._fits(hint, value):
            return float(value) if hint is float else value
        self.problems.append(f"{path} = {shown(value)} is not {_words(hint)}{_nearest(value, hint)}")
        return None

    def _union(self, args: tuple[Any, ...], value: Any, path: str) -> Any:
        options = [arg for arg in args if arg is not types.NoneType]
        if len(options) == 1:
            return self.value(options[0], value, path)
        for option in options:
            if get_origin(option) is tuple and isinstance(value, list):
                return self._tuple(get_args(option), value, path)
            if self._fits(option, value):
                return value
        self.problems.append(f"{path} = {shown(value)} is not {' or '.join(_words(option) for option in options)}")
        return None

    def _tuple(self, args: tuple[Any, ...], value: Any, path: str) -> Any:
        if not isinstance(value, list) or (Ellipsis not in args and len(value) != len(args)):
            length = "" if Ellipsis in args else f" of {len(args)}"
            self.problems.append(f"{path} = {shown(value)} is not a list{length}")
            return None
        hints = [args[0]] * len(value) if Ellipsis in args else args
        return tuple(self.value(hint, item, f"{path}.{i}") for i, (hint, item) in enumerate(zip(hints, value)))

    @staticmethod
    def _fits(hint: Any, value: Any) -> bool:
        if get_origin(hint) is Literal:
            return value in get_args(hint) and not isinstance(value, bool)
        if get_origin(hint) is tuple:
            return False
        if get_origin(hint) is dict:
            return isinstance(value, dict) and all(isinstance(v, str) for v in value.values())
        if type(value) is int and value not in INTEGERS:
            return False
        if hint is float:
            return isinstance(value, int | float) and not isinstance(value, bool)
        return isinstance(value, hint) and not (hint is int and isinstance(value, bool))

    def _unknown(self, name: str, key: str, known: list[str]) -> str:
        plain = ".".join(word for word in name.split(".") if not word.isdigit())
        if plain in self.planned:
            return f"{name} {self.planned[plain]}"
        near = difflib.get_close_matches(key[:_SHOWN], known, 1, 0.5)
        name = name if len(name) <= _SHOWN else f"{name[:_SHOWN]}..."
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        return f"{name} is not a setting; {hint}"


def _words(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " | ".join(map(repr, get_args(hint)))
    names: dict[Any, str] = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}
    return names.get(hint, "a table of strings" if get_origin(hint) is dict else "a list of strings")


def _nearest(value: Any, hint: Any) -> str:
    if get_origin(hint) is not Literal or not isinstance(value, str):
        return ""
    near = difflib.get_close_matches(value[:_SHOWN], [str(v) for v in get_args(hint)], 1, 0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def to_tables(config: Any) -> dict[str, Any]:
    """A dataclass as plain tables; None, which TOML has not, is left out."""

    def plain(value: Any) -> Any:
        if hasattr(value, "to_tables"):
            return value.to_tables()
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            named = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
            return {key: plain(v) for key, v in named.items() if v is not None}
        if isinstance(value, tuple | list):
            return [plain(v) for v in value]
        return dict(value) if isinstance(value, dict) else value

    return plain(config)


def to_toml(tables: dict[str, Any]) -> str:
    """TOML text that reads back as `tables`."""
    lines: list[str] = []
    _write(tables, "", lines.append)
    return "\n".join(lines).lstrip("\n") + "\n"


def _write(table: dict[str, Any], path: str, line: Callable[[str], None]) -> None:
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


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(c if c.isprintable() or ord(c) > 127 else f"\\u{ord(c):04x}" for c in escaped) + '"'
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return repr(value)
