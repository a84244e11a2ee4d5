"""Settings of run.toml with their meanings, read from the config classes: a field, and behind it its sentence as a string."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import textwrap
import types
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from model.errors import ConfigError
from model.files.untrusted import shown
from trainer.config import RunConfig
from trainer.runfile.other_names import own_name

NO_DEFAULT = dataclasses.MISSING
LEAF_WORDS: dict[object, str] = {str: "text", int: "integer", float: "number", bool: "true or false"}


@dataclass(frozen=True)
class Setting:
    """One setting of run.toml."""

    key: str  # as on a command line: data.sources.N.path
    hint: object  # its type
    default: object  # NO_DEFAULT where it has to be written
    sentence: str

    @property
    def table(self) -> str:
        """Return the header of its table in run.toml: [optim], [[data.sources]]; "" above all tables."""
        path = self.key.rpartition(".")[0]
        return f"[[{path.removesuffix('.N')}]]" if path.endswith(".N") else f"[{path}]" if path else ""

    @property
    def name(self) -> str:
        return self.key.rpartition(".")[2]


def list_settings() -> list[Setting]:
    """Return every setting in the order of the classes. Raises `ConfigError` where a field has no sentence."""
    return [*_settings_of(RunConfig, "")]


def find_settings(word: str) -> list[Setting]:
    """Return the settings whose key or sentence holds `word`, whatever its case; all for "".

    Raises `ConfigError` when none does.
    """
    known = list_settings()
    low = word.lower()
    if found := [setting for setting in known if low in setting.key.lower() or low in setting.sentence.lower()]:
        return found
    if here := own_name(word):
        raise ConfigError(f"--settings {shown(word)}: in no key and no sentence; here it is {here}")
    near = difflib.get_close_matches(low, {name for setting in known for name in (setting.key, setting.name)}, 3, 0.5)
    raise ConfigError(f"--settings {shown(word)}: in no key and no sentence{'; near: ' + ', '.join(sorted(near)) if near else ''}")


def _settings_of(cls: type, path: str) -> list[Setting]:
    """Return the settings of a table, those of its own before those of the tables in it."""
    own: list[Setting] = []
    inside: list[Setting] = []
    hints, sentences = get_type_hints(cls), sentences_of(cls)
    for field in dataclasses.fields(cls):
        key, hint = f"{path}.{field.name}" if path else field.name, hints[field.name]
        if (inner := table_class(hint)) is not None:
            inside += _settings_of(inner, f"{key}.N" if get_origin(hint) is tuple else key)
        else:
            own.append(Setting(key, hint, default_of(field), sentences[field.name]))
    return own + inside


def table_class(hint: object) -> type | None:
    """Return the class of a table, or of each table of a list; None for the type of a value."""
    for option in (hint, *get_args(hint)):
        if isinstance(option, type) and dataclasses.is_dataclass(option):
            return option
    return None


def default_of(field: dataclasses.Field[Any]) -> object:
    """Return the default of a field; NO_DEFAULT where it has none."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


@cache
def sentences_of(cls: type) -> dict[str, str]:
    """Return the sentence of every field of a config class. Raises `ConfigError` naming the first field that has none."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    found: dict[str, str] = {}
    nodes = body.body if isinstance(body, ast.ClassDef) else []
    for field, behind in zip(nodes, [*nodes[1:], None]):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            text = behind.value.value if isinstance(behind, ast.Expr) and isinstance(behind.value, ast.Constant) else None
            found[field.target.id] = inspect.cleandoc(text).replace("\n", " ") if isinstance(text, str) else ""
    for field_ in dataclasses.fields(cls):
        if not found.get(field_.name, "").endswith("."):
            raise ConfigError(
                f'{cls.__module__}.{cls.__name__}.{field_.name} has no sentence: write one behind the field, as """What it is, '
                'its unit, what 0 or "" stands for, when to change it.""", and run `make settings`'
            )
    return found


def type_words(hint: object) -> str:
    """Describe the type of a value, for people."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return ", ".join(map(str, args))
    if origin in (Union, types.UnionType):
        return " or ".join(type_words(arg) for arg in args if arg is not types.NoneType)
    if origin is tuple:
        return f"list of {type_words(args[0])}" if Ellipsis in args else f"list of {len(args)}: {type_words(args[0])}"
    return "table of text" if origin is dict else LEAF_WORDS.get(hint, "table")


def default_words(value: object) -> str:
    """Write a default as a run file does."""
    if value is NO_DEFAULT:
        return "required"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(default_words, value))}]"
    return f'"{value}"' if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)
