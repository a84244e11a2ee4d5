"""Settings of run.toml shown: lines for a terminal, the page docs/settings.md, and the JSON schema that editors read."""

from __future__ import annotations

import dataclasses
import json
import sys
import textwrap
import types
from typing import Literal, Union, get_args, get_origin, get_type_hints

from data.config import SourceConfig
from model.errors import ConfigError
from model.files.untrusted import Json
from trainer.config import RunConfig, StageConfig
from trainer.errors import CONFIG, DONE
from trainer.runfile.published import NAMED_BY
from trainer.runfile.settings import (
    NO_DEFAULT,
    default_of,
    default_words,
    find_settings,
    list_settings,
    sentences_of,
    table_class,
    type_words,
)

HEAD = """\
# Settings

Every key of run.toml. This page and [run.schema.json](run.schema.json), which editors read, are made from `trainer/config.py`,
`model/config.py` and `data/config.py`: a field, and behind it its sentence (`make settings`). In a terminal:
`python -m trainer.main --settings`, or `--settings lr` for the keys and sentences that hold a word.

A key is set in the file, or on the command line as `optim.lr=1e-4`, `data.sources.0.path=mine.jsonl`; `optim.lr=` takes it out of
the file again. Beside any `path` or `init_from` of [model] and [lora], `revision` names a branch, tag or commit of the hub id.
`[[data.validation]]` has the keys of `[[data.sources]]`. A `[[stage]]` has a name, and any key below in tables as `[stage.optim]`.
"""
REVISION = "Branch, tag or commit of the hub id beside it."
JSON_TYPES: dict[object, str] = {str: "string", int: "integer", float: "number", bool: "boolean"}
WIDTH = 100


def print_settings(word: str, *, schema: bool, page: bool) -> int:
    """Print the JSON schema, the page of all settings, or the settings that hold `word`, and return the exit code."""
    try:
        if schema or page:
            print(schema_text() if schema else settings_page(), end="")
        else:
            print(settings_text(word))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return CONFIG
    return DONE


def settings_text(word: str) -> str:
    """Return the settings whose key or sentence holds `word` as lines for a terminal; all for ""."""
    lines = []
    for setting in find_settings(word):
        default = f"{'default ' * (setting.default is not NO_DEFAULT)}{default_words(setting.default)}"
        lines.append(f"{setting.key}   {type_words(setting.hint)}; {default}")
        lines += textwrap.wrap(setting.sentence, WIDTH, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def settings_page() -> str:
    """Return the text of docs/settings.md."""
    lines, table = [HEAD.rstrip()], None
    sentences = {f"[{name}]": text for name, text in sentences_of(RunConfig).items()}
    sentences |= {f"[model.{name}]": text for name, text in sentences_of(get_type_hints(RunConfig)["model"]).items()}
    for setting in list_settings():
        if setting.key.startswith("data.validation.") or setting.key == "stage.N.settings":
            continue
        if setting.table != table:
            table = setting.table
            lines += ["", f"## {table or 'Above all tables'}", ""]
            lines += [sentences[table], ""] if table in sentences else []
            lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        default = "required" if setting.default is NO_DEFAULT else f"`{default_words(setting.default)}`"
        cells = (f"`{setting.name}`", type_words(setting.hint), default, setting.sentence)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def schema_text() -> str:
    """Return the text of docs/run.schema.json."""
    return json.dumps(run_schema(), indent=1, ensure_ascii=False) + "\n"


def run_schema() -> Json:
    """Return the JSON schema of run.toml, in draft 7. It says less than a start checks: that settings go together is not in it."""
    whole = _table(RunConfig, "")["properties"]
    tables = {name: value for name, value in whole.items() if value.get("type") == "object"}
    own = {name: value for name, value in whole.items() if name not in tables}
    refs = {name: {"$ref": f"#/definitions/{name}"} for name in tables}
    stage = {"name": {"type": "string", "description": sentences_of(StageConfig)["name"]}, "seed": own["seed"], **refs}
    stages = {"type": "array", "items": _object(stage, ["name"]), "description": sentences_of(RunConfig)["stage"]}
    root = _object({**own, **refs, "stage": stages}, ["output_dir", "model"])
    return {"$schema": "http://json-schema.org/draft-07/schema#", "title": "run.toml", **root, "definitions": tables}


def _object(properties: Json, required: list[str]) -> Json:
    found = {"type": "object", "additionalProperties": False, "properties": properties}
    return {**found, "required": required} if required else found


def _table(cls: type, path: str) -> Json:
    """Return the schema of a table. What a published model or a catalogue fills in is not required."""
    hints, sentences, properties = get_type_hints(cls), sentences_of(cls), {}
    for field in dataclasses.fields(cls):
        key, hint = f"{path}.{field.name}" if path else field.name, hints[field.name]
        inner = table_class(hint)
        if inner is None:
            found = _value(hint)
        elif inner is StageConfig:
            found = {}  # made by run_schema
        else:
            found = _table(inner, key)
            found = {"type": "array", "items": found} if get_origin(hint) is tuple else found
        default = default_of(field)
        if inner is None and default not in (NO_DEFAULT, None):
            found["default"] = list(default) if isinstance(default, tuple) else default
        properties[field.name] = {"description": sentences[field.name], **found}
    if path.partition(".")[0] in ("model", "lora") and any(name in properties for name in NAMED_BY):
        properties["revision"] = {"type": "string", "description": REVISION}
    filled = path.startswith("model") or cls is SourceConfig  # by a published model, by data.catalog
    required = [f.name for f in dataclasses.fields(cls) if default_of(f) is NO_DEFAULT and not filled]
    return _object(properties, required)


def _value(hint: object) -> Json:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return {"enum": list(args)}
    if origin in (Union, types.UnionType):
        options = [_value(arg) for arg in args if arg is not types.NoneType]
        return options[0] if len(options) == 1 else {"anyOf": options}
    if origin is tuple:
        length = {} if Ellipsis in args else {"minItems": len(args), "maxItems": len(args)}
        return {"type": "array", "items": _value(args[0]), **length}
    if origin is dict:
        return {"type": "object", "additionalProperties": _value(args[1])}
    return {"type": JSON_TYPES[hint]}
