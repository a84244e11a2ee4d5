"""Functions that merge, compare and cut the plain tables of run.toml."""

from __future__ import annotations

from model.files.untrusted import Json

PAIRS = (
    ("train", "epochs", "max_steps"),
    ("optim", "warmup_ratio", "warmup_steps"),
    ("optim", "decay_ratio", "decay_steps"),
)
"""Settings that exclude each other: a stage that names one of a pair replaces the other one."""


def stage_tables(tables: Json) -> dict[str, Json]:
    """Return the complete tables of every stage of a resolved run, by name; a run without stages is there under the name ""."""
    base = {key: value for key, value in tables.items() if key != "stage"}
    stages = tables.get("stage") or [{"name": ""}]
    return {stage["name"]: merge_into(base, {k: v for k, v in stage.items() if k != "name"}) for stage in stages}


def merge_into(base: Json, own: Json) -> Json:
    """Merge `own` into `base`: tables are merged, arrays and values are replaced.

    Of two settings that exclude each other, the one of `own` holds.
    """
    for section, *pair in PAIRS:
        for named, rival in (pair, pair[::-1]):
            if has_key(own, f"{section}.{named}"):
                base = without_key(base, f"{section}.{rival}")
    return _merged(base, own)


def _merged(base: Json, own: Json) -> Json:
    tables = [key for key, value in own.items() if isinstance(value, dict) and isinstance(base.get(key), dict)]
    return base | own | {key: _merged(base[key], own[key]) for key in tables}


def levels_of(tables: Json) -> list[Json]:
    """Return the tables of the run and of each of its stages."""
    stages = tables.get("stage")
    return [tables, *(stage for stage in (stages if isinstance(stages, list) else []) if isinstance(stage, dict))]


def nested(key: str, value: object) -> Json:
    """Return tables that hold `value` at the dotted `key`."""
    word, _, rest = key.partition(".")
    return {word: nested(rest, value) if rest else value}


def has_key(tables: object, key: str) -> bool:
    for word in key.split("."):
        if not isinstance(tables, dict) or word not in tables:
            return False
        tables = tables[word]
    return True


def without_key(tables: Json, key: str) -> Json:
    if not has_key(tables, key):
        return tables
    word, _, rest = key.partition(".")
    kept = {name: value for name, value in tables.items() if name != word}
    return {**kept, word: without_key(tables[word], rest)} if rest else kept


def difference(base: Json, other: Json) -> Json:
    """Return the tables that have to be merged into `base` to get `other`."""
    found = {}
    for key, value in other.items():
        if key not in base:
            found[key] = value
        elif isinstance(value, dict) and isinstance(base[key], dict):
            if inner := difference(base[key], value):
                found[key] = inner
        elif value != base[key]:
            found[key] = value
    return found


def value_of(tables: object, key: str) -> object:
    """Return the value at the dotted `key`; None where there is none."""
    for word in key.split("."):
        tables = tables.get(word) if isinstance(tables, dict) else None
    return tables
