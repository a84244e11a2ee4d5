"""Settings: each has one sentence, from which page and schema are made; overrides unset, win over the file, and say so."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from model.errors import ConfigError
from tests.support.config import MINIMAL, violations
from tests.support.runs import merged
from trainer.config import RunConfig
from trainer.main import main
from trainer.runfile.load import load_config, load_run
from trainer.runfile.schema import flatten_tables, to_tables
from trainer.runfile.settings import list_settings, sentences_of
from trainer.runfile.settings_page import run_schema, schema_text, settings_page
from trainer.runfile.stages import list_stages
from trainer.runfile.toml_files import to_toml
from trainer.trial.reachable_parts import with_reachable

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
def test_every_recipe_and_its_resolved_file_fit_the_schema_and_name_it(path: Path, tmp_path: Path) -> None:
    tables, schema = tomllib.loads(path.read_text()), run_schema()
    assert violations(tables, schema, schema) == []
    resolved, _ = load_run(str(path), changed=lambda found: with_reachable(found, tmp_path, {}))  # published models are not there
    assert violations(to_tables(resolved), schema, schema) == []
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
        ({"data": {"sources": [{"nam": "a"}]}}, ".data.sources.0.nam is unknown"),
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


def loaded(folder: Path, changes: dict[str, Any], *overrides: str) -> tuple[RunConfig, list[str]]:
    path = folder / "run.toml"
    path.write_text(to_toml(merged(MINIMAL, changes)))
    return load_run(str(path), overrides)


def test_a_key_without_a_value_is_taken_out_of_the_file(tmp_path: Path) -> None:
    changes = {"optim": {"lr": 0.5}, "data": {"sources": [{"path": "a.json"}, {"path": "b.json"}]}}
    config, notes = loaded(tmp_path, changes, "optim.lr=", "data.sources.0=", "optim.eps=", "model.cache_dir=", 'data.system=""')
    assert (config.optim.lr, [source.path for source in config.data.sources], notes) == (2e-5, ["b.json"], [])
    text_alone, notes = loaded(tmp_path, {"data": {"image_fit": "square"}}, "model.vision=")
    assert text_alone.model.vision is None is text_alone.model.vision_projector and text_alone.data.image_fit == "pad"
    assert [line.split(" has")[0] for line in notes] == ["[model.vision_projector]", "data.image_fit"]
    with pytest.raises(ConfigError, match=r"^override 'optim.lrr=': optim.lrr is not a setting"):
        loaded(tmp_path, changes, "optim.lrr=")


@pytest.mark.parametrize(
    ("changes", "override", "aside"),
    [
        ({"train": {"epochs": 3.0}}, "train.max_steps=2", "train.epochs = 3.0 of the file: override 'train.max_steps=2' holds"),
        ({"optim": {"warmup_ratio": 0.1}}, "optim.warmup_steps=5", "optim.warmup_ratio = 0.1 of the file: override "),
        ({"lora": {"rank": 8}}, "model.llm.tune=full", "[lora] has no effect: no part has tune = 'lora'"),
        ({"data": {"image_fit": "tiles", "max_tiles": 6}}, "data.image_fit=pad", "data.max_tiles = 6 has no effect unless"),
        (
            {"batch": {"micro_batch_tokens": 9000}, "data": {"packing": True}},
            "data.packing=false",
            "batch.micro_batch_tokens = 9000",
        ),
    ],
)
def test_an_override_wins_over_what_contradicts_it_in_the_file(
    tmp_path: Path, changes: dict[str, Any], override: str, aside: str
) -> None:
    _, (note,) = loaded(tmp_path, changes, override)
    assert note.startswith(aside)


def test_what_has_no_effect_without_the_override_or_by_another_one_stays_an_error(tmp_path: Path) -> None:
    idle = {"model": {"llm": {"tune": "full"}}, "lora": {"rank": 8}}
    with pytest.raises(ConfigError, match=r"run.toml:\n  - \[lora\] has no effect"):
        loaded(tmp_path, idle, "optim.lr=1.0")
    with pytest.raises(ConfigError, match=r"\[lora\] has no effect"):
        loaded(tmp_path, {}, "model.llm.tune=full", "lora.rank=3")
    with pytest.raises(ConfigError, match=r"train.epochs and train.max_steps are both named"):
        loaded(tmp_path, {}, "train.epochs=1.0", "train.max_steps=3")


def test_an_override_above_all_stages_holds_in_each_of_them(tmp_path: Path) -> None:
    stages = [{"name": "a", "train": {"epochs": 2.0}}, {"name": "b", "train": {"max_steps": 9}, "optim": {"lr": 0.5}}]
    config, notes = loaded(tmp_path, {"stage": stages}, "train.max_steps=2", "optim.lr=0.1", "stage.1.optim.lr=0.2")
    assert [stage.config.train.max_steps for stage in list_stages(config)] == [2, 2]
    assert [stage.config.optim.lr for stage in list_stages(config)] == [0.1, 0.2]
    assert [line.split(" of the file")[0] for line in notes] == ["stage a: train.epochs = 2.0", "stage b: train.max_steps = 9"]


def test_errors_name_the_command_line_and_not_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as one:
        loaded(tmp_path, {}, "seed=7", "optim.lr=abc")
    assert str(one.value) == "override 'optim.lr=abc': optim.lr = 'abc' is not a number"
    with pytest.raises(ConfigError, match=r"^command line:\n  - override 'lora.rank=x'.*\n  - override 'optim.lr=abc'"):
        loaded(tmp_path, {}, "lora.rank=x", "optim.lr=abc")
