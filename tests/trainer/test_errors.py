"""What goes wrong for people: one clear message each, the documented code in exit.json, no traceback of ours, no hang."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data.records.record import RecordError
from model.errors import DataError
from tests.support.runs import failure_of, start_alone, tables
from trainer import supervise
from trainer.errors import SaveError
from trainer.main import main
from trainer.runfile.toml_files import to_toml
from trainer.supervise import hold

ROOT = Path(__file__).parents[2]


def broken_records(parts: Path, folder: Path, **changes: Any) -> Path:
    """A copy of the records in `folder` whose record 4 has other fields."""
    records = json.loads((parts / "train.json").read_text())
    records[4] |= changes
    path = folder / "broken.json"
    path.write_text(json.dumps(records, indent=1))
    return path


def source(folder: Path, path: Path) -> dict[str, Any]:
    return {"path": str(path), "media_root": str(folder / "images")}


CONFIGURATION: dict[str, tuple[dict[str, Any], str]] = {
    "model folder": ({"model": {"llm": {"path": "./nowhere"}}}, "model.llm.path = './nowhere'"),
    "tower folder": ({"model": {"vision": {"path": "./nowhere"}}}, "model.vision.path = './nowhere' is no folder"),
    "data file": ({"data": {"sources": [{"path": "nowhere.json"}]}}, "nowhere.json"),
    "init_from": ({"model": {"init_from": "nowhere"}}, "no final/ or checkpoint folder"),
    "projector path": ({"model": {"vision_projector": {"path": "nowhere.bin"}}}, "model.vision_projector.path = 'nowhere.bin'"),
    "lora path": ({"model": {"llm": {"tune": "lora"}}, "lora": {"path": "nowhere"}}, "lora.path = 'nowhere'"),
    "lora pattern": ({"model": {"llm": {"tune": "lora"}}, "lora": {"targets": ["*.qproj"]}}, "'*.qproj' matches no linear layer"),
    "identity": ({"model": {"vision_projector": {"kind": "identity"}}}, "needs equal widths"),
    "layer": ({"model": {"vision": {"layer": -9}}}, "model.vision.layer = -9 is not in [-4, 3]"),
    "plain weights": ({"model": {"llm": {"dequantize": True}}}, "model.llm.dequantize = true has no effect"),
    "attention": ({"model": {"attention": "warp"}}, "model.attention = 'warp'"),
    "template": ({"data": {"template": "llama2"}}, "llama2"),
    "no vision part": ({"model": {"vision": None, "vision_projector": None}}, "no [model.vision] is configured"),
    "resume": ({"checkpoint": {"resume": "runs/checkpoint-9"}}, "no such folder"),
}


@pytest.mark.parametrize("case", CONFIGURATION)
def test_configuration_errors_exit_with_2(parts: Path, tmp_path: Path, case: str) -> None:
    sections, expected = CONFIGURATION[case]
    code, reason = failure_of(parts, tmp_path / "run", sections)
    assert code == 2 and expected in reason


def test_a_part_that_nothing_feeds_is_an_error(parts: Path, tmp_path: Path) -> None:
    texts = [r for r in json.loads((parts / "train.json").read_text()) if "image" not in r]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    code, reason = failure_of(parts, tmp_path / "run", {"data": {"sources": [source(parts, tmp_path / "texts.json")]}})
    assert code == 2 and "[model.vision] can never be fed" in reason


DATA: dict[str, tuple[dict[str, Any], str]] = {
    "placeholders": ({"image": ["4_0.png", "1_0.png"]}, "r4: image"),
    "missing image": ({"image": "gone.png"}, "gone.png"),
    "outside": ({"image": "../train.json"}, "../train.json"),
    "empty answer": ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": ""}], "image": None}, "r4: "),
}


@pytest.mark.parametrize("case", DATA)
def test_data_errors_name_file_line_and_id(parts: Path, tmp_path: Path, case: str) -> None:
    changes, expected = DATA[case]
    sections = {"data": {"sources": [source(parts, broken_records(parts, tmp_path, **changes))], "on_bad_sample": "error"}}
    code, reason = failure_of(parts, tmp_path / "run", sections)
    assert code == 65
    assert "broken.json:" in reason and "r4" in reason and expected in reason


def test_a_quarantined_record_stands_in_the_file_once_and_the_run_goes_on(parts: Path, tmp_path: Path) -> None:
    root = tmp_path / "images"
    shutil.copytree(parts / "images", root)
    (root / "4_0.png").unlink()
    sections = {"data": {"sources": [{"path": str(parts / "train.json"), "media_root": str(root)}]}}
    assert start_alone(parts, tmp_path / "run", {**sections, "train": {"max_steps": 9}}).code == 0  # two epochs
    path = tmp_path / "run" / "quarantine.jsonl"
    (row,) = [json.loads(line) for line in path.read_text().splitlines()]
    assert (row["sample_id"], row["source"], row["id"], row["split"]) == (4, "train", "r4", "train")
    assert "4_0.png" in row["reason"]
    with path.open("a") as out:
        out.write('{"split": "train", "sample')  # a crash in the middle of a line
    (root / "7_0.png").unlink()
    assert start_alone(parts, tmp_path / "run", {**sections, "train": {"max_steps": 16}}).code == 0
    first, last = path.read_text().splitlines()
    assert json.loads(first) == row and json.loads(last)["sample_id"] == 7


def test_bad_validation_records_are_written_down_as_well(parts: Path, tmp_path: Path) -> None:
    sections = {
        "data": {"validation": [source(parts, broken_records(parts, tmp_path, image="gone.png"))]},
        "validation": {"every": 2},
    }
    assert start_alone(parts, tmp_path / "run", sections).code == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert [(row["split"], row["id"], row["step"]) for row in rows] == [("validation", "r4", 2)]


def test_too_many_bad_records_stop_the_run(parts: Path, tmp_path: Path) -> None:
    root = tmp_path / "images"
    shutil.copytree(parts / "images", root)
    for path in list(root.glob("*_0.png"))[:10]:
        # Whole by its markers, but with no pixels that could be unpacked: found when they are decoded.
        path.write_bytes(path.read_bytes().replace(b"IDAT\x78", b"IDAT\x00"))
    sections = {"data": {"sources": [{"path": str(parts / "train.json"), "media_root": str(root)}]}}
    code, reason = failure_of(parts, tmp_path / "run", sections)
    assert code == 65
    assert "data.max_bad_fraction allows 8" in reason and "worst source: 'train'" in reason and "quarantine.jsonl" in reason


def test_too_many_cut_pictures_stop_the_run_before_weights_are_read(parts: Path, tmp_path: Path) -> None:
    root = tmp_path / "images"
    shutil.copytree(parts / "images", root)
    for path in list(root.glob("*_0.png"))[:10]:
        path.write_bytes(path.read_bytes()[:60])
    shutil.copytree(parts / "llm", tmp_path / "llm")
    (tmp_path / "llm" / "model.safetensors").write_bytes(b"no weights")
    sections = {
        "model": {"llm": {"path": str(tmp_path / "llm")}},
        "data": {"sources": [{"path": str(parts / "train.json"), "media_root": str(root)}]},
    }
    code, reason = failure_of(parts, tmp_path / "run", sections)
    assert code == 65 and "at least 10 of 22 train records are bad, data.max_bad_fraction allows 8" in reason
    assert "worst source: 'train' with 10" in reason and "train.json:" in reason and "cut short" in reason
    assert not (tmp_path / "run" / "quarantine.jsonl").exists()


def test_no_samples(parts: Path, tmp_path: Path) -> None:
    (tmp_path / "none.json").write_text("[]")
    code, reason = failure_of(parts, tmp_path / "run", {"data": {"sources": [source(parts, tmp_path / "none.json")]}})
    assert code == 65 and "none.json" in reason


def test_numbers_that_stay_non_finite_stop_the_run(parts: Path, tmp_path: Path) -> None:
    """A learning rate that blows the weights up: updates are skipped, then the run ends with 70."""
    sections = {"optim": {"lr": 1e30, "clip_norm": 0.0, "schedule": "constant", "warmup_steps": 0}, "train": {"max_steps": 20}}
    code, reason = failure_of(parts, tmp_path / "run", sections)
    assert code == 70 and "not finite for" in reason and "faults.max_nonfinite = 3" in reason


def test_a_folder_that_cannot_be_written(parts: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert start_alone(parts, tmp_path / "file" / "run", {}).code == 73


@pytest.mark.parametrize("name", ["file", "file/run"])
def test_a_file_in_place_of_the_run_folder_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError) as caught:
        hold(tmp_path / name)
    told = f"output_dir = '{tmp_path / name}': {tmp_path / 'file'} is no folder; move it away, or use another output_dir"
    assert str(caught.value) == told


def test_a_broken_run_file_is_told_in_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.toml"
    path.write_text(f'output_dir = "{tmp_path / "run"}"\nsed = 1\n[model.llm]\npath = 3\n')
    assert main(["--cfg", str(path)]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "sed is not a setting; did you mean 'seed'?" in said and "model.llm.path = 3 is not a string" in said
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == 2


def test_a_port_in_use_is_named(parts: Path, tmp_path: Path) -> None:
    """Ranks started by hand, without torchrun: rank 0 cannot listen."""
    (tmp_path / "run.toml").write_text(to_toml(tables(parts, output_dir=str(tmp_path / "run"))))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "exit.json").write_text('{"code": 0, "reason": "done"}')  # of an earlier start
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        environment = {
            "RANK": "0",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "PATH": "/usr/bin:/bin",
        }
        command = [sys.executable, "-m", "trainer.main", "--cfg", str(tmp_path / "run.toml")]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == 2
    assert f"127.0.0.1:{port}" in done.stderr and "choose another one" in done.stderr and "Traceback" not in done.stderr


def test_a_name_that_is_no_text_is_told_in_one_line_all_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Half of a surrogate pair can be written to no file, and a terminal would obey the rest."""
    error = RecordError("m.json:3", "\ud800\x1b[31m", "image", "gone\nm.json:4 b: forged")
    assert supervise.report_failure(error, tmp_path, 0, 0) == 65
    told = "m.json:3 \\ud800\\x1b[31m: image: gone\\nm.json:4 b: forged"
    assert json.loads((tmp_path / "exit.json").read_text())["reason"] == told
    assert capsys.readouterr().err == f"\ntrainer: rank 0 stopped after step 0: {told}\n"
    assert (error.id, error.reason) == ("\ud800\x1b[31m", "gone\nm.json:4 b: forged")
    assert supervise.report_failure(DataError("\udcff.json: is empty"), tmp_path / "none", None, 0) == 65
    (tmp_path / "exit.json").unlink()
    assert supervise.report_failure(DataError("\udcff.json: is empty"), tmp_path, None, 0) == 65
    assert json.loads((tmp_path / "exit.json").read_text())["reason"] == "\udcff.json: is empty"
