"""data.catalog: named data sets of a shared file, their errors, and that a run keeps what they were when it began."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from model.errors import ConfigError
from tests.support.config import MINIMAL, violations
from tests.support.runs import failure_of, merged, start_alone
from trainer.runfile.load import load_config
from trainer.runfile.schema import to_tables
from trainer.runfile.settings_page import run_schema
from trainer.runfile.stages import list_stages
from trainer.runfile.toml_files import to_toml

SETS: dict[str, Any] = {
    "coco": {"path": "coco/*.json", "media_root": {"image": "coco/images", "video": "/videos"}, "weight": 0.5},
    "vqa": {"path": "/abs/vqa.jsonl", "take": "first:10%"},
    "broken": {"path": "x.json", "media_rot": "images"},
    "called": {"path": "x.json", "name": "other"},
    "pathless": {"weight": 2.0},
    "number": 3,
}


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A catalogue in a folder whose name holds a character of patterns."""
    (tmp_path / "set[s]").mkdir()
    path = tmp_path / "set[s]" / "catalog.toml"
    path.write_text(to_toml(SETS))
    return path


def load(shared: Path, *overrides: str, **data: Any) -> Any:
    tables = merged(MINIMAL, {"data": {"catalog": str(shared), **data}})
    stages = [{"name": name, **stage} for name, stage in data.pop("stage", {}).items()]
    tables["data"].pop("stage", None)
    file = shared.parent / "run.toml"
    file.write_text(to_toml({**tables, **({"stage": stages} if stages else {})}))
    return load_config(str(file), overrides)


def test_a_source_by_name_has_the_settings_of_its_set_below_its_own(shared: Path) -> None:
    config = load(
        shared, "data.sources.1.take=first:5", sources=[{"name": "coco", "weight": 2.0}, {"name": "vqa"}, {"path": "a.json"}]
    )
    coco, vqa, plain = config.data.sources
    folder = shared.parent
    assert coco.path == f"{folder.parent}/set[[]s]/coco/*.json"  # the folder's own brackets are no pattern
    assert (coco.name, coco.weight) == ("coco", 2.0)
    assert coco.media_root == {"image": f"{folder}/coco/images", "video": "/videos"}
    assert (vqa.path, vqa.take, plain.path) == ("/abs/vqa.jsonl", "first:5", "a.json")
    assert config.data.catalog == "" and "pathless" not in json.dumps(to_tables(config))  # resolved: the file is not asked again


def test_validation_takes_no_weight_from_a_set(shared: Path) -> None:
    (held_out,) = load(shared, sources=[{"path": "a.json"}], validation=[{"name": "coco"}]).data.validation
    assert (held_out.key, held_out.weight) == ("coco", 1.0)


def test_stages_name_sets_of_the_run_or_of_their_own_catalogue(shared: Path) -> None:
    (other := shared.with_name("other.toml")).write_text(to_toml({"coco": {"path": "elsewhere.json"}}))
    stages = {
        "one": {"data": {"sources": [{"name": "vqa"}]}},
        "two": {"data": {"catalog": str(other), "sources": [{"name": "coco"}]}},
    }
    config = load(shared, sources=[{"name": "coco"}], stage=stages)
    assert [stage.config.data.sources[0].path for stage in list_stages(config)] == [
        "/abs/vqa.jsonl",
        str(shared.parent / "elsewhere.json"),
    ]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({"name": "cocoa"}, "data.sources.0: name = 'cocoa' is no data set of '{}', and no path is named; did you mean 'coco'?"),
        ({"name": "zzz"}, "it has broken, called, coco, number, pathless, vqa"),
        ({"name": "broken"}, "{}: broken.media_rot is not a setting; did you mean 'broken.media_root'?"),
        ({"name": "called"}, "{}: called.name: a data set is called as its table is; remove the line"),
        ({"name": "pathless"}, "{}: pathless.path is required"),
        ({"name": "number"}, "{}: number = 3 is not a table"),
        ({"path": "a.json"}, "data.catalog = '{}' has no effect: every source has a path of its own"),
        ({"weight": 2.0}, "data.sources.0.path is required"),
    ],
)
def test_what_is_wrong_is_told_with_the_file_and_the_nearest_name(shared: Path, source: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(shared, sources=[source])
    assert expected.replace("{}", str(shared)) in str(error.value)


@pytest.mark.parametrize(("text", "expected"), [(None, "no such file"), ("a = [", "not TOML")])
def test_a_catalogue_that_cannot_be_read_is_named(shared: Path, text: str | None, expected: str) -> None:
    shared.unlink() if text is None else shared.write_text(text)
    with pytest.raises(ConfigError, match=expected) as error:
        load(shared, sources=[{"name": "coco"}])
    assert f"data.catalog = '{shared}'" in str(error.value)


def test_the_schema_allows_a_source_by_name() -> None:
    schema = run_schema()
    assert not violations(merged(MINIMAL, {"data": {"catalog": "c.toml", "sources": [{"name": "a"}]}}), schema, schema)


def test_what_a_run_records_needs_no_catalogue(shared: Path) -> None:
    config = load(shared, sources=[{"name": "coco"}], stage={"one": {"data": {"sources": [{"name": "vqa"}]}}, "two": {}})
    (recorded := shared.with_name("recorded.toml")).write_text(to_toml(to_tables(config)))
    shared.unlink()
    assert load_config(str(recorded)) == config


@pytest.mark.long
def test_a_run_keeps_the_sets_it_began_with(parts: Path, tmp_path: Path) -> None:
    catalog = tmp_path / "catalog.toml"
    one = {"path": str(parts / "train.json"), "media_root": str(parts / "images")}
    catalog.write_text(to_toml({"mine": one}))
    changes = {"data": {"catalog": str(catalog), "sources": [{"name": "mine"}]}, "train": {"max_steps": 1}}
    out = tmp_path / "run"
    assert start_alone(parts, out, changes).code == 0
    assert load_config(str(out / "run.toml")).data.sources[0].path == one["path"]  # without the catalogue
    fewer = tmp_path / "fewer.json"
    fewer.write_text(json.dumps(json.loads((parts / "train.json").read_text())[:12]))
    catalog.write_text(to_toml({"mine": {**one, "path": str(fewer)}}))
    code, reason = failure_of(parts, out, merged(changes, {"train": {"max_steps": 2}}))
    assert code == 2 and "data.sources.0.path" in reason, reason
