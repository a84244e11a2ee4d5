"""tools.check_data from the command line: what it says, what it writes, how it ends."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from data.check.check_record import BAD, Problem
from data.check.found import Found
from data.check.report import problem_rows
from tests.support.runs import tables
from tools import check_data
from trainer.runfile.toml_files import to_toml


@pytest.fixture
def folder(parts: Path, tmp_path: Path) -> Path:
    """train.json and its images, to be spoiled, and a validation source of three of its records."""
    shutil.copytree(parts / "images", tmp_path / "images")
    shutil.copy(parts / "train.json", tmp_path / "train.json")
    records = json.loads((parts / "train.json").read_text())
    held_out = [records[0], records[1] | {"id": "new", "conversations": records[2]["conversations"], "image": records[2]["image"]}]
    held_out[1]["conversations"] = [{"from": "human", "value": "<image><image> Other?"}, {"from": "gpt", "value": "Yes."}]
    (tmp_path / "test.json").write_text(json.dumps(held_out, indent=1))
    return tmp_path


def check(parts: Path, folder: Path, *options: str, **sections: Any) -> int:
    named = {name: [{"path": str(folder / f"{name}.json"), "media_root": str(folder / "images")}] for name in ("train", "test")}
    data = {"sources": named["train"], "validation": named["test"]}
    described = tables(parts, **{"output_dir": str(folder / "run"), "data": data, **sections})
    (folder / "run.toml").write_text(to_toml(described))
    return check_data.main(["--cfg", str(folder / "run.toml"), *options])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_sound_data_end_with_0_though_validation_stands_in_training(
    parts: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(parts, folder) == 0
    said = capsys.readouterr().out
    counts = json.loads(said.splitlines()[-1])
    assert (counts["bad"], counts["duplicates"]) == (0, {"leak": 1, "shared_medium": 2})
    assert counts["train"]["train"]["records"] == counts["train"]["train"]["ok"] == 22
    assert counts["train"]["train"]["images"] == 21 and counts["validation"]["test"]["images"] == 2
    assert "records  22: 22 ok, 0 bad, 0 too long" in said and "lengths are exact now" in said
    assert (folder / "run" / "bad.jsonl").read_text() == ""
    leak, *shared = lines(folder / "run" / "duplicates.jsonl")
    assert leak == {
        **{"kind": "leak", "split": "validation", "source": "test", "file": "test.json", "line": 2, "id": "r0"},
        **{"other_split": "train", "other_source": "train", "other_file": "train.json", "other_line": 2, "other_id": "r0"},
    }
    assert [(row["kind"], row["id"], row["other_id"]) for row in shared] == [("shared_medium", "new", "r2")] * 2
    assert "1 records of validation stand in training as well\n  test.json:2 r0: as train.json:2 r0" in said
    assert check(parts, folder, "--workers", "1") == 0
    again = capsys.readouterr().out
    assert "train train" in again and "(1 of 1 parts cached)" in again
    assert json.loads(again.splitlines()[-1]) == counts


def test_bad_records_end_with_65_and_all_are_written_down(
    parts: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_data, "SHOWN", 1)
    for name in ("4_0.png", "7_0.png", "8_1.png"):
        (folder / "images" / name).unlink()
    records = json.loads((folder / "train.json").read_text())
    records[0]["conversations"][1]["value"] = "\x1b[31m " + "word " * 200
    records[3]["conversations"][1]["value"] = ""
    (folder / "train.json").write_text(json.dumps(records, indent=1))
    assert check(parts, folder, "data.max_length=150", "--out", str(folder / "out")) == 65
    said, failed = capsys.readouterr()
    assert failed.splitlines()[-1] == f"check_data: 4 records break the rules; all stand in {folder / 'out' / 'bad.jsonl'}"
    counts = json.loads(said.splitlines()[-1])
    assert counts["bad"] == counts["train"]["train"]["bad"] == 4 and counts["train"]["train"]["too_long"] == 1
    assert counts["train"]["train"]["bad_by_field"] == {"conversations": 1, "image": 3}
    assert counts["train"]["train"]["missing_files"] == 3
    found = lines(folder / "out" / "bad.jsonl")
    assert [(row["id"], row["field"], row["kind"]) for row in found] == [
        ("r0", "conversations", "too_long"),
        ("r3", "conversations[1].value", "bad"),
        ("r4", "image", "bad"),
        ("r7", "image", "bad"),
        ("r8", "image", "bad"),
    ]
    text = (folder / "train.json").read_text().splitlines()
    for row in found:
        assert row["split"] == "train" and row["source"] == "train" and row["file"] == "train.json"
        assert json.dumps(row["id"]) in text[row["line"]]  # the object begins on the line, its id stands on the next
    assert f"train.json:{found[2]['line']} r4: image: " in said and "... and 2 more of image" in said and "r7: " not in said


def test_an_endless_id_is_shortened_in_the_list_of_bad_records() -> None:
    found = Found({}, [(0, Problem(BAD, "train.json:7", "x" * 100_000, "image", "is missing"))], {})
    (row,) = problem_rows("train", "train", found)
    assert (
        row["line"] == 7 and row["id"].startswith("xxx") and row["id"].endswith("... (100000 characters)") and len(row["id"]) < 300
    )


def test_a_file_in_place_of_the_run_folder_is_named(parts: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "file").write_text("")
    assert check(parts, folder, output_dir=str(folder / "file")) == 73
    assert f"{folder / 'file'} is no folder; move it away" in capsys.readouterr().err


def test_a_wrong_setting_ends_with_2(parts: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(parts, folder, "--workers", "0") == 2 and "--workers 0" in capsys.readouterr().err
    assert check(parts, folder, "data.max_lenght=9") == 2 and "max_length" in capsys.readouterr().err
    shutil.rmtree(folder / "images")
    assert check(parts, folder) == 2 and "is no folder" in capsys.readouterr().err


def test_decoding_finds_what_headers_hide(parts: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "images" / "1_0.png"
    path.write_bytes(path.read_bytes().replace(b"IDAT\x78", b"IDAT\x00"))
    assert check(parts, folder) == 0
    assert check(parts, folder, "--decode", "--near") == 65
    assert "r1: image: " in capsys.readouterr().out
    assert check(parts, folder) == 65  # what is known is not forgotten by a check that is less deep
