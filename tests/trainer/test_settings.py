"""Every setting has one sentence, beside its field; the page and the schema are made from them, and say what is true."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from model.errors import ConfigError
from tests.support.config import MINIMAL
from tests.support.json_schema import violations
from tests.support.runs import merged
from trainer.main import main
from trainer.runfile.load import load_config
from trainer.runfile.schema import flatten_tables, to_tables
from trainer.runfile.settings import list_settings, sentences_of
from trainer.runfile.settings_page import run_schema, schema_text, settings_page

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
SCHEMA_LINE = "#:schema ../docs/run.schema.json"


def test_every_setting_has_a_sentence_and_all_are_listed() -> None:
    known = {setting.key for setting in list_settings()}
    assert len(known) > 100 and all(setting.sentence.endswith(".") for setting in list_settings())
    config = load_config(str(ROOT / "recipes" / "llava15_lora.toml"))
    written = {".".join("N" if word.isdigit() else word for word in key.split(".")) for key in flatten_tables(to_tables(config))}
    assert {key for key in written if key.partition(".")[0] != "stage"} <= known | {"data.validation"}


def test_a_field_without_a_sentence_is_named_with_what_to_write() -> None:
    @dataclass(frozen=True)
    class Lacking:
        one: int = 0
        """A number of something; 0 = none."""
        two: int = 0
        three: int = 0
        """Another number."""

    with pytest.raises(ConfigError, match=r"Lacking\.two has no sentence: write one behind the field, as .*make settings"):
        sentences_of(Lacking)


@pytest.mark.parametrize(("name", "made"), [("settings.md", settings_page), ("run.schema.json", schema_text)])
def test_the_files_in_docs_are_what_the_generator_prints(name: str, made: Any) -> None:
    assert (ROOT / "docs" / name).read_text() == made(), "run `make settings`"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_and_its_resolved_file_fit_the_schema_and_name_it(path: Path) -> None:
    tables, schema = tomllib.loads(path.read_text()), run_schema()
    assert violations(tables, schema, schema) == []
    assert violations(to_tables(load_config(str(path))), schema, schema) == []
    assert path.read_text().splitlines()[0] == SCHEMA_LINE and (path.parent / SCHEMA_LINE.split()[1]).resolve().is_file()
    if find_spec("jsonschema"):
        import jsonschema

        jsonschema.Draft7Validator(schema).validate(tables)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"optim": {"lrr": 1}}, ".optim.lrr is unknown"),
        ({"optim": {"lr": "fast"}}, ".optim.lr: 'fast' is no number"),
        ({"model": {"llm": {"tune": "some"}}}, ".model.llm.tune: 'some' is not in"),
        ({"optim": {"betas": [0.9]}}, ".optim.betas: 1 items"),
        ({"data": {"sources": [{"name": "a"}]}}, ".data.sources.0.path is required"),
        ({"stage": [{"optim": {"lr": 1.0}}]}, ".stage.0.name is required"),
        ({"output_dir": None}, ".output_dir is required"),
    ],
)
def test_the_schema_refuses_what_a_start_refuses(changes: dict[str, Any], expected: str) -> None:
    schema = run_schema()
    assert violations(MINIMAL, schema, schema) == []
    (found,) = violations(merged(MINIMAL, changes), schema, schema)
    assert expected in found


def test_settings_are_printed_and_searched(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--settings", "clip_norm"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("optim.clip_norm   number; default 1\n    Largest norm") and said.count("\n") == 2
    assert main(["--settings", "gradient_clipping"]) == 2
    assert "in no key and no sentence" in capsys.readouterr().err
    assert main(["--schema"]) == 0 and json.loads(capsys.readouterr().out) == run_schema()
