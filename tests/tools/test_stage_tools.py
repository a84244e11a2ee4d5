"""Looking at a curriculum: the data of each stage by itself, before a run and after; parts that come along unfed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import config_of, start_alone, tables
from tools import check_data, inspect_data
from tools.watcher.run_view import RunView
from tools.watcher.step_page import StepPages
from trainer.records.quarantine import read_rows
from trainer.records.sample_log import read_step
from trainer.runfile.toml_files import to_toml

SEE: dict[str, Any] = {"name": "see", "model": {"llm": {"tune": "frozen"}, "vision": {"tune": "frozen"}}, "train": {"max_steps": 2}}


@pytest.fixture(scope="module")
def run(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures first, then text alone: a folder with run.toml of a finished run in run/."""
    folder = tmp_path_factory.mktemp("stages")
    texts = [record for record in json.loads((parts / "train.json").read_text()) if "image" not in record]
    texts[2]["conversations"][0]["from"] = "nobody"
    (folder / "texts.json").write_text(json.dumps(texts))
    talk = {
        "name": "talk",
        "model": {"llm": {"tune": "lora"}, "vision": {"tune": "frozen"}, "vision_projector": {"tune": "frozen"}},
        "data": {"sources": [{"path": str(folder / "texts.json")}]},
        "train": {"epochs": 1.0},
    }
    sections = {"lora": {"rank": 2}, "train": None, "stage": [SEE, talk]}
    (folder / "run.toml").write_text(to_toml(tables(parts, output_dir=str(folder / "run"), **sections)))  # type: ignore[arg-type]
    begun = start_alone(parts, folder / "run", sections)
    assert begun.code == 0, begun.said
    assert config_of(parts, **sections).stage[1].name == "talk"
    return folder


def test_a_frozen_part_comes_along_where_nothing_is_fed_to_it(run: Path) -> None:
    card = json.loads((run / "run" / "final" / "model.json").read_text())
    assert card["model"]["vision"] is not None and (run / "run" / "final" / "vision_projector.safetensors").is_file()
    first = (run / "run" / "stages" / "01-see" / "final" / "vision_projector.safetensors").read_bytes()
    assert (run / "run" / "final" / "vision_projector.safetensors").read_bytes() == first


def test_steps_and_bad_records_are_those_of_the_stage(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = run / "run" / "stages"
    assert [len(read_step(stages / "01-see", step)) for step in (0, 1)] == [6, 6]
    assert [len(read_step(stages / "02-talk", step)) for step in (2, 3)] == [6, 2]
    assert [row["sample_id"] for row in read_rows(run / "run", "talk")] == [2] and read_rows(run / "run", "see") == []
    assert inspect_data.main(["--run", str(run / "run"), "--stage", "talk", "--step", "3"]) == 0
    assert capsys.readouterr().out.count("cats on a mat") == 2 - (2 in read_step(stages / "02-talk", 3))
    assert inspect_data.main(["--run", str(run / "run"), "--stage", "talk", "--step", "0"]) == 2
    assert "holds steps 2 to 3" in capsys.readouterr().err
    assert [StepPages().page(RunView(run / "run"), step)[1].count("<article") for step in (1, 2, 3, 4)] == [6, 6, 6, 2]


def test_a_stage_is_checked_by_name_before_it_has_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg, new = str(run / "run.toml"), f"output_dir={tmp_path}"
    assert check_data.main(["--cfg", cfg, "--stage", "talk", "--workers", "1", new]) == 65
    assert json.loads((tmp_path / "stages" / "02-talk" / "bad.jsonl").read_text())["line"] > 0
    assert check_data.main(["--cfg", cfg, "--stage", "see", "--workers", "1", new]) == 0
    assert len(list((tmp_path / "index").glob("exact-*.npz"))) == 2  # what is known of one stage outlives the other's check
    capsys.readouterr()
    assert check_data.main(["--cfg", cfg, "--workers", "1", new]) == 2
    assert "--stage '': the run's stages are 'see', 'talk': name one of them" in capsys.readouterr().err
