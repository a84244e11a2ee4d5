"""Conversion of plain tables to frozen dataclasses and back: strict, and with every problem in one message."""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from model.files.untrusted import SHOWN, Json, shown
from trainer.runfile.other_names import own_name
from trainer.runfile.toml_files import TOML_INTEGERS

SHOWN_PLACES = 3
"""Most tables that are named to have a setting which was written into another one."""


class SchemaReader:
    """Converter of tables to dataclasses that collects all problems."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.root: object = None  # the class of the whole file

    def table(self, cls: Any, value: object, path: str) -> Any:
        """Return an instance of dataclass `cls`; None, and the problems added to `problems`, when something in it is wrong."""
        self.root = self.root or cls
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

    def value(self, hint: object, value: object, path: str) -> Any:
        """Return `value` as type `hint`; None, and a problem added to `problems`, when the value has another type."""
        if dataclasses.is_dataclass(hint):
            return self.table(hint, value, path)
        origin, args = get_origin(hint), get_args(hint)
        if origin in (Union, types.UnionType):
            return self._union(args, value, path)
        if origin is tuple:
            return self._tuple(args, value, path)
        if self._fits(hint, value):
            return float(value) if hint is float and isinstance(value, int | float) else value
        self.problems.append(f"{path} = {shown(value)} is not {_words(hint)}{_nearest(value, hint)}")
        return None

    def _union(self, args: tuple[Any, ...], value: object, path: str) -> Any:
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

    def _tuple(self, args: tuple[Any, ...], value: object, path: str) -> Any:
        if not isinstance(value, list) or (Ellipsis not in args and len(value) != len(args)):
            length = "" if Ellipsis in args else f" of {len(args)}"
            self.problems.append(f"{path} = {shown(value)} is not a list{length}")
            return None
        hints = [args[0]] * len(value) if Ellipsis in args else args
        return tuple(self.value(hint, item, f"{path}.{i}") for i, (hint, item) in enumerate(zip(hints, value)))

    @staticmethod
    def _fits(hint: object, value: object) -> bool:
        if get_origin(hint) is Literal:
            return value in get_args(hint) and not isinstance(value, bool)
        if get_origin(hint) is tuple:
            return False
        if get_origin(hint) is dict:
            return isinstance(value, dict) and all(isinstance(v, str) for v in value.values())
        if type(value) is int and value not in TOML_INTEGERS:
            return False
        if hint is float:
            return isinstance(value, int | float) and not isinstance(value, bool)
        return isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool))

    def _unknown(self, name: str, key: str, known: list[str]) -> str:
        near = difflib.get_close_matches(key[:SHOWN], known, 1, 0.6)
        table = name.removesuffix(key)
        name = name if len(name) <= SHOWN else f"{name[:SHOWN]}..."
        if here := own_name(key):
            return f"{name} is not a setting; here it is {here}"
        if 0 < len(places := [*_places(self.root, key)]) <= SHOWN_PLACES:
            return f"{name} is not a setting; did you mean {' or '.join(map(repr, places))}?"
        hint = f"did you mean {table + near[0]!r}?" if near else f"known here: {', '.join(known)}"
        return f"{name} is not a setting; {hint}"


def _places(cls: object, key: str, path: str = "") -> Iterator[str]:
    """Yield every setting called `key` in the tables of dataclass `cls`, as a command line names it."""
    for field, hint in get_type_hints(cls).items():
        name = f"{path}{field}"
        tables = [inner for inner in (hint, *get_args(hint)) if dataclasses.is_dataclass(inner)]
        if field == key and not tables:
            yield name
        for table in tables:
            yield from _places(table, key, f"{name}.{'N.' if get_origin(hint) is tuple else ''}")


def _words(hint: object) -> str:
    if get_origin(hint) is Literal:
        return " | ".join(map(repr, get_args(hint)))
    names: dict[object, str] = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}
    return names.get(hint, "a table of strings" if get_origin(hint) is dict else "a list of strings")


def _nearest(value: object, hint: object) -> str:
    if get_origin(hint) is not Literal or not isinstance(value, str):
        return ""
    near = difflib.get_close_matches(value[:SHOWN], [str(v) for v in get_args(hint)], 1, 0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def to_tables(config: Any) -> Json:
    """Return a dataclass as plain tables; None, which TOML does not have, is left out."""

    def plain(value: object) -> Any:
        if hasattr(value, "to_tables"):
            return value.to_tables()
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            named = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
            return {key: plain(v) for key, v in named.items() if v is not None}
        if isinstance(value, tuple | list):
            return [plain(v) for v in value]
        return dict(value) if isinstance(value, dict) else value

    return plain(config)


def flatten_tables(tables: Any, path: str = "") -> Json:
    """Return nested tables as one level of dotted keys."""
    if (isinstance(tables, dict) and tables) or (isinstance(tables, list) and any(isinstance(item, dict) for item in tables)):
        items = tables.items() if isinstance(tables, dict) else enumerate(tables)
        return {k: v for key, value in items for k, v in flatten_tables(value, f"{path}.{key}" if path else str(key)).items()}
    return {path: tables}
