"""tools.check_data --write-clean: what remains of the sources, the report, and a catalogue that a run reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import tables
from tools import check_data
from trainer.runfile.load import load_config
from trainer.runfile.toml_files import to_toml


@pytest.fixture
def run_file(parts: Path, tmp_path: Path) -> Path:
    """A run whose training source has an empty answer and a missing picture, and whose validation is one bad record."""
    records = json.loads((parts / "train.json").read_text())
    records[3]["conversations"][1]["value"] = ""
    records[4]["image"] = "nowhere.png"
    (tmp_path / "train.json").write_text(json.dumps(records, indent=1))
    (tmp_path / "test.jsonl").write_text(json.dumps(records[3]) + "\n")
    source = {"path": str(tmp_path / "train.json"), "name": "a b", "media_root": str(parts / "images"), "weight": 0.5}
    data = {"sources": [source], "validation": [{"path": str(tmp_path / "test.jsonl")}]}
    file = tmp_path / "run.toml"
    file.write_text(to_toml(tables(parts, output_dir=str(tmp_path / "run"), data=data)))
    return file


def check(file: Path, *options: str) -> int:
    return check_data.main(["--cfg", str(file), "--workers", "1", *options])


def test_what_breaks_no_rule_is_copied_and_can_be_named(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_file.parent
    clean = folder / "clean"
    assert check(run_file, "--write-clean", str(clean)) == 0
    said = capsys.readouterr().out
    assert f"clean     train a b: 20 of 22 records in {clean / 'train' / 'a_b'}" in said
    assert "clean     validation test: 0 of 1 records" in said
    records = json.loads((folder / "train.json").read_text())
    del records[3:5]
    assert json.loads((clean / "train" / "a_b" / "train.json").read_text()) == records
    assert not (clean / "validation" / "test" / "test.jsonl").exists()
    report: dict[str, Any] = json.loads((clean / "report.json").read_text())
    assert report["train"]["a b"] == {
        **{"records": 22, "kept": 20, "removed": 2, "removed_by_field": {"conversations": 1, "image": 1}},
        "files": [{"name": "train.json", "kept": 20, "removed": 2}],
    }
    changes = [f"data.catalog={clean / 'catalog.toml'}", 'data.sources=[{name="a b"}]', "data.validation="]
    (source,) = load_config(str(run_file), changes).data.sources
    assert (source.weight, source.path) == (0.5, str(clean / "train" / "a_b" / "train.json"))
    assert check(run_file, *changes) == 0


def test_a_folder_that_holds_something_is_left_alone(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(run_file, "--write-clean", str(run_file.parent)) == 2
    assert "is there already and not an empty folder" in capsys.readouterr().err
